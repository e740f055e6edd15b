"""Families of timm models as vision encoders, against timm's own models with the same weights."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from evlgen.assemble import check_image_sizes
from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.config.config import Config, load_model_file
from evlgen.models.vision import TimmEncoder, vision_encoder_class


class Family(NamedTuple):
    name: str
    patch: int
    prefix: int  # class token and registers
    mean: float  # of the first channel


FAMILIES = [
    Family("vit_tiny_patch16_224", 16, 1, 0.5),
    Family("vit_base_patch32_clip_quickgelu_224.openai", 32, 1, 0.4815),
    Family("eva02_tiny_patch14_224", 14, 1, 0.4815),
    Family("vit_base_patch16_siglip_224", 16, 0, 0.5),
    Family("vit_small_patch14_reg4_dinov2", 14, 5, 0.485),
]
SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(params=FAMILIES, ids=[family.name for family in FAMILIES])
def family(request) -> Family:
    return request.param


@pytest.fixture
def whole(family):
    """timm's model with its head, for 4 x 4 patches, none of its weights at its start value."""
    model = timm.create_model(family.name, img_size=4 * family.patch, num_classes=5, **SMALL).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def images(side: int) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("grid", [4, 6])
@torch.no_grad()
def test_its_tokens_are_those_of_timms_model_at_each_size(family, whole, tmp_path, grid):
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    side = grid * family.patch
    if grid != 4:
        whole.set_input_size(img_size=(side, side))  # timm's way to another size
    encoder = TimmEncoder(family.name, side, str(tmp_path / "whole.safetensors"), kwargs=SMALL).eval()
    assert (encoder.num_tokens, encoder.num_prefix_tokens) == (grid**2 + family.prefix, family.prefix)
    assert encoder.embed_dim == 48
    expected = whole.forward_features(images(side))
    assert expected.shape == (2, encoder.num_tokens, 48)
    torch.testing.assert_close(encoder(images(side)), expected)


def test_what_comes_after_the_tokens_is_not_kept(family):
    encoder = TimmEncoder(family.name, 4 * family.patch, pretrained=False, kwargs=SMALL)
    encoder(images(4 * family.patch)).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def build(golden, family: Family, **vision):
    cfg = load_model_file(golden / "evlgen_opt" / "model.yaml")
    cfg.vision.kwargs = {}
    changes = {
        "name": family.name,
        "image_size": 4 * family.patch,
        "pretrained": False,
        "kwargs": SMALL,
        **vision,
    }
    merged = OmegaConf.merge(cfg, {"vision": changes, "checkpoint": None})
    merged.vision.kwargs = changes["kwargs"]  # instead of the golden model's
    return registry.get_model_class("evlgen_opt").from_config(merged)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_trains_a_tomeformer_end_to_end(family, golden, precision):
    model = build(golden, family, precision=precision).train()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {p.dtype for p in model.vision.parameters()} == {dtype}
    assert not any(p.requires_grad for p in model.vision.parameters())
    assert not any(module.training for module in model.vision.modules())
    image = images(4 * family.patch)
    assert model.encode(image).dtype == dtype
    assert model.connector.num_protected == min(family.prefix, 1)
    tokens, protected = 16 + family.prefix, min(family.prefix, 1)
    for _ in range(3):  # layers, r = 3
        tokens -= min(3, (tokens - protected) // 2)
    assert model.soft_prompts({"image": image}).shape == (2, tokens, 64)
    model({"image": image, "text_input": ["a cat", "a dog"]})["loss"].backward()
    assert model.connector.proj_in.weight.grad.isfinite().all()
    assert all(p.grad is None for p in model.vision.parameters())
    before = model.encode(image)
    assert torch.equal(before, model.encode(image))


def test_a_class_token_is_protected_and_without_one_every_token_may_merge(golden):
    image = images(64)
    merged = []
    for family in FAMILIES:
        if family.patch == 16:
            torch.manual_seed(0)
            model = build(golden, family)
            # all tokens of the batch alike but for noise: position 0 merges where nothing protects it
            tokens = torch.ones(64, model.vision.num_tokens, 48) + 0.1 * torch.randn(64, 1, 48)
            maps = model.connector.forward_details(tokens + 0.01 * torch.randn_like(tokens))["merge_map"]
            alone = (maps == maps[:, :1]).sum(1) == 1
            merged.append((family.prefix, bool((~alone).any())))
            assert model.soft_prompts({"image": image}).isfinite().all()
    assert merged == [(1, False), (0, True)]


def config(tmp_path, name: str, **processor) -> Config:
    options = {
        "model": {"arch": "evlgen_opt", "model_type": "shapes", "vision": {"name": name, "image_size": 64}},
        "datasets": {
            "shapes_caption": {
                "vis_processor": {
                    "train": {"name": "blip2_image_train"},
                    "eval": {"name": "blip_image_eval", **processor},
                }
            }
        },
        "run": {"task": "captioning", "max_epoch": 1},
    }
    OmegaConf.save(OmegaConf.create(options), tmp_path / "project.yaml")
    cfg = Config.load(tmp_path / "project.yaml")
    check_image_sizes(cfg)
    return cfg.datasets.shapes_caption.vis_processor


def test_mean_and_std_of_the_family_reach_the_processors(family, tmp_path):
    processors = config(tmp_path, family.name)
    data = timm.get_pretrained_cfg(family.name)
    for role in ("train", "eval"):
        assert list(processors[role].mean) == list(data.mean)
        assert list(processors[role].std) == list(data.std)
    assert processors.train.mean[0] == pytest.approx(family.mean, abs=1e-4)


def test_a_mean_in_the_yaml_wins(tmp_path):
    processors = config(tmp_path, "vit_base_patch16_siglip_224", mean=[0.1, 0.2, 0.3])
    assert list(processors.eval.mean) == [0.1, 0.2, 0.3]
    assert list(processors.eval.std) == [0.5, 0.5, 0.5]
    assert list(processors.train.mean) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("name", ["eva_clip_g", "clip_L"])
def test_the_registered_encoders_say_clips_mean(name):
    found = vision_encoder_class(name).normalisation(name)
    assert [round(m, 4) for m in found["mean"]] == [0.4815, 0.4578, 0.4082]


def test_weights_that_timm_does_not_know_are_named_with_those_it_does():
    name = "vit_large_patch14_clip_quickgelu_336.openaii"
    assert vision_encoder_class(name).normalisation(name) == {}  # as of a model it does not know
    with pytest.raises(ConfigError, match=r"Did you mean 'vit_large_patch14_clip_quickgelu_336\.openai'"):
        TimmEncoder(name, pretrained=False)


@torch.no_grad()
def test_weights_in_their_authors_layout_are_converted(tmp_path):
    """DINOv2 with registers as Meta publishes it: other names, and positions that count the class token."""
    whole = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, num_classes=0, **SMALL).eval()
    torch.nn.init.normal_(whole.cls_token)  # of a size that survives the subtraction
    state = {k: v.clone() for k, v in whole.state_dict().items()}
    class_position = torch.randn(1, 1, 48)
    state["register_tokens"] = state.pop("reg_token")
    state["cls_token"] -= class_position
    state["pos_embed"] = torch.cat([class_position, state["pos_embed"]], dim=1)
    state["mask_token"] = torch.zeros(1, 48)
    torch.save(state, tmp_path / "meta.pth")
    encoder = TimmEncoder(
        "vit_small_patch14_reg4_dinov2", 56, str(tmp_path / "meta.pth"), kwargs=SMALL
    ).eval()
    torch.testing.assert_close(encoder(images(56)), whole.forward_features(images(56)))


@pytest.mark.parametrize(
    ("name", "kwargs", "size", "tokens", "prefix"),
    [
        ("efficientvit_m0", {}, 224, 16, 0),  # its patch size is one number
        ("mvitv2_tiny", {}, 64, 4, 0),  # prefix tokens by name, and patches that become fewer
        ("naflexvit_base_patch16_siglip", {"depth": 1}, 64, 16, 0),  # no layer of patches of its own
    ],
)
@torch.no_grad()
def test_transformers_of_other_kinds_are_measured(name, kwargs, size, tokens, prefix):
    encoder = TimmEncoder(name, image_size=size, pretrained=False, kwargs=kwargs).eval()
    found = encoder(images(size))
    assert found.shape == (2, encoder.num_tokens, encoder.embed_dim) == (2, tokens, found.shape[2])
    assert encoder.num_prefix_tokens == prefix


@pytest.mark.parametrize(
    ("name", "size", "cause"),
    [
        ("crossvit_tiny_240", 240, "neither a feature map nor one row of tokens"),
        ("halonet26t", 224, "AssertionError"),  # of windows that do not divide 7 x 7 places
    ],
)
def test_a_model_without_visual_tokens_is_named(name, size, cause):
    with torch.device("meta"), pytest.raises(ConfigError, match=f"'{name}' cannot be read .*{cause}"):
        TimmEncoder(name, image_size=size, pretrained=False)
