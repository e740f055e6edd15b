"""Image processors: a Pillow image of any mode and size -> normalised pixels, float32 [3, H, W].

Names, steps and defaults are those of LAVIS (`lavis/processors/blip_processors.py`). Random choices come from
torch's global generator only, so seeding it repeats them.

Two keys trade the published pixels for speed (`benchmarks/loader.py` has numbers):

- ``resize: torch`` takes torch's kernel for 8-bit pixels: the same bicubic filter with other rounding, which
  makes a difference of at most 1 of 255. It goes along rows first; newer Pillows go along columns first where
  these shrink more, and where black and white pixels meet that makes a larger difference.
- ``draft: true`` lets a JPEG be decoded at a half or less of its size where no part that is looked at falls
  below ``image_size``. What is then resized is an image that was averaged before.

With ``max_tiles`` above 1, which follows ``model.vision.tiles``, pixels are [3, rows * image_size, columns *
image_size]: a grid of at most so many tiles (`evlgen.processors.tiles`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.config.constraints import Fraction, PositiveInt
from evlgen.media.images import to_rgb
from evlgen.processors.base_processor import BaseProcessor
from evlgen.processors.randaugment import RandAugment
from evlgen.processors.tiles import RandomPartToGrid, ToGrid

# OpenAI CLIP's normalisation, which EVA-CLIP shares (open_clip/constants.py).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


Resize = Literal["pillow", "torch"]
_LONGEST = 8  # times the shorter side; longer images lose their ends where only their middle is looked at


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
        deviation = _per_channel("std", CLIP_STD if std is None else std)
        if not (deviation > 0).all():
            raise ConfigError(f"std must be positive in every channel, got {deviation.tolist()}.")
        self._scale = 1 / (deviation * 255)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        per_channel = (3,) + (1,) * (pixels.dim() - 1)
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.sub_(self._mean.view(per_channel)).mul_(self._scale.view(per_channel))


class ImageProcessor(BaseProcessor):
    """RGB, then the subclass's geometry and colour, then normalisation.

    Args:
        transform: RGB image -> RGB image.
        mean, std: see `Normalisation`.
        draft_size: see `evlgen.media.images.open_image`; for those who open images for this processor.
        max_tiles: see above.

    Attributes:
        shapes_differ: whether images come out in different shapes, so that a batch of them is a list.
    """

    def __init__(
        self,
        transform: Callable[[Image.Image], Image.Image],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        draft_size: int | None = None,
        max_tiles: int = 1,
    ) -> None:
        self.transform, self.draft_size = transform, draft_size
        self.shapes_differ = max_tiles > 1
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
        min_scale: Fraction = 0.5,
        max_scale: Fraction = 1.0,
        resize: Resize = "pillow",
        draft: bool = False,
        max_tiles: PositiveInt = 1,
    ) -> None:
        steps = _crop_and_flip(image_size, min_scale, max_scale, resize, max_tiles)
        super().__init__(
            v2.Compose(steps),
            mean,
            std,
            _crop_draft_size(image_size, min_scale, draft and max_tiles == 1),
            max_tiles,
        )


@registry.register_processor("blip_image_train")
class BlipImageTrainProcessor(ImageProcessor):
    """As ``blip2_image_train``, with two of BLIP's RandAugment operations after the mirroring."""

    def __init__(
        self,
        image_size: PositiveInt = 384,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        min_scale: Fraction = 0.5,
        max_scale: Fraction = 1.0,
        resize: Resize = "pillow",
        draft: bool = False,
        max_tiles: PositiveInt = 1,
    ) -> None:
        steps = [
            *_crop_and_flip(image_size, min_scale, max_scale, resize, max_tiles),
            RandAugment(num_ops=2, magnitude=5),
        ]
        super().__init__(
            v2.Compose(steps),
            mean,
            std,
            _crop_draft_size(image_size, min_scale, draft and max_tiles == 1),
            max_tiles,
        )


@registry.register_processor("blip_image_eval")
class BlipImageEvalProcessor(ImageProcessor):
    """The whole image, resized to a square without regard to its proportions."""

    def __init__(
        self,
        image_size: PositiveInt = 384,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        resize: Resize = "pillow",
        draft: bool = False,
        max_tiles: PositiveInt = 1,
    ) -> None:
        if max_tiles > 1:
            whole: Callable = _to_grid(image_size, max_tiles, resize)
        else:
            whole = _RESIZES[resize][0]((image_size, image_size), interpolation=v2.InterpolationMode.BICUBIC)
        super().__init__(whole, mean, std, image_size if draft and max_tiles == 1 else None, max_tiles)


@registry.register_processor("clip_image_train")
class ClipImageTrainProcessor(ImageProcessor):
    """A random part (``min_scale`` to ``max_scale`` of the area), resized; not mirrored. LAVIS's name."""

    def __init__(
        self,
        image_size: PositiveInt = 224,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        min_scale: Fraction = 0.9,
        max_scale: Fraction = 1.0,
        resize: Resize = "pillow",
    ) -> None:
        super().__init__(_crop_and_flip(image_size, min_scale, max_scale, resize)[0], mean, std)


@registry.register_processor("clip_image_eval")
class ClipImageEvalProcessor(ImageProcessor):
    """The square in the middle of the image, resized: as CLIP sees images. LAVIS's name."""

    def __init__(
        self,
        image_size: PositiveInt = 224,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        resize: Resize = "pillow",
    ) -> None:
        super().__init__(_MiddleSquare(image_size, resize), mean, std)


def check_scales(min_scale: float, max_scale: float) -> None:
    """Raises `ConfigError` where these are no smallest and largest share of an image's area."""
    if not 0 < min_scale <= max_scale:
        raise ConfigError(
            f"min_scale {min_scale} and max_scale {max_scale} are shares of an image's area: "
            "they need 0 < min_scale <= max_scale <= 1."
        )


class _TorchResize(v2.Resize):
    """`v2.Resize` of a Pillow image by torch's kernel for 8-bit pixels."""

    def transform(self, inpt: Image.Image, params: dict[str, Any]) -> Image.Image:
        return _resized(inpt, self.size)


class _TorchResizedCrop(v2.RandomResizedCrop):
    """`v2.RandomResizedCrop`, likewise; it draws the same part."""

    def transform(self, inpt: Image.Image, params: dict[str, Any]) -> Image.Image:
        left, top = params["left"], params["top"]
        part = inpt.crop((left, top, left + params["width"], top + params["height"]))
        return _resized(part, self.size)


class _MiddleSquare:
    """The shorter side resized to ``size`` and the square in the middle cut out, as `v2.Resize` and
    `v2.CenterCrop` do. Of a very long image only the middle is resized: the whole would not fit in memory."""

    def __init__(self, size: int, resize: Resize) -> None:
        self.size, self.resize = size, resize

    def __call__(self, image: Image.Image) -> Image.Image:
        short = min(image.size)
        kept = [min(side, _LONGEST * short) for side in image.size]
        if max(image.size) > max(kept):
            image = v2.functional.center_crop(image, kept[::-1])
        width, height = (self.size * side // short for side in image.size)
        resized = _RESIZES[self.resize][0]((height, width), interpolation=v2.InterpolationMode.BICUBIC)
        return v2.functional.center_crop(resized(image), [self.size, self.size])


_RESIZES = {"pillow": (v2.Resize, v2.RandomResizedCrop), "torch": (_TorchResize, _TorchResizedCrop)}


def _resized(image: Image.Image, size: Sequence[int]) -> Image.Image:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # [1, 3, H, W] uint8
    pixels = F.interpolate(pixels, size=tuple(size), mode="bicubic", antialias=True)
    return Image.fromarray(pixels[0].permute(1, 2, 0).contiguous().numpy())


def _crop_draft_size(image_size: int, min_scale: float, draft: bool) -> int | None:
    """The smallest image of which no random part is smaller than ``image_size``.

    A part of the share s of an image W x H whose sides are as r to 1 is sqrt(s W H r) wide and
    sqrt(s W H / r) high, r from 3/4 to 4/3: no side is below sqrt(3/4 s) min(W, H).
    """
    return math.ceil(image_size / math.sqrt(0.75 * min_scale)) if draft else None


def _to_grid(image_size: int, max_tiles: int, resize: Resize) -> ToGrid:
    def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
        return _RESIZES[resize][0](size, interpolation=v2.InterpolationMode.BICUBIC)(image)

    return ToGrid(image_size, max_tiles, resized)


def _crop_and_flip(
    image_size: int, min_scale: float, max_scale: float, resize: Resize, max_tiles: int = 1
) -> list[Callable]:
    check_scales(min_scale, max_scale)
    if max_tiles > 1:
        part = RandomPartToGrid(_to_grid(image_size, max_tiles, resize), (min_scale, max_scale))
        return [part, v2.RandomHorizontalFlip()]
    crop = _RESIZES[resize][1](
        (image_size, image_size), scale=(min_scale, max_scale), interpolation=v2.InterpolationMode.BICUBIC
    )
    return [crop, v2.RandomHorizontalFlip()]


def _per_channel(name: str, values: Sequence[float]) -> torch.Tensor:
    if len(values) != 3:
        raise ConfigError(
            f"{name} takes three numbers, one for each of red, green and blue; got {list(values)}."
        )
    return torch.tensor([float(v) for v in values])
