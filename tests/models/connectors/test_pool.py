"""The pooling connector: means of patches by place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import new_connector

from evlgen.common.errors import ConfigError
from evlgen.models.connectors import Pool


def pool(side: int, prefix: int = 1, **changes) -> Pool:
    torch.manual_seed(0)
    return new_connector(
        Pool, 12, 20, num_tokens=side * side + prefix, num_prefix_tokens=prefix, **changes
    ).double()


def slow_pool(connector: Pool, frame: torch.Tensor, prefix: int, side: int) -> torch.Tensor:
    """One image's tokens [N, C] -> what reaches the norm: for every window the mean of its patches, the
    window from floor(i side / grid) to ceil((i + 1) side / grid)."""
    rows = list(frame[:prefix]) if connector.keep_prefix else []
    bounds = [
        (i * side // connector.grid, -(-(i + 1) * side // connector.grid)) for i in range(connector.grid)
    ]
    for top, bottom in bounds:
        for left, right in bounds:
            members = [frame[prefix + y * side + x] for y in range(top, bottom) for x in range(left, right)]
            rows.append(torch.stack(members).mean(0))
    return torch.stack(rows)


@pytest.mark.parametrize(("side", "grid"), [(6, 1), (6, 3), (6, 6), (7, 3)])
@pytest.mark.parametrize(("prefix", "keep"), [(1, False), (1, True), (0, False), (5, True)])
@pytest.mark.parametrize("frames", [1, 3])
def test_equals_the_means_over_windows(side, grid, prefix, keep, frames):
    connector = pool(side, prefix, grid=grid, keep_prefix=keep)
    count = side * side + prefix
    x = torch.randn(2, frames * count, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.stack(
        [
            torch.cat([slow_pool(connector, frame, prefix, side) for frame in video.split(count)])
            for video in x
        ]
    )
    got = connector(x)
    torch.testing.assert_close(got, connector.proj(F.layer_norm(expected, [12])))
    assert got.shape[1] == connector.num_soft_prompts(frames * count)


def test_without_an_images_count_any_square_will_do():
    connector = new_connector(Pool, 12, 20, grid=2)
    assert connector(torch.randn(1, 26, 12)).shape == (1, 4, 20)
    assert connector(torch.randn(1, 10, 12)).shape == (1, 4, 20)


def test_soft_prompts_start_at_the_scale_of_the_word_embeddings_though_means_are_small():
    torch.manual_seed(0)
    connector = new_connector(Pool, 128, 256, num_tokens=257, embedding_rms=0.03, grid=2)
    prompts = connector(torch.randn(8, 257, 128))
    assert prompts.square().mean().sqrt().item() == pytest.approx(0.03, rel=0.15)


@pytest.mark.parametrize("tokens", [1, 40])
def test_tokens_that_are_no_square_grid_are_named(tokens):
    named = f"square grid, and {tokens} visual tokens, 1 before the patches, hold none"
    with pytest.raises(ConfigError, match=named):
        new_connector(Pool, 12, 20, num_tokens=tokens)
    with pytest.raises(ConfigError, match=named):
        pool(6)(torch.randn(1, tokens, 12).double())


def test_a_grid_finer_than_the_patches_is_named():
    with pytest.raises(ConfigError, match="model.connector.grid 7 is finer than .* 6 x 6"):
        pool(6, grid=7)


def test_absurd_sizes_are_named_before_anything_is_made():
    with pytest.raises(ConfigError, match="model.connector: as configured"):
        pool(6, grid=2, hidden_size=10**9, num_layers=3)
