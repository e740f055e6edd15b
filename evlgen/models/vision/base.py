"""The contract of vision encoders: pixels in, visual tokens out."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from evlgen.common.errors import ConfigError
from evlgen.models.vision.temporal import temporal_modules


class VisionEncoder(nn.Module):
    """Turns pixels [B, 3, H, W] into visual tokens [B, N, C], class token first.

    The constructor takes the fields of `model_config.VisionConfig` it cares about, by keyword.

    Attributes:
        embed_dim: C.
        num_tokens: N.
        num_prefix_tokens: tokens before the patches (class token, registers); 0 where there are none.
        grid_size: rows and columns in which the patches lie; None where that is not known.
        image_size: side of the images it reads, in pixels.
        image_mean, image_std: normalisation of its pixels, three numbers each.
    """

    WEIGHTS_URL: ClassVar[str | None] = None  # of the weights that `pretrained: true` means, where known

    embed_dim: int
    num_tokens: int
    num_prefix_tokens: int
    grid_size: tuple[int, int] | None = None
    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    @classmethod
    def normalisation(cls, name: str) -> dict[str, list[float]]:
        """``mean`` and ``std`` for the processors, before the encoder is built; empty leaves the processors'
        own."""
        return {}

    @classmethod
    def missing(cls, pretrained: bool | str) -> str | None:
        """Why the weights are not on this machine, with the remedy; None when nothing is known to be
        missing."""
        return None

    def trained_modules(self) -> list[nn.Module]:
        """Modules inside a frozen encoder that are trained nonetheless."""
        return [*temporal_modules(self)]

    def checkpoint(self, offload: bool) -> None:
        """Has activations computed again in the backward pass. Called where something in the encoder is
        trained, after everything that changes its blocks.

        Args:
            offload: keep what they are computed from in the CPU's memory.
        """
        raise ConfigError(
            f"model.vision.grad_checkpoint: {type(self).__name__} does not recompute activations. "
            "Set it to false."
        )

    def checkpoint_with_fairscale(self, offload: bool) -> None:
        """As `checkpoint`, by fairscale's ``checkpoint_wrapper``."""
        raise ConfigError(
            f"model.vision.grad_checkpoint: {type(self).__name__} does not recompute activations with "
            "fairscale. Set it to true, offload or false."
        )

    def merge_tokens(self, r: int) -> None:
        """Has r pairs of tokens merge in each block from now on; `num_tokens` and `num_prefix_tokens`
        follow."""
        raise ConfigError(f"model.vision.tome_r: tokens do not merge in {type(self).__name__}. Set it to 0.")

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, C]."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(pixels)")
