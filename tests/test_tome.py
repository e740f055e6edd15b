"""`evlgen.tome.patch`: token merging in a timm model of one's own."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import evlgen
from evlgen.common.errors import ConfigError
from evlgen.config.model_config import VisionConfig
from evlgen.models.vision import build_vision_encoder

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8}
MODELS = {
    "ViT": ("vit_tiny_patch16_224", SMALL),
    "CLIP": ("vit_base_patch32_clip_quickgelu_224", SMALL),
    "SigLIP": ("vit_base_patch16_siglip_224", SMALL),
    "DINOv2": ("vit_small_patch14_reg4_dinov2", SMALL),
    "EVA": ("eva_giant_patch14_clip_224", SMALL),
}


def create(name: str = "vit_tiny_patch16_224", **changes) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, img_size=32, **{**SMALL, **changes}).eval()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model", MODELS)
def test_it_is_what_tome_r_makes_of_the_encoder(model, pixels):
    name, kwargs = MODELS[model]
    cfg = VisionConfig(name, image_size=32, pretrained=False, precision="fp32", tome_r=3, kwargs=kwargs)
    encoder = build_vision_encoder(cfg).eval()
    vit = create(name)
    vit.load_state_dict(encoder.trunk.state_dict(), strict=False)  # a head is timm's only
    plain = vit.forward_features(pixels)
    names = set(vit.state_dict())
    assert evlgen.tome.patch(vit, r=3) is vit
    for _ in range(2):  # nothing is left of the forward pass before
        tokens = vit.forward_features(pixels)
        assert torch.equal(tokens, encoder(pixels))
    assert tokens.shape == (3, encoder.num_tokens, 24) and tokens.shape[1] == plain.shape[1] - 9
    assert torch.equal(vit.blocks[0].merging.merge_map, encoder.merging.merge_map)
    assert vit(pixels).shape == (3, vit.num_classes or 24)
    assert set(vit.state_dict()) == names


def test_r_is_changed_by_another_call_and_0_merges_nothing(pixels):
    vit = create()
    expected = vit(pixels)
    assert evlgen.tome.patch(vit, 4).forward_features(pixels).shape == (3, 5, 24)
    assert evlgen.tome.patch(vit, 1).forward_features(pixels).shape == (3, 14, 24)
    torch.testing.assert_close(evlgen.tome.patch(vit, 0)(pixels), expected)


def test_copies_do_not_share_their_state(pixels):
    vit = evlgen.tome.patch(create(), 2)
    copied = copy.deepcopy(vit)
    expected = vit(pixels)
    assert torch.equal(copied(pixels[:1])[0], vit(pixels[:1])[0])
    assert torch.equal(vit(pixels), expected)
    assert evlgen.tome.patch(copied, 4).blocks[0].merging is not vit.blocks[0].merging


def test_it_can_be_trained_and_drops_paths_as_before(pixels):
    vit = evlgen.tome.patch(create(drop_path_rate=0.5), 2).train()
    torch.manual_seed(0)
    first, second = vit(pixels), vit(pixels)
    assert not torch.equal(first, second)
    second.sum().backward()
    assert all(p.grad.isfinite().all() for p in vit.parameters())


@pytest.mark.parametrize("r", [-1, 2.5, "8", None, True])
def test_an_impossible_r_is_named(r):
    with pytest.raises(ConfigError, match=r"r must be a whole number of at least 0"):
        evlgen.tome.patch(create(), r)


@pytest.mark.parametrize(
    ("name", "kwargs", "problem"),
    [
        ("resnet18", None, "ResNet here are not those of a plain vision transformer"),
        ("eva02_tiny_patch14_224", {}, "rotary positions"),
        ("deit_tiny_distilled_patch16_224", {}, "distillation token"),
        ("vit_small_patch14_reg4_dinov2", {"global_pool": "avg"}, "global_pool='token'"),
    ],
)
def test_where_it_does_not_fit_the_reason_is_named(name, kwargs, problem):
    vit = timm.create_model(name) if kwargs is None else create(name, **kwargs)
    with pytest.raises(ConfigError, match=rf"evlgen\.tome\.patch: .*{problem}"):
        evlgen.tome.patch(vit, 2)


def test_activations_are_not_recomputed(pixels):
    vit = create()
    vit.set_grad_checkpointing()
    with pytest.raises(ConfigError, match=r"set_grad_checkpointing\(False\)"):
        evlgen.tome.patch(vit, 2)
    vit.set_grad_checkpointing(False)
    evlgen.tome.patch(vit, 2).set_grad_checkpointing()
    with pytest.raises(RuntimeError):
        vit.train()(pixels).sum().backward()


def test_masks_are_refused(pixels):
    vit = evlgen.tome.patch(create(), 2)
    with pytest.raises(ConfigError, match="attention is masked"):
        vit(pixels, is_causal=True)
