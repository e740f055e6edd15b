"""Connectors that project each visual token by itself: ``linear`` and ``mlp``.

Liu et al., *Visual Instruction Tuning*, 2023 (arXiv 2304.08485), section 4.1: LLaVA's linear layer; and
*Improved Baselines with Visual Instruction Tuning*, 2024 (arXiv 2310.03744), section 3.2: LLaVA 1.5's two
layers with a GELU between.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from evlgen.common.memory import check_fits
from evlgen.common.registry import registry
from evlgen.config.schema import PositiveInt
from evlgen.models.connectors.base import Connector, ConnectorInputs

_GELU_MEAN_SQUARE = 0.4252  # of the GELU of a standard normal variable


def count_frames(num_tokens: int, tokens_per_frame: int | None) -> int:
    """How many frames' tokens stand in a row among ``num_tokens``: 1, unless they are a multiple of one
    image's, as those of a video's concatenated frames are."""
    if not tokens_per_frame or num_tokens % tokens_per_frame:
        return 1
    return max(1, num_tokens // tokens_per_frame)


def projection(
    input_dim: int, output_dim: int, num_layers: int, hidden_size: int, output_rms: float | None
) -> nn.Sequential:
    """Linear layers with a GELU between any two.

    Args:
        hidden_size: channels between the layers.
        output_rms: the scale of the outputs at the start, for inputs with entries of mean square 1, as
            layer-normalised ones; None keeps PyTorch's initialisation.

    Raises:
        ConfigError: more weights than this machine has memory for.
    """
    dims = [input_dim, *[hidden_size] * (num_layers - 1), output_dim]
    inner = max(0, num_layers - 2) * hidden_size**2
    check_fits(input_dim * dims[1] + inner + dims[-2] * output_dim, "model.connector")
    layers: list[nn.Module] = []
    for index in range(num_layers):
        linear = nn.Linear(dims[index], dims[index + 1])
        if output_rms is not None:
            goal = output_rms if index == num_layers - 1 else 1.0
            start_at_scale(linear, goal, input_mean_square=_GELU_MEAN_SQUARE if index else 1.0)
        layers += [nn.GELU(), linear] if index else [linear]
    return nn.Sequential(*layers)


@torch.no_grad()
def start_at_scale(linear: nn.Linear, rms: float, input_mean_square: float = 1.0) -> None:
    """Draws the weights so that outputs have entries of this root mean square, for independent inputs of that
    mean square."""
    nn.init.normal_(linear.weight, std=rms / math.sqrt(linear.in_features * input_mean_square))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


class _TokenProjection(Connector):
    """One soft prompt for each visual token, whatever stands around it.

    The tokens come out of ``ln_vision``, so that soft prompts start at the word embeddings' scale without a
    norm of their own.
    """

    def __init__(self, proj: nn.Module, num_tokens: int | None, num_dropped: int) -> None:
        super().__init__()
        self.proj = proj
        self.num_tokens = num_tokens
        self.num_dropped = num_dropped  # tokens before each frame's patches that are left out

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, vision_dim] -> soft prompts [B, M, language_dim]."""
        if self.num_dropped:
            frames = count_frames(tokens.shape[1], self.num_tokens)
            tokens = tokens.unflatten(1, (frames, -1))[:, :, self.num_dropped :].flatten(1, 2)
        return self.proj(tokens)

    def num_soft_prompts(self, num_tokens: int) -> int:
        """M for N visual tokens: N, or the number of patches."""
        return num_tokens - count_frames(num_tokens, self.num_tokens) * self.num_dropped


@registry.register_connector("linear")
class LinearProjection(_TokenProjection):
    """One linear layer on every visual token, as in LLaVA.

    Args:
        inputs: what it stands between, see `ConnectorInputs`.
        keep_prefix: false leaves out what stands before the patches (class token, registers), as LLaVA does.
    """

    def __init__(
        self,
        inputs: ConnectorInputs,
        keep_prefix: bool = True,
    ) -> None:
        proj = projection(
            inputs.vision_dim, inputs.language_dim, 1, inputs.language_dim, inputs.embedding_rms
        )
        super().__init__(proj, inputs.num_tokens, 0 if keep_prefix else inputs.num_prefix_tokens)


@registry.register_connector("mlp")
class MLPProjection(_TokenProjection):
    """Linear layers with GELUs on every visual token, by default two, as in LLaVA 1.5.

    Args:
        inputs: what it stands between, see `ConnectorInputs`.
        num_layers: linear layers.
        hidden_size: channels between them; None: the word embeddings'.
        keep_prefix: false leaves out what stands before the patches (class token, registers), as LLaVA does.

    Raises:
        ConfigError: more weights than this machine has memory for.
    """

    def __init__(
        self,
        inputs: ConnectorInputs,
        num_layers: PositiveInt = 2,
        hidden_size: PositiveInt | None = None,
        keep_prefix: bool = True,
    ) -> None:
        proj = projection(
            inputs.vision_dim,
            inputs.language_dim,
            num_layers,
            hidden_size or inputs.language_dim,
            inputs.embedding_rms,
        )
        super().__init__(proj, inputs.num_tokens, 0 if keep_prefix else inputs.num_prefix_tokens)
