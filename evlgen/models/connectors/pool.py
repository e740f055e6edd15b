"""Average pooling: the patches of a coarse grid, each the mean of the patches under it, then an MLP.

The simplest way to fewer tokens: what merges is decided by place alone, where a TomeFormer goes by content.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.common.schema import PositiveInt
from evlgen.models.connectors.base import Connector
from evlgen.models.connectors.projection import count_frames, projection


@functools.cache
def _windows(side: int, grid: int) -> Tensor:
    """The matrix [grid^2, side^2] of means over the windows of a grid. A product with it has a gradient that
    is the same every time, which torch's own pooling has not on a GPU."""
    each = torch.eye(side * side).view(1, -1, side, side)
    return F.adaptive_avg_pool2d(each, grid).flatten(2)[0].T


@registry.register_connector("pool")
class Pool(Connector):
    """Means of the patches over a ``grid`` x ``grid`` grid, a LayerNorm and an MLP.

    A mean of tokens is smaller than the tokens: the LayerNorm gives the MLP inputs of the scale its start
    counts on. Where the grid does not divide the patches' side, neighbouring windows overlap by a row. Frames
    in a row (N a multiple of ``num_tokens``) are pooled one by one.

    Args:
        vision_dim: channels of the visual tokens.
        language_dim: channels of the word embeddings.
        num_tokens: visual tokens of one image; None: any square number of patches, and no frames in a row.
        num_prefix_tokens: of these, how many stand before the patches.
        embedding_rms: the scale soft prompts start at; None keeps PyTorch's initialisation.
        grid: side of the grid.
        keep_prefix: keep what stands before the patches (class token, registers), in front of the grid.
        num_layers: linear layers of the MLP.
        hidden_size: channels between them; None: the word embeddings'.

    Raises:
        ConfigError: patches that are no square grid, or a smaller one than ``grid``; more weights than this
            machine has memory for.
    """

    def __init__(
        self,
        vision_dim: int,
        language_dim: int,
        num_tokens: int | None = None,
        num_prefix_tokens: int = 1,
        embedding_rms: float | None = None,
        grid: PositiveInt = 4,
        keep_prefix: bool = False,
        num_layers: PositiveInt = 2,
        hidden_size: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.num_prefix_tokens = num_prefix_tokens
        self.grid = grid
        self.keep_prefix = keep_prefix
        if num_tokens is not None:
            self._layout(num_tokens)
        self.norm = nn.LayerNorm(vision_dim)
        self.proj = projection(
            vision_dim, language_dim, num_layers, hidden_size or language_dim, embedding_rms
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, vision_dim] -> soft prompts [B, M, language_dim]."""
        frames, side = self._layout(tokens.shape[1])
        tokens = tokens.unflatten(1, (frames, -1)).flatten(0, 1)  # [B * T, n, C]
        prefix, patches = tokens.tensor_split([self.num_prefix_tokens], dim=1)
        pooled = _windows(side, self.grid).to(patches) @ patches  # [B * T, grid^2, C]
        if self.keep_prefix:
            pooled = torch.cat([prefix, pooled], dim=1)
        return self.proj(self.norm(pooled.unflatten(0, (-1, frames)).flatten(1, 2)))

    def num_soft_prompts(self, num_tokens: int) -> int:
        """M for N visual tokens."""
        frames, _ = self._layout(num_tokens)
        return frames * (self.grid**2 + (self.num_prefix_tokens if self.keep_prefix else 0))

    def _layout(self, num_tokens: int) -> tuple[int, int]:
        """The frames that stand in a row, and the side of each one's grid of patches."""
        frames = count_frames(num_tokens, self.num_tokens)
        patches = num_tokens // frames - self.num_prefix_tokens
        side = math.isqrt(max(0, patches))
        if side == 0 or side * side != patches:
            raise ConfigError(
                f"model.connector: pool needs patches in a square grid, and {num_tokens} visual tokens, "
                f"{self.num_prefix_tokens} before the patches, hold none. Use square pictures, an encoder "
                "that keeps all patches (model.vision.tome_r: 0), or another connector."
            )
        if self.grid > side:
            raise ConfigError(
                f"model.connector.grid {self.grid} is finer than the vision encoder's {side} x {side} "
                f"patches: {side} is the most."
            )
        return frames, side
