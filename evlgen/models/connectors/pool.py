"""Average pooling: the patches of a coarse grid, each the mean of the patches under it, then an MLP.

The simplest way to fewer tokens: what merges is decided by place alone, where a TomeFormer goes by content.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evlgen.common.registry import registry
from evlgen.config.schema import PositiveInt
from evlgen.models.connectors.base import ConnectorInputs
from evlgen.models.connectors.grid import GridConnector, grid_means
from evlgen.models.connectors.projection import projection


@registry.register_connector("pool")
class Pool(GridConnector):
    """Means of the patches over a ``grid`` x ``grid`` grid, a LayerNorm and an MLP.

    A mean of tokens is smaller than the tokens: the LayerNorm gives the MLP inputs of the scale its start
    counts on. Where the grid does not divide the patches' side, neighbouring windows overlap by a row.

    Args:
        inputs: what it stands between, see `ConnectorInputs`.
        keep_prefix: see `GridConnector`.
        grid: side of the grid.
        num_layers: linear layers of the MLP.
        hidden_size: channels between them; None: the word embeddings'.

    Raises:
        ConfigError: patches that are no square grid, or a smaller one than ``grid``; more weights than this
            machine has memory for.
    """

    def __init__(
        self,
        inputs: ConnectorInputs,
        grid: PositiveInt = 4,
        keep_prefix: bool = False,
        num_layers: PositiveInt = 2,
        hidden_size: PositiveInt | None = None,
    ) -> None:
        super().__init__(inputs, keep_prefix)
        self.grid = grid
        if inputs.num_tokens is not None:
            self.num_soft_prompts(inputs.num_tokens)
        self.norm = nn.LayerNorm(inputs.vision_dim)
        self.proj = projection(
            inputs.vision_dim,
            inputs.language_dim,
            num_layers,
            hidden_size or inputs.language_dim,
            inputs.embedding_rms,
        )

    def _read_grid(self, prefix: Tensor | None, patches: Tensor, side: int) -> Tensor:
        pooled = grid_means(side, self._grid_size(side)).to(patches) @ patches  # [B, grid^2, C]
        if prefix is not None:
            pooled = torch.cat([prefix, pooled], dim=1)
        return self.proj(self.norm(pooled))

    def _grid_size(self, side: int) -> int:
        self._check_grid(self.grid, side)
        return self.grid
