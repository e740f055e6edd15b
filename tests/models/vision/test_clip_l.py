"""clip_L is the second last layer of CLIP: compared with transformers, through every layout of weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from evlgen.common.errors import CheckpointError
from evlgen.common.registry import registry
from evlgen.models.vision import ClipL
from evlgen.models.vision.timm_encoder import openai_to_timm

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}


@pytest.fixture(scope="module")
def clip() -> CLIPVisionModel:
    """Four layers of transformers' CLIP, no weight of it at its start value, all of them whole in fp16."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        hidden_act="quick_gelu",
    )
    model = CLIPVisionModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((parameter + 0.2 * noise).half().float())
    return model


@pytest.fixture(scope="module")
def published(clip) -> dict[str, Tensor]:
    """The same weights as OpenAI names them and LAVIS publishes them, in fp16, last layer and head too."""
    own = {k.removeprefix("vision_model."): v for k, v in clip.state_dict().items()}
    state = {
        "class_embedding": own["embeddings.class_embedding"],
        "positional_embedding": own["embeddings.position_embedding.weight"],
        "proj": torch.randn(32, 16),
        "conv1.weight": own["embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        state[f"ln_pre.{kind}"] = own[f"pre_layrnorm.{kind}"]
        state[f"ln_post.{kind}"] = own[f"post_layernorm.{kind}"]
        for i in range(4):
            theirs, ours = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            qkv = [own[f"{theirs}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            state[f"{ours}.attn.in_proj_{kind}"] = torch.cat(qkv)
            state[f"{ours}.attn.out_proj.{kind}"] = own[f"{theirs}.self_attn.out_proj.{kind}"]
            state[f"{ours}.ln_1.{kind}"] = own[f"{theirs}.layer_norm1.{kind}"]
            state[f"{ours}.ln_2.{kind}"] = own[f"{theirs}.layer_norm2.{kind}"]
            state[f"{ours}.mlp.c_fc.{kind}"] = own[f"{theirs}.mlp.fc1.{kind}"]
            state[f"{ours}.mlp.c_proj.{kind}"] = own[f"{theirs}.mlp.fc2.{kind}"]
    return {key: value.half() for key, value in state.items()}


def second_last(clip: CLIPVisionModel, pixels: Tensor, **options) -> Tensor:
    with torch.no_grad():
        return clip(pixels, output_hidden_states=True, **options).hidden_states[-2]


def build(path, image_size: int = 32, **changes) -> ClipL:
    return ClipL("clip_L", image_size=image_size, pretrained=str(path), kwargs={**SMALL, **changes}).eval()


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", ["published", "with prefix", "whole CLIP", "in a LAVIS model", "timm"])
def test_it_gives_the_tokens_of_the_second_last_layer(clip, published, pixels, tmp_path, layout):
    state = published
    if layout == "with prefix":
        state = {f"visual.{k}": v for k, v in published.items()}
    elif layout == "whole CLIP":
        text = {
            "transformer.resblocks.0.ln_1.weight": torch.zeros(8),
            "positional_embedding": torch.zeros(7, 8),
        }
        state = {**{f"visual.{k}": v for k, v in published.items()}, **text}
    elif layout == "in a LAVIS model":
        state = {f"visual_encoder.{k}": v for k, v in published.items()}
    elif layout == "timm":
        state = {k: v.clone() for k, v in openai_to_timm(published).items()}
    path = tmp_path / ("x.safetensors" if layout == "timm" else "x.pth")
    save_file(state, path) if layout == "timm" else torch.save(state, path)
    encoder = build(path)
    assert (encoder.num_tokens, encoder.num_prefix_tokens) == (17, 1)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}  # from a file in fp16
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), second_last(clip, pixels), rtol=1e-5, atol=1e-5)


def test_at_another_size_the_positions_are_those_lavis_interpolates(clip, published, tmp_path):
    torch.save(published, tmp_path / "x.pth")
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    expected = second_last(clip, pixels, interpolate_pos_encoding=True)  # bicubic without antialiasing
    with torch.no_grad():
        got = build(tmp_path / "x.pth", image_size=48)(pixels)
    assert got.shape == (2, 37, 32)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_conversion_keeps_its_input_and_other_names(published):
    before = dict(published)
    out = openai_to_timm(published)
    assert published.keys() == before.keys() and all(published[k] is before[k] for k in before)
    assert openai_to_timm(out) == out
    assert out["blocks.2.attn.qkv.weight"] is published["transformer.resblocks.2.attn.in_proj_weight"]


def test_a_file_without_positions_is_another_models(published, tmp_path):
    torch.save({k: v for k, v in published.items() if k != "positional_embedding"}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="these are another model's weights"):
        build(tmp_path / "x.pth")


def test_weights_of_other_sizes_are_named(published, tmp_path):
    torch.save(published, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"cls_token has shape \(1, 1, 32\)"):
        build(tmp_path / "x.pth", embed_dim=48)


def test_without_the_weights_the_address_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path))
    assert "LAVIS/models/BLIP2/clip_vit_L.pth" in registry.get_vision_encoder_class("clip_L").missing(True)


def test_it_has_the_published_size():
    with torch.device("meta"):
        encoder = registry.get_vision_encoder_class("clip_L")("clip_L", pretrained=False)
    assert (encoder.embed_dim, encoder.num_tokens, encoder.num_prefix_tokens) == (1024, 257, 1)
    assert len(encoder.trunk.blocks) == 23
    assert not any(k.startswith("norm.") for k in encoder.trunk.state_dict())
    # 23 blocks of 12 C^2 + 13 C, patches without bias, class token, 257 positions, one norm
    assert sum(p.numel() for p in encoder.parameters()) == 23 * (12 * 1024**2 + 13 * 1024) + 1024 * (
        3 * 14 * 14 + 1 + 257 + 2
    )
    assert [round(m, 4) for m in encoder.image_mean] == [0.4815, 0.4578, 0.4082]
