"""Honeybee's convolutional abstractor: convolutions over the patches, a coarser grid, convolutions over it.

Cha et al., *Honeybee: Locality-enhanced Projector for Multimodal LLM*, CVPR 2024 (arXiv 2312.06742): ResNet
blocks with squeeze and excitation before and after adaptive average pooling, then an MLP.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from torch import Tensor, nn

from evlgen.common.errors import ConfigError
from evlgen.common.memory import check_fits
from evlgen.common.registry import registry
from evlgen.config.schema import PositiveInt
from evlgen.models.connectors.base import ConnectorInputs
from evlgen.models.connectors.grid import GridConnector, grid_means
from evlgen.models.connectors.projection import projection


@registry.register_connector("c_abstractor")
class CAbstractor(GridConnector):
    """A learned position for each patch, ``depth`` ResNet blocks, means over a ``grid`` x ``grid`` grid,
    ``depth`` blocks, a LayerNorm and an MLP.

    The LayerNorm, which the paper does not have, gives the MLP inputs of the scale its start counts on. The
    class token and registers are left out, as in the paper.

    Args:
        inputs: what it stands between, see `ConnectorInputs`; ``num_tokens`` must be given, for
            the positions.
        grid: side of the grid of soft prompts.
        depth: ResNet blocks before the pooling, and after it; the paper's 3.
        hidden_size: channels of the blocks; the paper's 1,024.
        num_layers: linear layers of the MLP; the paper's 2.

    Raises:
        ConfigError: no ``num_tokens``; patches that are not a square grid, or a smaller one than ``grid``;
            more weights than this machine has memory for.
    """

    def __init__(
        self,
        inputs: ConnectorInputs,
        grid: PositiveInt = 4,
        depth: PositiveInt = 3,
        hidden_size: PositiveInt = 1024,
        num_layers: PositiveInt = 2,
    ) -> None:
        super().__init__(inputs, keep_prefix=False)
        self.grid = grid
        if inputs.num_tokens is None:
            raise ConfigError("model.connector: c_abstractor needs the number of visual tokens of an image.")
        self.num_soft_prompts(inputs.num_tokens)
        check_fits(4 * depth * hidden_size**2, "model.connector")
        self.positions = nn.Parameter(
            torch.empty(inputs.num_tokens - inputs.num_prefix_tokens, inputs.vision_dim)
        )
        nn.init.trunc_normal_(self.positions, std=0.02)
        stage = partial(RegStage, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)
        self.before = stage(depth, inputs.vision_dim, hidden_size)
        self.after = stage(depth, hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.proj = projection(
            hidden_size, inputs.language_dim, num_layers, inputs.language_dim, inputs.embedding_rms
        )

    def _read_grid(self, prefix: Tensor | None, patches: Tensor, side: int) -> Tensor:
        x = (patches + self.positions).transpose(1, 2).unflatten(2, (side, side))  # [B, C, side, side]
        x = self.before(x).flatten(2).transpose(1, 2)  # [B, side^2, hidden_size]
        grid = self._grid_size(side)
        x = (grid_means(side, grid).to(x) @ x).transpose(1, 2).unflatten(2, (grid, grid))
        return self.proj(self.norm(self.after(x).flatten(2).transpose(1, 2)))

    def _grid_size(self, side: int) -> int:
        self._check_grid(self.grid, side)
        return self.grid
