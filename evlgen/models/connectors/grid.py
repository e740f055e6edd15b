"""What connectors that go by the place of patches share: the square grid, and coarser grids of means."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from evlgen.common.errors import ConfigError
from evlgen.models.connectors.base import Connector, ConnectorInputs
from evlgen.models.connectors.projection import count_frames


class GridConnector(Connector):
    """A connector that reads the patches of an image as a square grid. Frames in a row (N a multiple of
    ``num_tokens``) are read one by one.

    A subclass defines `_read_grid` and `_grid_size`, and checks in its constructor with `_layout` that the
    encoder's patches suit it.

    Args:
        inputs: what it stands between; without ``num_tokens``: any square number of patches, and no frames in
            a row.
        keep_prefix: keep what stands before the patches (class token, registers), in front of the grid.
    """

    def __init__(self, inputs: ConnectorInputs, keep_prefix: bool) -> None:
        super().__init__()
        self.num_tokens = inputs.num_tokens
        self.num_prefix_tokens = inputs.num_prefix_tokens
        self.keep_prefix = keep_prefix

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, vision_dim] -> soft prompts [B, M, language_dim]."""
        frames, side = self._layout(tokens.shape[1])
        tokens = tokens.unflatten(1, (frames, -1)).flatten(0, 1)  # [B * T, n, C]
        prefix, patches = tokens.tensor_split([self.num_prefix_tokens], dim=1)
        prompts = self._read_grid(prefix if self.keep_prefix else None, patches, side)
        return prompts.unflatten(0, (-1, frames)).flatten(1, 2)

    def num_soft_prompts(self, num_tokens: int) -> int:
        """M for N visual tokens."""
        frames, side = self._layout(num_tokens)
        return frames * (self._grid_size(side) ** 2 + (self.num_prefix_tokens if self.keep_prefix else 0))

    def _read_grid(self, prefix: Tensor | None, patches: Tensor, side: int) -> Tensor:
        """What stands before the patches [B, P, vision_dim], where it is kept, and patches [B, side^2,
        vision_dim] -> soft prompts [B, P + M, language_dim]."""
        raise NotImplementedError(f"{type(self).__name__} must define _read_grid(prefix, patches, side)")

    def _grid_size(self, side: int) -> int:
        """The side of the grid of soft prompts, for patches of that side."""
        raise NotImplementedError(f"{type(self).__name__} must define _grid_size(side)")

    def _layout(self, num_tokens: int) -> tuple[int, int]:
        """The frames that stand in a row, and the side of each one's grid of patches."""
        frames = count_frames(num_tokens, self.num_tokens)
        patches = num_tokens // frames - self.num_prefix_tokens
        side = math.isqrt(max(0, patches))
        if side == 0 or side * side != patches:
            raise ConfigError(
                f"model.connector: {type(self).__name__} needs patches in a square grid, and {num_tokens} "
                f"visual tokens, {self.num_prefix_tokens} before the patches, hold none. Use square images, "
                "an encoder that keeps all patches (model.vision.tome_r: 0), or another connector."
            )
        return frames, side

    def _check_grid(self, grid: int, side: int) -> None:
        """Raises `ConfigError` for a coarser grid finer than the patches'."""
        if grid > side:
            raise ConfigError(
                f"model.connector.grid {grid} is finer than the vision encoder's {side} x {side} "
                f"patches: {side} is the most."
            )


@functools.cache
def grid_means(side: int, grid: int) -> Tensor:
    """The matrix [grid^2, side^2] of means over the windows of a grid. A product with it has a gradient that
    is the same every time, which torch's own pooling has not on a GPU."""
    each = torch.eye(side * side).view(1, -1, side, side)
    return F.adaptive_avg_pool2d(each, grid).flatten(2)[0].T
