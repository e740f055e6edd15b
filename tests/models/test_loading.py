"""Checkpoints that are refused by name: another temporal form, weights without a place, another architecture;
and what of quantised layers goes into one."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from evlgen.common.errors import CheckpointError, ConfigError
from evlgen.common.registry import registry
from evlgen.config.config import load_model_config
from evlgen.models.architectures import EvlgenOPT, EvlgenVideoOPT
from evlgen.models.base_model import BaseModel
from evlgen.models.protocols import AnswersQuestions, HasSoftPrompts, offering, offers
from evlgen.models.published.checkpoints import to_published_names

VISION = {
    "name": "vit_tiny_patch16_224",
    "image_size": 32,
    "pretrained": False,
    "kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4},
}
BERT = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TOMEFORMER = {"name": "tomeformer", "r": 3, **BERT}
QFORMER = {"name": "qformer", "num_query_token": 5, **BERT}
LANGUAGE = {"name": "evlgen://assets/shapes/language", "precision": "fp32"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def section(arch: str, form: str | None = None, **changes):
    temporal = {"form": form} if form else None
    parts = {"vision": {**VISION, "temporal": temporal}, "connector": TOMEFORMER, "language": LANGUAGE}
    return load_model_config(arch, "shapes", {**parts, "checkpoint": None, **changes})


def build(arch: str = "evlgen_opt", form: str | None = None, **changes):
    torch.manual_seed(0)
    return registry.get_model_class(arch).from_config(section(arch, form, **changes))


def build_blip2(**changes):
    return build("blip2_opt", connector=QFORMER, **changes)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Folders and one published file of small models of videos, by temporal form."""
    folder = tmp_path_factory.mktemp("clips")
    found = {}
    for form in ("average", "residual"):
        found[form] = build("evlgen_video_opt", form).save_pretrained(folder / form)
    state = to_published_names(build("evlgen_video_opt", "residual").trained_state_dict())
    torch.save({"model": state}, folder / "published.pth")
    found["default"] = build("evlgen_video_opt").save_pretrained(folder / "default")
    return {**found, "published": folder / "published.pth"}


# ---- temporal forms


@pytest.mark.parametrize(
    ("source", "form", "needed"),
    [
        ("average", "residual", "average"),
        ("residual", None, "residual"),  # the architecture's own form is average
        ("default", "residual", "average"),
        ("published", None, "residual"),
        ("published", "average", "residual"),
        ("published", "mean", "residual"),
        ("average", "mean", "average"),
    ],
)
def test_weights_of_one_temporal_form_do_not_load_into_another(videos, source, form, needed):
    model = build("evlgen_video_opt", form)
    paths = (
        [videos[source]] if source == "published" else [videos[source], videos[source] / "model.safetensors"]
    )
    for path in paths:
        with pytest.raises(CheckpointError, match=rf"model\.vision\.temporal\.form: {needed}; "):
            model.load_checkpoint(path)


@pytest.mark.parametrize(
    ("source", "form"),
    [("average", None), ("default", "average"), ("residual", "residual"), ("published", "residual")],
)
def test_weights_of_the_same_temporal_form_load(videos, source, form):
    report = build("evlgen_video_opt", form).load_checkpoint(videos[source])
    assert report.missing == report.unexpected == []
    assert any("temporal_merge" in name for name in report.loaded)


def test_a_folder_whose_config_is_not_understood_is_loaded_with_a_warning(videos, tmp_path, caplog):
    folder = build("evlgen_video_opt").save_pretrained(tmp_path / "x")
    cfg = OmegaConf.load(folder / "config.yaml")
    cfg.model.arch = "somebodys_video"
    OmegaConf.save(cfg, folder / "config.yaml")
    assert not build("evlgen_video_opt", "residual").load_checkpoint(folder).missing
    assert "the temporal form is not compared" in caplog.text and "somebodys_video" in caplog.text


def test_videos_weights_without_a_place_name_the_form(videos, tmp_path):
    with pytest.raises(CheckpointError, match=r"form: average, and this model has none.*form: average; "):
        build().load_checkpoint(videos["average"])
    state = build("evlgen_video_opt").trained_state_dict()
    torch.save(state, tmp_path / "alone.pth")  # nothing says of what form
    with pytest.raises(CheckpointError, match=r"temporal_merge.*no place.*model\.vision\.temporal\.form"):
        build().load_checkpoint(tmp_path / "alone.pth")


# ---- adapters


def test_adapters_without_a_place_name_the_key(tmp_path):
    pytest.importorskip("peft")
    lora = {"language": {**LANGUAGE, "lora": {"r": 2}}}
    folder = build(**lora).save_pretrained(tmp_path / "lora")
    with pytest.raises(CheckpointError, match=r"\.lora_A\..*no place here.*model\.language\.lora"):
        build().load_checkpoint(folder)
    assert not build(**lora).load_checkpoint(folder).missing
    build().save_pretrained(tmp_path / "plain")
    assert build(**lora).load_checkpoint(tmp_path / "plain").missing, "adapters may start again"


# ---- stages of BLIP-2


def first_stage():
    changes = {"vision": VISION, "connector": QFORMER, "checkpoint": None}
    torch.manual_seed(1)
    return registry.get_model_class("blip2").from_config(load_model_config("blip2", "shapes", changes))


def test_text_weights_are_spare_in_a_first_stage_alone(tmp_path):
    state = first_stage().trained_state_dict()
    second = build_blip2()
    torch.save(state, tmp_path / "first.pth")
    report = second.load_checkpoint(tmp_path / "first.pth")
    assert report.missing == ["connector.proj_out.bias", "connector.proj_out.weight"]
    assert not report.unexpected
    heads = ("itm_head.", "vision_proj.", "text_proj.", "temp")
    instruct = {k: v for k, v in state.items() if not k.startswith(heads)}
    instruct |= {k: v for k, v in second.trained_state_dict().items() if "proj_out" in k}
    for name, content in {"own": instruct, "published": to_published_names(instruct)}.items():
        torch.save({"model": content}, tmp_path / f"{name}.pth")
        with pytest.raises(CheckpointError, match=r"text\..*reads the question too, as InstructBLIP's"):
            second.load_checkpoint(tmp_path / f"{name}.pth")
    torch.save({k: v for k, v in instruct.items() if not k.startswith("text.")}, tmp_path / "second.pth")
    assert not second.load_checkpoint(tmp_path / "second.pth").missing


@pytest.mark.parametrize("ask", ["predict_answers", "rank_answers", "soft_prompts", "generate_tokens"])
def test_what_a_first_stage_cannot_do_names_the_second(ask):
    with pytest.raises(ConfigError, match="model.arch: blip2_opt"):
        getattr(first_stage(), ask)({"image": torch.zeros(1, 3, 32, 32), "text_input": ["what?"]})


@pytest.mark.parametrize(
    ("protocol", "method"), [(AnswersQuestions, "predict_answers"), (HasSoftPrompts, "sample_losses")]
)
def test_what_a_task_needs_is_in_a_protocol_and_named_where_a_model_lacks_it(protocol, method):
    assert offers(build(), protocol) and not offers(BaseModel(), protocol)
    assert offering(model := build(), protocol) is model
    with pytest.raises(ConfigError, match=f"BaseModel must define {method}.*{protocol.__name__}"):
        offering(BaseModel(), protocol)


def test_an_architecture_must_define_how_it_writes():
    with pytest.raises(NotImplementedError, match="BaseModel must define generate"):
        BaseModel().generate({})


# ---- shapes


def test_other_shapes_name_the_way_without_the_checkpoint(tmp_path):
    folder = build().save_pretrained(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"has shape .*model\.checkpoint: null"):
        build(connector={**TOMEFORMER, "hidden_size": 16}).load_checkpoint(folder)


# ---- architectures


class OwnOPT(EvlgenOPT):
    """A plugin's."""


def test_a_section_of_another_architecture_names_the_right_class(videos, monkeypatch):
    assert type(EvlgenVideoOPT.from_pretrained(videos["average"])) is EvlgenVideoOPT
    with pytest.raises(ConfigError, match=r"evlgen_video_opt, whose class is EvlgenVideoOPT.*to EvlgenOPT"):
        EvlgenOPT.from_pretrained(videos["average"])
    cfg = section("evlgen_opt")
    assert type(OwnOPT.from_config(cfg)) is OwnOPT, "a subclass may build what its base builds"
    monkeypatch.setitem(registry._entries["model"], "own_opt", OwnOPT)
    own = OmegaConf.merge(cfg, {"arch": "own_opt"})
    assert type(OwnOPT.from_config(own)) is OwnOPT
    with pytest.raises(ConfigError, match="own_opt, whose class is OwnOPT"):
        EvlgenOPT.from_config(own)


# ---- quantised layers


class QuantisedLinear(nn.Linear):
    """Keeps more in a state dict than parameters and buffers, as bitsandbytes' layers do."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.absmax"] = torch.ones(3)
        destination[f"{prefix}SCB"] = torch.ones(4)


class Part(nn.Module):
    """Two such layers and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.adapter = QuantisedLinear(4, 3), QuantisedLinear(4, 2)
        self.register_buffer("scale", torch.ones(2))


class Whole(BaseModel):
    """A frozen part with a trained layer inside, and a trained part."""

    def __init__(self) -> None:
        super().__init__()
        self.language, self.connector = Part(), Part()
        self.language.requires_grad_(False)
        self.language.adapter.requires_grad_(True)

    def frozen_modules(self):
        return [self.language]

    def trained_modules(self):
        return [self.language.adapter]


def test_nothing_of_a_frozen_quantised_layer_is_saved():
    kept = ("weight", "weight.absmax", "SCB", "bias")
    layers = ("language.adapter", "connector.frozen", "connector.adapter")
    wanted = {f"{layer}.{key}" for layer in layers for key in kept} | {"connector.scale"}
    assert set(Whole().trained_state_dict()) == wanted


@pytest.mark.parametrize("part", ["language", "vision"])
def test_a_part_that_was_trained_and_is_frozen_now_is_saved(tmp_path, part):
    vision = {**VISION, "pretrained": "evlgen://assets/shapes/vision.safetensors", "image_size": 64}
    vision["kwargs"] = {**VISION["kwargs"], "embed_dim": 128, "depth": 4, "mlp_ratio": 3.0}
    parts = {"vision": {**vision, "precision": "fp32"}, "language": LANGUAGE}
    trained = build(**{**parts, part: {**parts[part], "freeze": False}})
    with torch.no_grad():
        for weight in getattr(trained, part).parameters():
            weight.mul_(1.2)
    first = trained.save_pretrained(tmp_path / "first")
    frozen = build(**parts, checkpoint=str(first))
    again = EvlgenOPT.from_pretrained(frozen.save_pretrained(tmp_path / "second"))
    assert not any(p.requires_grad for p in getattr(again, part).parameters())
    for name, value in trained.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_checkpoint_may_be_written_in_half_the_room(tmp_path):
    model = build()
    folder = model.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    whole = model.save_pretrained(tmp_path / "whole")
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, whole)]
    assert sizes[0] < 0.7 * sizes[1]
    again = EvlgenOPT.from_pretrained(folder)
    found = dict(again.named_parameters())
    for name, wanted in model.named_parameters():
        if wanted.requires_grad:
            expected = wanted.bfloat16().float() if wanted.ndim > 1 else wanted
            assert found[name].dtype == wanted.dtype and torch.equal(found[name], expected), name
