"""timm's convolutional nets as vision encoders: their feature maps are the tokens."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from evlgen.common.errors import CheckpointError, ConfigError
from evlgen.models.vision import TimmEncoder, vision_encoder_class
from evlgen.models.vision.efficientnet import efficientnet_to_timm

NETS = ["tf_efficientnet_lite0", "convnext_atto", "mobilenetv4_conv_small"]
SIDE = 64


@pytest.fixture(scope="module", params=NETS)
def whole(request):
    """timm's model with its head."""
    torch.manual_seed(0)
    return request.param, timm.create_model(request.param, num_classes=5).eval()


def pixels(batch=2):
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def load(whole, tmp_path, **kwargs) -> TimmEncoder:
    name, model = whole
    save_file(model.state_dict(), tmp_path / "whole.safetensors")
    return TimmEncoder(name, SIDE, str(tmp_path / "whole.safetensors"), kwargs=kwargs).eval()


@torch.no_grad()
def test_tokens_are_the_places_of_the_last_feature_map_row_by_row(whole, tmp_path):
    encoder = load(whole, tmp_path)
    features = whole[1].forward_features(pixels())  # [B, C, h, w]
    tokens = encoder(pixels())
    assert encoder.grid_size == (2, 2) and encoder.num_prefix_tokens == 0
    assert tokens.shape == (2, encoder.num_tokens, encoder.embed_dim) == (2, 4, features.shape[1])
    for row in range(2):
        for column in range(2):
            expected = features[:, :, row, column]
            torch.testing.assert_close(tokens[:, 2 * row + column], expected, atol=1e-4, rtol=1e-4)
    config = timm.get_pretrained_cfg(whole[0])
    assert (encoder.image_mean, encoder.image_std) == (config.mean, config.std)
    assert vision_encoder_class(whole[0]).normalisation(whole[0])["mean"] == list(config.mean)


@pytest.mark.parametrize("level", [[-2], 1])
@torch.no_grad()
def test_another_level_is_read_and_what_comes_after_it_goes(whole, tmp_path, level):
    encoder = load(whole, tmp_path, out_indices=level)
    levels = whole[1].forward_intermediates(pixels(), intermediates_only=True)
    features = levels[level if isinstance(level, int) else level[0]]
    torch.testing.assert_close(encoder(pixels()), features.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)
    assert encoder.embed_dim == features.shape[1] and encoder.grid_size == tuple(features.shape[2:])
    count = sum(p.numel() for p in encoder.parameters())
    assert count < sum(p.numel() for p in load(whole, tmp_path).parameters())


def test_every_weight_that_is_kept_is_used(whole):
    encoder = TimmEncoder(whole[0], SIDE, pretrained=False)
    encoder(pixels()).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("level", [9, "last", [0, 1], True])
def test_a_level_that_is_not_there_is_named(level):
    with pytest.raises(ConfigError, match=r"out_indices: .* is not one number from -4 to 3, the levels of"):
        TimmEncoder("convnext_atto", SIDE, pretrained=False, kwargs={"out_indices": level})


def test_a_transformer_has_no_levels():
    with pytest.raises(ConfigError, match="out_indices: vit_tiny_patch16_224 has no levels.*kwargs.depth"):
        TimmEncoder("vit_tiny_patch16_224", SIDE, pretrained=False, kwargs={"out_indices": 1})


def published(model, expands) -> dict[str, torch.Tensor]:
    """The weights of timm's EfficientNet under the names of efficientnet_pytorch, whose order is the same."""
    names = [f"_conv_stem.{k}" for k in ("weight",)] + _norm("_bn0")
    for number, has_expansion in enumerate(expands):
        block = f"_blocks.{number}"
        if has_expansion:
            names += [f"{block}._expand_conv.weight", *_norm(f"{block}._bn0")]
        names += [f"{block}._depthwise_conv.weight", *_norm(f"{block}._bn1")]
        names += [f"{block}._project_conv.weight", *_norm(f"{block}._bn2")]
    names += ["_conv_head.weight", *_norm("_bn1"), "_fc.weight", "_fc.bias"]
    return dict(zip(names, model.state_dict().values(), strict=True))


def _norm(name: str) -> list[str]:
    return [
        f"{name}.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]


def test_weights_of_efficientnet_pytorch_are_read(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(0.01 * torch.rand_like(value))
    expands = [hasattr(block, "conv_pwl") for stage in model.blocks for block in stage]
    assert expands.count(False) == 1
    state = published(model, expands)
    assert set(efficientnet_to_timm(state, model)) == set(model.state_dict())
    torch.save(state, tmp_path / "efficientnet-lite0.pth")
    encoder = TimmEncoder("tf_efficientnet_lite0", SIDE, str(tmp_path / "efficientnet-lite0.pth")).eval()
    with torch.no_grad():
        expected = model.forward_features(pixels()).flatten(2).transpose(1, 2)
        torch.testing.assert_close(encoder(pixels()), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(CheckpointError, match="another model's weights|has shape"):
        TimmEncoder("tf_efficientnet_lite1", SIDE, str(tmp_path / "efficientnet-lite0.pth"))
