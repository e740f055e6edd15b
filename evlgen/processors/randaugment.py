"""BLIP's RandAugment: ten operations on an RGB image, a few of them drawn at random.

Names, strengths and grey filling are those of LAVIS (`lavis/processors/randaugment.py`), which works with
OpenCV; here Pillow does the work. What differs, and by how little:

- Shears and rotations: Pillow interpolates without OpenCV's rounding of coordinates to 1/32 pixel, and the
  last half pixel repeats the image's edge where OpenCV blends it with the filling. Measured on a photograph
  at magnitude 5: 0.7 steps of 256 in the mean, more than 2 steps on 0.6 % of the pixels. The other operations
  are equal.
- Sharpening past the original is clipped to 0..255, where the published code wraps around. At BLIP's
  magnitude of 5 brightness and sharpness have factor 1.0 and change nothing, there as here.
- Random choices come from torch's global generator, not numpy's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageEnhance, ImageOps

from evlgen.common.errors import ConfigError, did_you_mean

FILL = (128, 128, 128)
MAX_LEVEL = 10
_MOST_SHEAR = 0.3
_MOST_TRANSLATION = 10.0  # pixels
_MOST_ROTATION = 30.0  # degrees


class RandAugment:
    """Draws ``num_ops`` operations and applies each with a probability; by default as BLIP does for images.

    Args:
        num_ops: how many operations are drawn per image (N of Cubuk et al., *RandAugment*, 2020).
        magnitude: strength of each, 0 to 10 (M).
        operations: names out of `OPERATIONS`; all ten by default.
        distinct: whether the operations of an image all differ.
        probability: with which each of them is applied.

    Raises:
        ConfigError: an operation's name is not known.
    """

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: float = 5,
        operations: Sequence[str] | None = None,
        distinct: bool = False,
        probability: float = 0.5,
    ) -> None:
        self.num_ops = num_ops
        self.magnitude = magnitude
        self.distinct = distinct
        self.probability = probability
        self.operations = tuple(OPERATIONS if operations is None else operations)
        for name in self.operations:
            if name not in OPERATIONS:
                raise ConfigError(
                    f"RandAugment has no operation '{name}'.{did_you_mean(name, OPERATIONS)} "
                    f"Operations: {', '.join(OPERATIONS)}."
                )

    def __call__(self, image: Image.Image) -> Image.Image:
        """An RGB image of the same size."""
        count = len(self.operations)
        choices = (
            torch.randperm(count)[: self.num_ops] if self.distinct else torch.randint(count, (self.num_ops,))
        )
        for choice in choices.tolist():
            if torch.rand(()) <= self.probability:
                image = OPERATIONS[self.operations[choice]](image, self.magnitude / MAX_LEVEL)
        return image


def shear_x(image: Image.Image, factor: float) -> Image.Image:
    """Moves row y to the right by ``factor * y`` pixels."""
    return _warp(image, (1, -factor, factor / 2, 0, 1, 0))


def shear_y(image: Image.Image, factor: float) -> Image.Image:
    """Moves column x down by ``factor * x`` pixels."""
    return _warp(image, (1, 0, 0, -factor, 1, factor / 2))


def translate_x(image: Image.Image, offset: float) -> Image.Image:
    """Moves the image to the left by ``offset`` pixels."""
    return _warp(image, (1, 0, offset, 0, 1, 0))


def translate_y(image: Image.Image, offset: float) -> Image.Image:
    """Moves the image up by ``offset`` pixels."""
    return _warp(image, (1, 0, 0, 0, 1, offset))


def rotate(image: Image.Image, degrees: float) -> Image.Image:
    """Turns the image counter-clockwise about the centre of pixel (width / 2, height / 2)."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = image.width / 2 + 0.5, image.height / 2 + 0.5
    return _warp(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


def _warp(image: Image.Image, output_to_input: tuple[float, ...]) -> Image.Image:
    """Affine warp. Pillow has pixel centres at half integers, hence the halves in the callers' terms."""
    return image.transform(
        image.size, Image.Transform.AFFINE, output_to_input, Image.Resampling.BILINEAR, fillcolor=FILL
    )


def _enhanced(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable:
    return lambda image, strength: enhancer(image).enhance(strength * 1.8 + 0.1)


def _either_way(warp: Callable, most: float) -> Callable:
    return lambda image, strength: warp(image, strength * most * (1 if torch.rand(()) <= 0.5 else -1))


# Each takes an RGB image and a strength of 0..1.
OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "Identity": lambda image, strength: image,
    "AutoContrast": lambda image, strength: ImageOps.autocontrast(image),
    "Brightness": _enhanced(ImageEnhance.Brightness),
    "Sharpness": _enhanced(ImageEnhance.Sharpness),
    "Equalize": lambda image, strength: ImageOps.equalize(image),
    "ShearX": _either_way(shear_x, _MOST_SHEAR),
    "ShearY": _either_way(shear_y, _MOST_SHEAR),
    "TranslateX": _either_way(translate_x, _MOST_TRANSLATION),
    "TranslateY": _either_way(translate_y, _MOST_TRANSLATION),
    "Rotate": _either_way(rotate, _MOST_ROTATION),
}
