"""Two processes train, evaluate and save what one does, also with the language model spread over them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from omegaconf import OmegaConf
from runners.processes import alone, logged, read_lines, torchrun
from safetensors.torch import load_file

from evlgen.common.errors import ConfigError
from evlgen.config.config import Config
from evlgen.runners.sharding import Sharding, _stacks

SIZES = {"one": 1, "two": 2, "five": 5, "seven": 7}
FINAL = "step_00000015"


def train_lines(folder):
    return logged(folder, "train")


def gradients(checkpoint):
    """The running mean of the gradients, by weight: after the first step a multiple of its gradient."""
    state = load_file(checkpoint / "training_state" / "optimizer.safetensors")
    return {name: value for name, value in state.items() if name.endswith(":exp_avg")}


def assert_same_curve(lines, expected):
    assert [line["iteration"] for line in lines] == [line["iteration"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other, rel=2e-5), line["iteration"]


def assert_same_tensors(tensors, expected):
    """Equal but for rounding, measured by the largest number of each tensor."""
    assert tensors.keys() == expected.keys()
    for name, value in tensors.items():
        assert (value - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max() + 1e-7, name


@pytest.fixture(scope="module")
def single(pair):
    """The same run of one process with a batch of four, in a folder of its own."""
    output = pair.project.parent / "single"
    alone(pair.project, f"run.output_dir={output}", "run.batch_size_train=4", "run.valid_splits=[]")
    return (output / "latest").resolve()


def test_two_processes_with_batch_b_give_the_losses_and_gradients_of_one_with_2b(pair, single):
    lines = train_lines(single)
    assert [line["iteration"] for line in lines] == [2, 4, 5, 7, 9, 10, 12, 14, 15]
    assert_same_curve(train_lines(pair.folder), lines)
    for line in lines:
        step = f"step_{line['iteration']:08d}"
        ours, theirs = (gradients(folder / "checkpoints" / step) for folder in (pair.folder, single))
        assert ours
        assert_same_tensors(ours, theirs)


def test_that_was_with_unequal_numbers_of_tokens_and_samples_on_the_processes(pair, single):
    tokens = [[note["num_tokens"] for note in pair.ended.notes("step", rank)] for rank in (0, 1)]
    assert sum(a != b for a, b in zip(*tokens, strict=True)) > 10
    listed = [{line["id"] for line in read_lines(f / "skipped.jsonl")} for f in (pair.folder, single)]
    assert len(listed[1]) == 2 and listed[1] < listed[0]


def test_what_is_trained_is_made_and_kept_equal_and_what_is_frozen_is_never_sent(pair):
    steps = [pair.ended.notes("step", rank) for rank in (0, 1)]
    trained = [[note["trained"] for note in notes] for notes in steps]
    assert trained[0] == trained[1]  # the second process started with other weights
    assert len(set(trained[0])) == 9  # a new one after every step
    frozen = [{note["frozen"] for note in notes} for notes in steps]
    assert len(frozen[0]) == len(frozen[1]) == 1 and frozen[0] != frozen[1]


def test_an_evaluation_has_every_sample_once_and_in_order_whatever_the_splits_size(pair):
    assert_evaluated(pair.folder, epochs=(1, 2, 3))


def assert_evaluated(folder, epochs):
    for epoch in epochs:
        for split, size in SIZES.items():
            captions = folder / "result" / f"{split}_epoch{epoch}" / "captions.json"
            assert [c["image_id"] for c in json.loads(captions.read_text())] == list(range(size))
    lines = [line for line in logged(folder, "evaluation") if line["label"] == f"epoch{epochs[-1]}"]
    assert {line["split"]: line["samples"] for line in lines} == SIZES


def test_a_broken_sample_of_one_process_is_left_out_of_an_evaluation_and_counted(pair):
    captions = json.loads((pair.folder / "result" / "damaged" / "captions.json").read_text())
    assert [c["image_id"] for c in captions] == [0, 1, 2, 4, 5]
    (line,) = [line for line in logged(pair.folder, "evaluation") if line["split"] == "damaged"]
    assert (line["samples"], line["skipped"]) == (5, 1)


@pytest.fixture(scope="module")
def t5(golden, tmp_path_factory):
    """A random T5 of the golden model's width, whose tokenizer it has."""
    folder = tmp_path_factory.mktemp("t5")
    tokenizer = transformers.AutoTokenizer.from_pretrained(golden / "evlgen_opt" / "language")
    tokenizer.save_pretrained(folder)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
    ids = {"decoder_start_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.T5Config(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes, **ids
    )
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "case", [pytest.param("frozen", marks=pytest.mark.slow), "trained", "t5 with adapters"]
)
def test_a_spread_language_model_trains_like_a_whole_one_from_and_to_its_checkpoints(
    forks, write_pair_project, tmp_path, t5, case
):
    project, freeze = write_pair_project(tmp_path), case != "trained"
    if case.startswith("t5"):
        content = OmegaConf.load(project)
        # adapters in encoder and decoder
        content.model.language = {"name": str(t5), "precision": "fp32", "lora": {"r": 2}}
        OmegaConf.save(content, project)
    whole, spread, back = (tmp_path / name for name in ("whole", "spread", "back"))
    both = (f"model.language.freeze={freeze}", "run.ema_decay=0.5")
    one_process = (*both, "run.batch_size_train=4", "run.valid_splits=[]")
    alone(project, f"run.output_dir={whole}", *one_process)
    expected = train_lines(whole / "latest")

    shutil.copytree(whole / "latest", spread / "run", symlinks=True)
    ended = torchrun(
        forks,
        project,
        *both,
        "run.shard_language=true",
        f"run.resume={spread}/run/checkpoints/step_000000{10 if case.startswith('t5') else '05'}",
    )
    assert ended.code == 0, ended.shown
    assert_same_curve(train_lines(spread / "run"), expected)
    assert_evaluated(spread / "run", epochs=(3,) if case.startswith("t5") else (2, 3))
    weights, others = (
        load_file(f / "checkpoints" / FINAL / "model.safetensors") for f in (spread / "run", whole / "latest")
    )
    assert {k: (v.shape, v.dtype) for k, v in weights.items()} == {
        k: (v.shape, v.dtype) for k, v in others.items()
    }
    moments, expected_moments = (
        gradients(f / "checkpoints" / FINAL) for f in (spread / "run", whole / "latest")
    )
    assert_same_tensors(moments, expected_moments)
    before = load_file(spread / "run" / "checkpoints" / "step_00000014" / "model.safetensors")
    decay = 8 / 17  # of the average, after 7 pairs of batches
    trained = load_file(spread / "run" / "checkpoints" / FINAL / "training_state" / "trained.safetensors")
    for name, weight in trained.items():
        mean = decay * before[name] + (1 - decay) * weight
        torch.testing.assert_close(weights[name], mean, rtol=1e-5, atol=1e-7, msg=name)
    parts = {part for part in ("encoder", "decoder") for name in weights if f".{part}." in name}
    assert parts == {"frozen": set(), "trained": {"decoder"}}.get(case, {"encoder", "decoder"})

    if case.startswith("t5"):
        return  # those of "trained" are read the same way
    shutil.copytree(spread / "run", back / "run", symlinks=True)
    alone(project, *one_process, f"run.resume={back}/run/checkpoints/step_00000010")
    assert_same_curve(train_lines(back / "run"), expected)


def test_layers_of_encoder_and_decoder_are_spread_and_quantised_ones_are_refused(t5):
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(t5)
    stacks = _stacks(model)
    assert {stack: len(layers) for stack, layers in stacks.items()} == {model.encoder: 3, model.decoder: 2}
    weight = torch.ones(4, 4, dtype=torch.int8)
    model.encoder.block[1].quantised = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ConfigError, match=r"run.shard_language.*int8.*model.language.quantization: none"):
        Sharding(model, torch.device("cpu"))


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("model.arch=blip2", "blip2 has no language model"),
        ("model.language.quantization=4bit", "quantised weights cannot be spread"),
    ],
)
def test_what_has_nothing_to_spread_is_found_before_a_run(option, why):
    stage = 1 if "blip2" in option else 2
    with pytest.raises(ConfigError, match=rf"run.shard_language.*{why}"):
        Config.load(f"projects/blip2/shapes_stage{stage}.yaml", [option, "run.shard_language=true"])
