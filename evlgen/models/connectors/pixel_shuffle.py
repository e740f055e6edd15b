"""Space to depth: the patches of a square become one token with all their channels, then an MLP.

Nothing is averaged away, unlike in pooling: Laurençon et al., *Building and better understanding
vision-language models*, 2024 (arXiv 2408.12637): Idefics3; nanoVLM and SmolVLM do the same.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.config.schema import PositiveInt
from evlgen.models.connectors.base import ConnectorInputs
from evlgen.models.connectors.grid import GridConnector
from evlgen.models.connectors.projection import projection


@registry.register_connector("pixel_shuffle")
class PixelShuffle(GridConnector):
    """Squares of ``factor`` x ``factor`` patches, each as one vector, and an MLP.

    Where ``factor`` does not divide the side of the grid, the grid is filled up with zeros on the right and
    below: 7 x 7 patches by 2 give 4 x 4 soft prompts. The class token and registers are left out.

    Args:
        inputs: what it stands between, see `ConnectorInputs`.
        factor: side of a square, in patches.
        num_layers: linear layers of the MLP; Idefics3 has one.
        hidden_size: channels between them; None: the word embeddings'.

    Raises:
        ConfigError: patches that are no square grid, a ``factor`` larger than its side, or more weights than
            this machine has memory for.
    """

    def __init__(
        self,
        inputs: ConnectorInputs,
        factor: PositiveInt = 2,
        num_layers: PositiveInt = 2,
        hidden_size: PositiveInt | None = None,
    ) -> None:
        super().__init__(inputs, keep_prefix=False)
        self.factor = factor
        if inputs.num_tokens is not None:
            self.num_soft_prompts(inputs.num_tokens)
        width = hidden_size or inputs.language_dim
        self.proj = projection(
            inputs.vision_dim * factor**2, inputs.language_dim, num_layers, width, inputs.embedding_rms
        )

    def _read_grid(self, prefix: Tensor | None, patches: Tensor, side: int) -> Tensor:
        missing = self._grid_size(side) * self.factor - side
        grid = patches.unflatten(1, (side, side))
        if missing:
            grid = F.pad(grid, (0, 0, 0, missing, 0, missing))
        squares = grid.unflatten(2, (-1, self.factor)).unflatten(1, (-1, self.factor))  # [B, g, f, g, f, C]
        return self.proj(squares.transpose(2, 3).flatten(3).flatten(1, 2))

    def _grid_size(self, side: int) -> int:
        if self.factor > side:
            raise ConfigError(
                f"model.connector.factor {self.factor} is larger than the vision encoder's {side} x {side} "
                f"patches: {side} is the most."
            )
        return -(-side // self.factor)
