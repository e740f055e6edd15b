"""The linear and the MLP connector: their numbers, starts and frames."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import new_connector

from evlgen.common.errors import ConfigError
from evlgen.models.connectors import LinearProjection, MLPProjection
from evlgen.models.connectors.projection import count_frames

PARTS = {"vision_dim": 24, "language_dim": 40, "num_tokens": 17, "num_prefix_tokens": 1}


def tokens(*shape: int) -> torch.Tensor:
    """Visual tokens as ``ln_vision`` gives them."""
    return F.layer_norm(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), shape[-1:])


def test_linear_is_one_product():
    connector, x = new_connector(LinearProjection, **PARTS), tokens(2, 17, 24)
    layer = connector.proj[0]
    torch.testing.assert_close(connector(x), x @ layer.weight.T + layer.bias)
    assert [n for n, _ in connector.named_parameters()] == ["proj.0.weight", "proj.0.bias"]


def test_mlp_is_two_products_with_a_gelu_between_as_wide_as_the_word_embeddings():
    connector, x = new_connector(MLPProjection, **PARTS), tokens(2, 17, 24)
    first, _, second = connector.proj
    assert first.weight.shape == (40, 24) and second.weight.shape == (40, 40)
    hidden = x @ first.weight.T + first.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(connector(x), hidden @ second.weight.T + second.bias)


def test_mlp_of_any_depth_and_width():
    connector = new_connector(MLPProjection, **PARTS, num_layers=4, hidden_size=12)
    shapes = [tuple(p.shape) for n, p in connector.named_parameters() if n.endswith("weight")]
    assert shapes == [(12, 24), (12, 12), (12, 12), (40, 12)]
    assert connector(tokens(1, 5, 24)).shape == (1, 5, 40)
    single = new_connector(MLPProjection, **PARTS, num_layers=1)
    assert [tuple(p.shape) for p in single.parameters()] == [(40, 24), (40,)]


@pytest.mark.parametrize("changes", [{"num_layers": 1}, {}, {"num_layers": 5}, {"hidden_size": 512}])
def test_soft_prompts_start_at_the_scale_of_the_word_embeddings(changes):
    torch.manual_seed(0)
    parts = {"vision_dim": 256, "language_dim": 256, "embedding_rms": 0.03}
    prompts = new_connector(MLPProjection, **parts, **changes)(tokens(8, 33, 256))
    assert prompts.square().mean().sqrt().item() == pytest.approx(0.03, rel=0.1)


@pytest.mark.parametrize("kind", [LinearProjection, MLPProjection])
@pytest.mark.parametrize("frames", [1, 3])
def test_the_patches_alone_on_request_in_every_frame(kind, frames):
    connector = new_connector(kind, **{**PARTS, "num_prefix_tokens": 5}, keep_prefix=False)
    x = tokens(2, 17 * frames, 24)
    expected = torch.cat([connector.proj(x[:, 17 * t + 5 : 17 * (t + 1)]) for t in range(frames)], dim=1)
    torch.testing.assert_close(connector(x), expected)
    assert connector.num_soft_prompts(17 * frames) == 12 * frames == expected.shape[1]
    assert new_connector(kind, **PARTS).num_soft_prompts(17 * frames) == 17 * frames


def test_frames_are_counted_where_tokens_are_a_multiple_of_one_images():
    assert [count_frames(n, 17) for n in (17, 34, 35, 16)] == [1, 2, 1, 1]
    assert count_frames(34, None) == 1


def test_absurd_sizes_are_named_before_anything_is_made():
    with pytest.raises(ConfigError, match="model.connector: as configured it has .* weights"):
        new_connector(MLPProjection, **PARTS, hidden_size=10**9, num_layers=3)
