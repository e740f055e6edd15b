"""Reading pictures: any file or Pillow mode becomes an upright RGB image, or an error that says why not."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from evlgen.common.errors import DataError
from evlgen.common.safe_text import shown_name

_ORIENTATION_TAG = 0x0112
# EXIF orientation -> what turns the stored picture upright (EXIF 2.32, section 4.6.4).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The formats pictures come in. Pillow knows more, some of which start other programs (EPS) or have decoders
# that nobody looks after.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
#: How files of these are called; where a sample has several, the first is taken.
PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".avif", ".jp2", ".ppm", ".ico", ".tga"),
)
_DEEP_MODES = ("I", "F")  # and every "I;16..."
# What Pillow's decoders raise on damaged bytes besides OSError; they have no common base class.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)


def open_image(path: str | os.PathLike | BinaryIO, draft_size: int | None = None) -> Image.Image:
    """Reads one picture file as upright RGB.

    Args:
        path: the file, or one that is open for reading (with a ``name`` for messages).
        draft_size: a JPEG may be decoded at a half, a quarter or an eighth of its size, at a fraction of the
            time, as long as no side falls below so many pixels. None: as it is.

    Raises:
        DataError: the file is missing, a folder, empty, truncated, too large or not an image. Its ``cause``
            says which of these.
    """
    name = getattr(path, "name", "(a stream)") if hasattr(path, "read") else path
    try:
        if name is path and not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe may never end
            raise DataError("it is no regular file.", "not a file")
        with _bombs_refused(), Image.open(path, formats=_formats()) as image:
            if draft_size is not None:
                image.draft(image.mode, (draft_size, draft_size))
            return to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"cannot read image {shown_name(name)}: {error} Raise PIL.Image.MAX_IMAGE_PIXELS if you trust "
            "the file.",
            "too large",
        ) from error
    except (*_DECODER_ERRORS, DataError) as error:
        why, cause = _cause(name, error)
        raise DataError(f"cannot read image {shown_name(name)}: {why}", cause) from error


@contextlib.contextmanager
def _bombs_refused() -> Iterator[None]:
    """Pillow only warns of a picture of up to twice MAX_IMAGE_PIXELS: half a gigabyte once decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any Pillow mode as 8-bit RGB, upright by its EXIF orientation.

    Transparency (RGBA, LA, PA, or a transparent colour) is laid over white, as a web page shows it. Modes of
    more than 8 bits per channel are scaled, not clipped: 16-bit ones from 0..65535; 32-bit integers likewise,
    unless all values fit in 0..255; floats from 0..1, else 0..255, else from their own smallest to their own
    largest value. CMYK and LAB go through Pillow's own conversion. An upright RGB image comes back as it is,
    not as a copy.

    Raises:
        DataError: the argument is no Pillow image, or has no pixels.
    """
    if not isinstance(image, Image.Image):
        raise DataError(
            f"expected a Pillow image, got {type(image).__name__}. Open a file with "
            "evlgen.common.images.open_image(path), wrap an array with PIL.Image.fromarray(array)."
        )
    if 0 in image.size:
        raise DataError(f"the image has no pixels (size {image.size[0]} x {image.size[1]}).")
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    rgb = _as_rgb(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
        rgb.info = {}  # carries a copy of the EXIF block; a second call would turn the picture again
    return rgb


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except _DECODER_ERRORS:
        return None  # a damaged EXIF block beside a whole picture: shown as it is stored


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _DEEP_MODES or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        return _over_white(image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    page = Image.new("RGB", image.size, "white")
    page.paste(image, mask=image.getchannel("A"))
    return page


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Deep pixel values [H, W] as uint8, by the rules of `to_rgb`."""
    low, high = _value_range(values)
    scaled = (values.astype(np.float64) - low) * (255.0 / (high - low))
    return np.nan_to_num(np.rint(scaled), nan=0.0).clip(0, 255).astype(np.uint8)


def _value_range(values: np.ndarray) -> tuple[float, float]:
    if values.dtype.itemsize == 2:
        return 0.0, 65535.0
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    usual = (1.0, 255.0) if values.dtype.kind == "f" else (255.0, 65535.0)
    for top in usual:
        if low >= 0 and high <= top:
            return 0.0, top
    return low, max(high, low + 1e-6)


def _cause(path: str | os.PathLike, error: Exception) -> tuple[str, str]:
    """Why a picture cannot be read, and the `DataError.cause` of it."""
    if isinstance(error, FileNotFoundError):
        return "the file does not exist.", "missing file"
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "it is a link that leads back to itself.", "link to itself"
    if os.path.isdir(path):
        return "it is a folder.", "not a file"
    if isinstance(error, PermissionError):
        return "no permission to read it.", "no permission"
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return "the file is empty.", "empty file"
    if isinstance(error, UnidentifiedImageError):
        return f"it is not an image of a format that is read here ({', '.join(FORMATS)}).", "not an image"
    if isinstance(error, DataError):
        return str(error), error.cause
    if isinstance(error, OSError) and error.errno is not None:
        return f"{os.strerror(error.errno)}.", "not a file" if error.filename else "damaged image"
    return f"{str(error).rstrip('.') or type(error).__name__}.", "damaged image"
