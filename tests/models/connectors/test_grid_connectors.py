"""Connectors that go by the place of patches: space to depth and Honeybee's abstractor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import new_connector

from evlgen.common.errors import ConfigError
from evlgen.models.connectors import CAbstractor, PixelShuffle

PARTS = {"vision_dim": 6, "language_dim": 10}


def by_hand(frame: torch.Tensor, side: int, factor: int) -> torch.Tensor:
    """The patches [side^2, C] of one image -> squares [g^2, factor^2 C], in loops."""
    rows = []
    for top in range(0, side, factor):
        for left in range(0, side, factor):
            square = []
            for y in range(top, top + factor):
                for x in range(left, left + factor):
                    is_inside = y < side and x < side
                    square.append(frame[y * side + x] if is_inside else torch.zeros_like(frame[0]))
            rows.append(torch.cat(square))
    return torch.stack(rows)


@pytest.mark.parametrize(("side", "factor"), [(4, 2), (6, 3), (7, 2), (5, 1)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("frames", [1, 3])
def test_pixel_shuffle_puts_a_square_of_patches_into_one_vector(side, factor, prefix, frames):
    torch.manual_seed(0)
    count = side * side + prefix
    connector = new_connector(
        PixelShuffle, **PARTS, num_tokens=count, num_prefix_tokens=prefix, factor=factor
    )
    x = torch.randn(2, frames * count, 6)
    squares = [torch.cat([by_hand(frame[prefix:], side, factor) for frame in row.split(count)]) for row in x]
    got = connector(x)
    torch.testing.assert_close(got, connector.proj(torch.stack(squares)))
    assert got.shape == (2, connector.num_soft_prompts(frames * count), 10)


def test_a_factor_larger_than_the_grid_is_named():
    with pytest.raises(ConfigError, match="model.connector.factor 5 is larger than .* 4 x 4"):
        new_connector(PixelShuffle, **PARTS, num_tokens=17, factor=5)


def test_the_abstractor_convolves_pools_and_convolves():
    torch.manual_seed(0)
    connector = new_connector(CAbstractor, **PARTS, num_tokens=17, grid=2, depth=1, hidden_size=8).eval()
    x = torch.randn(3, 17, 6)
    image = (x[:, 1:] + connector.positions).view(3, 4, 4, 6).permute(0, 3, 1, 2)
    pooled = F.adaptive_avg_pool2d(connector.before(image), 2)
    out = connector.after(pooled).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(connector(x), connector.proj(connector.norm(out)))


def test_the_abstractor_is_of_the_papers_form():
    connector = new_connector(CAbstractor, **PARTS, num_tokens=17, grid=2, hidden_size=8)
    stages = (connector.before, connector.after)
    assert [len(list(stage.children())) for stage in stages] == [3, 3]
    depthwise = connector.after.b1.conv2.conv
    assert depthwise.groups == depthwise.in_channels == 8 and depthwise.kernel_size == (3, 3)
    assert isinstance(connector.after.b1.conv2.bn.act, torch.nn.SiLU)


def test_the_abstractor_goes_by_place():
    torch.manual_seed(0)
    connector = new_connector(
        CAbstractor, **PARTS, num_tokens=16, num_prefix_tokens=0, grid=2, depth=1, hidden_size=8
    )
    x = torch.randn(1, 16, 6)
    assert not torch.allclose(connector(x), connector(x.flip(1)).flip(1), atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_tokens": None}, "needs the number of visual tokens"),
        ({"num_tokens": 12}, "square grid"),
        ({"num_tokens": 17, "grid": 5}, "model.connector.grid 5 is finer"),
        ({"num_tokens": 17, "hidden_size": 10**9}, "model.connector: as configured"),
    ],
)
def test_what_the_abstractor_cannot_be_is_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        new_connector(CAbstractor, **PARTS, **settings)
