"""Tokens that merge inside a frozen encoder, against a slow version in which a merged token is counted once
for every token it stands for."""

from __future__ import annotations

import copy

import pytest
import torch
from omegaconf import OmegaConf
from reference import plain_matching
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor

from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.config.config import load_model_file
from evlgen.config.model_config import TemporalConfig, VisionConfig
from evlgen.models.token_merging import merge_mean
from evlgen.models.vision import build_vision_encoder

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8}
ENCODERS = {
    "ViT": {"name": "vit_tiny_patch16_224", "kwargs": SMALL},
    "ViT, norms of queries and keys": {
        "name": "vit_tiny_patch16_224",
        "kwargs": {**SMALL, "qk_norm": True, "init_values": 0.5},
    },
    "CLIP": {"name": "vit_base_patch32_clip_quickgelu_224", "kwargs": SMALL},
    "SigLIP": {"name": "vit_base_patch16_siglip_224", "kwargs": SMALL},
    "DINOv2": {"name": "vit_small_patch14_reg4_dinov2", "kwargs": {**SMALL, "init_values": 0.5}},
    "EVA": {"name": "eva_clip_g", "kwargs": {**SMALL, "init_values": 0.5}},
}


def build(tome_r: int, name: str = "ViT", **changes):
    """An encoder of 16 patches, none of its weights at its start value."""
    torch.manual_seed(0)
    section = {**ENCODERS[name], "image_size": 32, "pretrained": False, "precision": "fp32", **changes}
    encoder = build_vision_encoder(VisionConfig(tome_r=tome_r, **section)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return encoder


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def slow_forward(encoder, image: Tensor, r: int) -> tuple[Tensor, list[list[int]]]:
    """One image [3, H, W] through an encoder without merging, merging by plain loops -> tokens [M, C] and
    which of the first tokens each stands for."""
    trunk = encoder.trunk
    embedded = trunk._pos_embed(trunk.patch_embed(image[None]))
    x = trunk.norm_pre(embedded[0] if isinstance(embedded, tuple) else embedded)[0]  # [N, C]
    groups = [[i] for i in range(len(x))]
    for block in trunk.blocks:
        attended, keys = slow_attention(block.attn, block.norm1(x), [len(group) for group in groups])
        x = x + slow_scale(block, 1) * attended
        metric = torch.stack(keys).mean(0)[None]
        merged, merged_groups = [], []
        for members in plain_matching(metric, r, encoder.num_prefix_tokens > 0)[0]:
            members = sorted(members)
            sizes = torch.tensor([len(groups[i]) for i in members], dtype=x.dtype)
            merged.append((sizes[:, None] * x[members]).sum(0) / sizes.sum())
            merged_groups.append([first for i in members for first in groups[i]])
        x, groups = torch.stack(merged), merged_groups
        x = x + slow_scale(block, 2) * block.mlp(block.norm2(x))
    return trunk.norm(x), groups


def slow_attention(attn, x: Tensor, sizes: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Attention in which a token of size s stands s times among the keys and values."""
    bias = attn.qkv.bias
    if getattr(attn, "q_bias", None) is not None:
        bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    width = x.shape[1]
    queries, keys, values = torch.nn.functional.linear(x, attn.qkv.weight, bias).split(width, dim=1)
    index = [i for i, size in enumerate(sizes) for _ in range(size)]
    d = width // attn.num_heads
    out, kept = [], []
    for head in range(attn.num_heads):
        of_head = slice(head * d, (head + 1) * d)
        query, key = attn.q_norm(queries[:, of_head]), attn.k_norm(keys[:, of_head])
        weights = (query @ key[index].T / d**0.5).softmax(-1)
        out.append(weights @ values[:, of_head][index])
        kept.append(key)
    return attn.proj(torch.cat(out, dim=1)), kept


def slow_scale(block, number: int) -> Tensor | float:
    if isinstance(block, EvaBlock):
        scale = getattr(block, f"gamma_{number}")
    else:
        scale = getattr(getattr(block, f"ls{number}"), "gamma", None)
    return 1.0 if scale is None else scale


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("r", [1, 3, 50])
def test_it_is_the_slow_version(name, r, pixels):
    encoder, plain = build(r, name), build(0, name)
    details = encoder.forward_details(pixels)
    assert details["tokens"].shape == (3, encoder.num_tokens, 24)
    torch.testing.assert_close(details["tokens"], encoder(pixels))
    for image, tokens, merge_map in zip(pixels, details["tokens"], details["merge_map"], strict=True):
        expected, groups = slow_forward(plain, image, r)
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
        found = [[i for i, to in enumerate(merge_map.tolist()) if to == out] for out in range(len(groups))]
        assert found == [sorted(group) for group in groups]


@pytest.mark.parametrize("name", ["ViT", "EVA"])
def test_with_nothing_to_merge_it_is_the_encoder_without(name, pixels):
    plain = build(0, name)
    assert plain.merging is None
    assert {type(block) for block in plain.trunk.blocks} <= {Block, EvaBlock}
    assert not any(block.attn.k_norm._forward_hooks for block in plain.trunk.blocks)
    switched = copy.deepcopy(plain)
    switched.merge_tokens(0)
    assert torch.equal(switched(pixels), plain(pixels))
    identity = torch.arange(17).expand(3, -1)
    for encoder in (plain, switched):
        assert torch.equal(encoder.forward_details(pixels)["merge_map"], identity)
    assert encoder.num_tokens == plain.num_tokens == 17


def test_weights_keep_their_names():
    assert build(2).state_dict().keys() == build(0).state_dict().keys()


def test_copies_do_not_share_their_state(pixels):
    encoder = build(2)
    copied = copy.deepcopy(encoder)
    expected = encoder(pixels)
    encoder.merging.start()
    assert torch.equal(copied(pixels), expected)
    assert encoder.merging.merge_map is None and copied.merging.merge_map is not None


def test_batches_of_other_sizes_follow_each_other(pixels):
    encoder = build(2)
    alone = encoder(pixels[:1])
    encoder(pixels)
    torch.testing.assert_close(encoder(pixels[:1]), alone)


@pytest.mark.parametrize(("name", "tokens", "prefix"), [("ViT", 11, 1), ("SigLIP", 10, 0), ("DINOv2", 15, 1)])
def test_the_number_of_tokens_follows(name, tokens, prefix):
    encoder = build(2, name)
    assert (encoder.num_tokens, encoder.num_prefix_tokens) == (tokens, prefix)


def test_the_class_token_stands_alone(pixels):
    merge_map = build(50).forward_details(pixels)["merge_map"]
    assert (merge_map[:, 0] == 0).all() and (merge_map[:, 1:] > 0).all()


def test_in_bf16_it_is_near_float32(pixels):
    encoder = build(2)
    half = copy.deepcopy(encoder).bfloat16()
    got = half(pixels.bfloat16())
    assert got.dtype == torch.bfloat16
    # matches may differ where they are close: the mean of all tokens hardly depends on them
    torch.testing.assert_close(got.float().mean(1), encoder(pixels).mean(1), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_alike_patches_merge_first(seed):
    """Two halves of one colour each: with the positions off, what merges has the same colour. Which of them
    merge is for rounding to say, here noise: so in one block, whose two sets have both colours, in whatever
    order."""
    encoder = build(7, kwargs={**SMALL, "depth": 1})
    encoder.trunk.pos_embed.zero_()
    image = torch.ones(1, 3, 32, 32)
    image[..., 16:] = -1.0
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    merge_map = encoder.forward_details(image + 1e-6 * noise)["merge_map"][0, 1:].view(4, 4)
    assert not set(merge_map[:, :2].flatten().tolist()) & set(merge_map[:, 2:].flatten().tolist())
    colours = merge_mean(
        image[:, :1, ::8, ::8].flatten(2).transpose(1, 2), (merge_map - 1).flatten()[None], 9
    )
    assert set(colours.flatten().tolist()) == {1.0, -1.0}


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"name": "eva02_tiny_patch14_224", "kwargs": SMALL}, "rotary positions"),
        ({"name": "resnet18"}, "not those of a plain vision transformer"),
        ({"name": "swin_tiny_patch4_window7_224"}, "not those of a plain vision transformer"),
        ({"name": "vit_small_plus_patch16_dinov3", "kwargs": SMALL}, "rotary positions"),
        ({"freeze": False}, "model.vision.freeze is false"),
        ({"temporal": TemporalConfig("average")}, "temporal form 'average'"),
    ],
)
def test_where_it_does_not_fit_the_remedy_is_named(section, problem):
    section = {**ENCODERS["ViT"], **section}
    if section["name"] == "resnet18" or section["name"].startswith("swin"):
        section["kwargs"] = {}
    temporal = section.get("temporal")
    with pytest.raises(ConfigError, match=rf"model\.vision\.tome_r.*{problem}.*[Ss]et (it|tome_r) to 0"):
        build_vision_encoder(
            VisionConfig(image_size=32, pretrained=False, tome_r=2, **section),
            temporal=temporal.form if temporal else None,
        )


@pytest.mark.parametrize("tome_r", [0, 2])
def test_a_whole_model_trains_on_what_is_left(golden, tome_r):
    cfg = load_model_file(golden / "evlgen_opt" / "model.yaml")
    cfg.vision.tome_r = tome_r
    model = registry.get_model_class("evlgen_opt").from_config(cfg).train()
    image = torch.randn(2, 3, 56, 56)
    assert model.encode(image).shape == (2, 17 - 3 * tome_r, 48)
    model({"image": image, "text_input": ["a cat", "a dog"]})["loss"].backward()
    assert model.connector.proj_in.weight.grad.isfinite().all()
    assert OmegaConf.create({"r": model.cfg.vision.tome_r}).r == tome_r
