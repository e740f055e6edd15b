"""Image processors: a Pillow image of any mode and size -> normalised pixels, float32 [3, H, W].

Names, steps and defaults are those of LAVIS (`lavis/processors/blip_processors.py`). Random choices come from
torch's global generator only, so seeding it repeats them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from evlgen.common.constraints import PositiveInt, Share
from evlgen.common.errors import ConfigError
from evlgen.common.images import to_rgb
from evlgen.common.registry import registry
from evlgen.processors.base_processor import BaseProcessor
from evlgen.processors.randaugment import RandAugment

# OpenAI CLIP's normalisation, which EVA-CLIP shares (open_clip/constants.py).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Normalisation:
    """uint8 pixels [3, ...] -> normalised ones, float32 of the same shape.

    Args:
        mean: of each channel, on a scale of 0..1; CLIP's when None.
        std: likewise.

    Raises:
        ConfigError: mean or std are not three numbers, or a std is not positive.
    """

    def __init__(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        # For pixels of 0..255: one subtraction and one product instead of a scaling and a normalisation.
        self._mean = _per_channel("mean", CLIP_MEAN if mean is None else mean) * 255
        std = _per_channel("std", CLIP_STD if std is None else std)
        if not (std > 0).all():
            raise ConfigError(f"std must be positive in every channel, got {std.tolist()}.")
        self._scale = 1 / (std * 255)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        per_channel = (3,) + (1,) * (pixels.dim() - 1)
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.sub_(self._mean.view(per_channel)).mul_(self._scale.view(per_channel))


class ImageProcessor(BaseProcessor):
    """RGB, then the subclass's geometry and colour, then normalisation.

    Args:
        transform: RGB picture -> RGB picture.
        mean, std: see `Normalisation`.
    """

    def __init__(
        self,
        transform: Callable[[Image.Image], Image.Image],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.transform = transform
        self._normalise = Normalisation(mean, std)

    def __call__(self, item: Image.Image) -> torch.Tensor:
        """Normalised pixels, float32 [3, H, W]. Raises `DataError` for anything but a Pillow image."""
        pixels = torch.from_numpy(np.array(self.transform(to_rgb(item))))  # [H, W, 3] uint8
        return self._normalise(pixels.permute(2, 0, 1))


@registry.register_processor("blip2_image_train")
class Blip2ImageTrainProcessor(ImageProcessor):
    """A random part (``min_scale`` to ``max_scale`` of the area), resized, mirrored half of the time."""

    def __init__(
        self,
        image_size: PositiveInt = 364,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        min_scale: Share = 0.5,
        max_scale: Share = 1.0,
    ) -> None:
        super().__init__(v2.Compose(_crop_and_flip(image_size, min_scale, max_scale)), mean, std)


@registry.register_processor("blip_image_train")
class BlipImageTrainProcessor(ImageProcessor):
    """As ``blip2_image_train``, with two of BLIP's RandAugment operations after the mirroring."""

    def __init__(
        self,
        image_size: PositiveInt = 384,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        min_scale: Share = 0.5,
        max_scale: Share = 1.0,
    ) -> None:
        augment = RandAugment(num_ops=2, magnitude=5)
        super().__init__(v2.Compose([*_crop_and_flip(image_size, min_scale, max_scale), augment]), mean, std)


@registry.register_processor("blip_image_eval")
class BlipImageEvalProcessor(ImageProcessor):
    """The whole picture, resized to a square without regard to its proportions."""

    def __init__(
        self,
        image_size: PositiveInt = 384,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ) -> None:
        resize = v2.Resize((image_size, image_size), interpolation=v2.InterpolationMode.BICUBIC)
        super().__init__(resize, mean, std)


def check_scales(min_scale: float, max_scale: float) -> None:
    """Raises `ConfigError` where these are no smallest and largest share of a picture's area."""
    if not 0 < min_scale <= max_scale:
        raise ConfigError(
            f"min_scale {min_scale} and max_scale {max_scale} are shares of a picture's area: "
            "they need 0 < min_scale <= max_scale <= 1."
        )


def _crop_and_flip(image_size: int, min_scale: float, max_scale: float) -> list[Callable]:
    check_scales(min_scale, max_scale)
    crop = v2.RandomResizedCrop(
        (image_size, image_size), scale=(min_scale, max_scale), interpolation=v2.InterpolationMode.BICUBIC
    )
    return [crop, v2.RandomHorizontalFlip()]


def _per_channel(name: str, values: Sequence[float]) -> torch.Tensor:
    if len(values) != 3:
        raise ConfigError(
            f"{name} takes three numbers, one for each of red, green and blue; got {list(values)}."
        )
    return torch.tensor([float(v) for v in values])
