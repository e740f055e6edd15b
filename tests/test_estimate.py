"""What a run costs, counted without weights, against the same step with them and against counts by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from evlgen.cli import main
from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.config.config import Config
from evlgen.estimate import estimate

PROJECT = "projects/shapes/caption.yaml"


def model_config(*options: str):
    return Config.load(PROJECT, options).model


@pytest.fixture(scope="module")
def found():
    return estimate(model_config(), "fp32", text_tokens=10)


def test_weights_are_those_of_the_model(found):
    model = registry.get_model_class("evlgen_opt").from_config(dataclasses.asdict(model_config()))
    parts = {"vision": model.vision, "language": model.language}
    for name, part in parts.items():
        assert found.parts[name].frozen == sum(p.numel() for p in part.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.parts["connector"].trained == trained
    assert found.parts["connector"].bytes == 16 * trained  # weight, gradient, two moments


def test_operations_of_a_linear_connector_by_hand():
    cfg = model_config("model.connector.name=linear")
    cost = estimate(cfg, "fp32").parts["connector"]
    assert cost.forward == 65 * 128 * 128  # 65 visual tokens, 128 channels on both sides


def test_what_is_kept_is_what_a_real_step_keeps(found):
    cfg = model_config()
    model = registry.get_model_class("evlgen_opt").from_config(dataclasses.asdict(cfg)).train()
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def kept(batch: int) -> int:
        sizes: dict[int, int] = {}
        alive = []

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                alive.append(tensor)
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        samples = {"image": torch.zeros(batch, 3, 64, 64), "text_input": [" ".join(["a"] * 10)] * batch}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(samples)["loss"]
        return sum(sizes.values())

    assert (found.kept(16) - found.kept(8)) / 8 == pytest.approx((kept(16) - kept(8)) / 8, rel=0.1)


def test_of_the_language_model_one_part_of_a_batch_is_counted(found):
    assert found.positions == 17 + 10 + 2, "soft prompts, words, start and end"
    samples = found.positions_at_once / found.positions
    of_parts = [found.kept(n) - n * found.kept_bytes for n in (8, 16, round(8 * samples))]
    assert of_parts == pytest.approx([n * found.language_bytes for n in (8, 16, samples)], rel=0.05)
    trained = estimate(model_config("model.language.freeze=false"), "fp32", 10)
    assert trained.positions_at_once is None
    assert trained.kept(400) == 400 * (trained.kept_bytes + trained.language_bytes)


def test_an_average_of_the_weights_takes_four_bytes_of_each_trained_one(found):
    averaged = estimate(model_config(), "fp32", 10, has_average=True)
    trained = sum(part.trained for part in found.parts.values())
    assert averaged.memory(8) - found.memory(8) == 4 * trained > 0


def test_a_fetched_configuration_is_named_where_it_cannot_be_had(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="model.language.name 'nobody/no-model' is not on this machine"):
        estimate(model_config("model.language.name=nobody/no-model"), "fp32")


def test_the_command_prints_parts_memory_and_hours(capsys):
    options = ["--options", "run.max_iters=1000", "run.batch_size_train=32"]
    assert main(["estimate", "--cfg-path", PROJECT, *options, "--rate", "10"]) == 0
    printed = capsys.readouterr().out
    assert "connector" in printed and "17 soft prompts" in printed
    assert "the run: 32,000 samples in 1,000 iterations" in printed


def test_a_first_stage_is_refused_by_name(capsys):
    assert main(["estimate", "--cfg-path", "projects/blip2/pretrain_stage1.yaml"]) == 1
    assert "model.arch blip2 is not made of" in capsys.readouterr().err


def test_tiles_are_counted_at_the_most_and_merging_inside_the_language_model_takes_less():
    plain = estimate(model_config(), "fp32", text_tokens=10)
    tiles = estimate(model_config("model.vision.tiles={max: 4}"), "fp32", text_tokens=10)
    assert tiles.num_soft_prompts == 5 * plain.num_soft_prompts
    assert tiles.parts["vision"].forward == pytest.approx(5 * plain.parts["vision"].forward, rel=0.01)
    merging = estimate(model_config("model.language.tome={layer: 1, r: 0.5}"), "fp32", text_tokens=10)
    assert merging.parts["language"].forward < plain.parts["language"].forward
