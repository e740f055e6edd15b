"""What models behind a vision encoder share: the encoder, frozen as a rule, and the norm after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from evlgen.batch import Batch
from evlgen.common.errors import DataError
from evlgen.common.precision import without_autocast
from evlgen.models.base_model import BaseModel
from evlgen.models.ops import plain_dtype, use_fast_linear
from evlgen.models.pixels import pixels_of
from evlgen.models.vision import vision_encoder_class
from evlgen.models.vision.base import VisionEncoder
from evlgen.models.vision.temporal import temporal_modules
from evlgen.weights.needed import MissingAsset, missing_parts


class VisionModel(BaseModel):
    """A model that reads images through a vision encoder. The constructor of a subclass sets its other parts,
    of which ``connector`` reads the visual tokens, and then calls `freeze_parts`.

    Args:
        vision: pixels [B, 3, H, W] -> visual tokens [B, N, C_vision].
        freeze_vision: whether the encoder is not trained, but for its own `trained_modules`.
    """

    vision: VisionEncoder
    ln_vision: nn.Module
    connector: nn.Module

    def __init__(self, vision: VisionEncoder, freeze_vision: bool = True) -> None:
        super().__init__()
        self.freezes_vision = freeze_vision
        self.vision = vision
        self.ln_vision = nn.LayerNorm(vision.embed_dim, eps=1e-5)

    @classmethod
    def missing(cls, cfg: Any) -> list[MissingAsset]:
        """Weights and tokenizers the config names that are not on this machine."""
        vision = cfg.vision
        why = vision_encoder_class(vision.name).missing(vision.pretrained)
        return missing_parts(vision.name, vision.pretrained, why, cls._hub_parts(cfg), cfg.checkpoint)

    @classmethod
    def _hub_parts(cls, cfg: Any) -> dict[str, str]:
        """What else the config takes from the hub or a folder: what it is -> its name."""
        return {}

    def set_norm(self, eps: float | None) -> None:
        """The LayerNorm after the encoder, as new; None: none."""
        self.ln_vision = nn.Identity() if eps is None else nn.LayerNorm(self.vision.embed_dim, eps=eps)

    def freeze_parts(self) -> None:
        """Freezes the `frozen_modules`, but for the `trained_modules` inside them."""
        for module in self.frozen_modules():
            module.requires_grad_(False)
        for module in self.trained_modules():
            module.requires_grad_(True)
        use_fast_linear(self)

    def frozen_modules(self) -> list[nn.Module]:
        return [self.vision] if self.freezes_vision else []

    def encode(self, image: Tensor) -> Tensor:
        """The encoder's own tokens of images [B, 3, H, W], in the type its weights are kept in: [B, N,
        C_vision].

        Where the encoder is frozen they are the same at every step, and may be kept: see
        `evlgen.vision_cache.cache`.
        """
        return self.encode_frames(self._pixels(image))

    def encode_frames(self, frames: Tensor, num_frames: int = 1) -> Tensor:
        """The tokens of images, or of every frame of videos: [B * T, 3, H, W], a video's frames in a row ->
        [B * T, N, C_vision]."""
        for module in temporal_modules(self.vision):
            module.num_frames = num_frames
        if not self.freezes_vision:
            return self.vision(frames)
        learns = torch.is_grad_enabled() and bool(self.vision.trained_modules())
        # in the type its weights are kept in: autocast would convert all of them at every step
        with torch.set_grad_enabled(learns), without_autocast(frames.device):
            return self.vision(frames)

    def encoded(self, samples: Batch) -> Batch:
        """Samples that are read more than once: ``visual_tokens`` in place of ``image``, so that the encoder
        runs once; as they are where it learns."""
        if "image" not in samples or any(p.requires_grad for p in self.vision.parameters()):
            return samples
        found: Batch = {**samples, "visual_tokens": self.encode(samples["image"])}
        del found["image"]
        return found

    def visual_tokens(self, image: Tensor) -> Tensor:
        """[B, 3, H, W], or of videos [B, 3, T, H, W] -> the encoder's tokens after ``ln_vision``, [B, N,
        C_vision]."""
        return self._normed(self.encode(image))

    def _pixels(self, image: Any) -> Tensor:
        """A batch as the encoder reads it: pixels, or Pillow images, see `pixels_of`."""
        image = image if isinstance(image, Tensor) else pixels_of(self, image)
        self._check_image(image)
        return image.to(self.device, plain_dtype(self.vision))

    def _check_image(self, image: Tensor) -> None:
        """Raises `DataError` for another shape than [B, 3, H, W] or, of videos, [B, 3, T, H, W] of the
        encoder's size."""
        size, shape = self.vision.image_size, list(image.shape)
        if image.ndim not in (4, 5) or shape[1] != 3:
            raise DataError(
                f"image has shape {shape}: it must be [B, 3, H, W], or [B, 3, T, H, W] for videos. One "
                "image is a batch of one: image.unsqueeze(0)."
            )
        if shape[-2:] != [size, size]:
            raise DataError(
                f"image has shape {shape}, and the vision encoder reads {size} x {size} pixels "
                "(model.vision.image_size). Give the processors the same image_size."
            )

    def image_tokens(self, samples: Batch) -> Tensor:
        """The encoder's own tokens of a batch, [B, N, C_vision]: its ``visual_tokens``, or `encode`
        of its ``image``."""
        if "visual_tokens" in samples:
            return samples["visual_tokens"].to(self.device)
        return self.encode(samples["image"])

    def _normed(self, tokens: Tensor) -> Tensor:
        weights = self.connector if isinstance(self.ln_vision, nn.Identity) else self.ln_vision
        return self.ln_vision(tokens.to(next(weights.parameters()).dtype))
