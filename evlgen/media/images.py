"""Reading images: any file or Pillow mode becomes an upright RGB image, or an error that says why not."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from evlgen.common.errors import DataError
from evlgen.common.safe_text import shown_name

_ORIENTATION_TAG = 0x0112
# EXIF orientation -> what turns the stored image upright (EXIF 2.32, section 4.6.4).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The formats images come in. Pillow knows more, some of which start other programs (EPS) or have decoders
# that nobody looks after.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
#: How files of these are called; where a sample has several, the first is taken.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".avif", ".jp2", ".ppm", ".ico", ".tga"),
)
_DEEP_MODES = ("I", "F")  # and every "I;16..."
# Bytes a pixel takes while a format is decoded, beyond those of the decoded image: as measured, at most.
_DECODER_BYTES = {"AVIF": 9, "JPEG": 8, "JPEG2000": 21, "WEBP": 13}
_RGB_BYTES = 4  # of a pixel in Pillow, which also has four bytes for two or three channels
_SMALLER_MODES = {"1": 1, "L": 1, "P": 1}
#: An image may take so many bytes for each of Pillow's MAX_IMAGE_PIXELS, unless that is None: 1 GiB.
_BYTES_OF_MAX_PIXELS = 12
_STRIP_PIXELS = 1 << 17  # converted at a time
_TILE_TAGS = (322, 323)  # width and height of a TIFF's tiles
_ROWS_TAG, _BITS_TAG = 278, 258  # of a TIFF's strips, and of each of its samples


def open_image(
    path: str | os.PathLike | BinaryIO,
    draft_size: int | None = None,
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
) -> Image.Image:
    """Reads one image file as upright RGB.

    Args:
        path: the file, or one that is open for reading (with a ``name`` for messages).
        draft_size: a JPEG may be decoded at a half, a quarter or an eighth of its size, at a fraction of the
            time, as long as no side falls below so many pixels. None: as it is.
        formats: those of `FORMATS` that are read; None: all.
        max_pixels: of an image at most; None: as Pillow's MAX_IMAGE_PIXELS says.

    Raises:
        DataError: the file is missing, a folder, empty, truncated, too large or not an image. Its ``cause``
            says which of these.
    """
    name = str(getattr(path, "name", "(a stream)")) if hasattr(path, "read") else path
    with decoding(name):
        if name is path and not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe may never end
            raise DataError("it is not a regular file.", "not a file")
        allowed = _formats() if formats is None else [kind for kind in _formats() if kind in formats]
        with Image.open(path, formats=allowed) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise DataError(f"it has more than {max_pixels:,} pixels.", "too large")
            if draft_size is not None:
                image.draft(image.mode, (draft_size, draft_size))
            _check_memory(image)
            return to_rgb(image)


@contextlib.contextmanager
def decoding(name: str | os.PathLike) -> Iterator[None]:
    """Whatever Pillow raises in the block, as a `DataError` that names the image.

    Its decoders answer damaged bytes with exceptions of every kind. Of an image of up to twice
    MAX_IMAGE_PIXELS Pillow only warns; that is refused, too.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"cannot read image {shown_name(name)}: {error} Raise PIL.Image.MAX_IMAGE_PIXELS if you trust "
            "the file.",
            "too large",
        ) from error
    except Exception as error:
        why, cause = _cause(name, error)
        raise DataError(f"cannot read image {shown_name(name)}: {why}", cause) from error


def _check_memory(image: Image.Image) -> None:
    """Raises `Image.DecompressionBombError` where decoding and converting an image take more bytes than an
    image of MAX_IMAGE_PIXELS may."""
    if Image.MAX_IMAGE_PIXELS is None:
        return
    pixels = image.width * image.height
    stored = 2 if image.mode.startswith("I;16") else _SMALLER_MODES.get(image.mode, 4)
    decoding = _DECODER_BYTES.get(image.format or "", 0) * pixels + _tiff_buffer(image)
    converting = 2 * _RGB_BYTES * pixels  # to RGB, and upright
    needed = stored * pixels + max(decoding, converting)
    limit = _BYTES_OF_MAX_PIXELS * Image.MAX_IMAGE_PIXELS
    if needed > limit:
        raise Image.DecompressionBombError(
            f"it takes {needed >> 20:,} MiB of memory to read it ({image.format}, {image.mode}, "
            f"{image.width} x {image.height}), and the limit is {limit >> 20:,} MiB."
        )


def _tiff_buffer(image: Image.Image) -> int:
    """Bytes of a TIFF's tile or strip, which is decoded as a whole and may be larger than the image."""
    tags = getattr(image, "tag_v2", None)
    if not tags:
        return 0
    rows = min(int(tags.get(_ROWS_TAG, image.height)), image.height)
    width, height = int(tags.get(_TILE_TAGS[0], image.width)), int(tags.get(_TILE_TAGS[1], rows))
    return width * height * sum(tags.get(_BITS_TAG, (1,))) // 8


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
        DataError: the argument is not a Pillow image, has no pixels, or is one that was opened and cannot be
            decoded.
    """
    if not isinstance(image, Image.Image):
        raise DataError(
            f"expected a Pillow image, got {type(image).__name__}. Open a file with "
            "evlgen.media.images.open_image(path), wrap an array with PIL.Image.fromarray(array)."
        )
    if 0 in image.size:
        raise DataError(f"the image has no pixels (size {image.size[0]} x {image.size[1]}).")
    with decoding(getattr(image, "filename", "") or "in memory"):
        image.load()
    turn = _UPRIGHT.get(_orientation(image) or 1)
    rgb = _as_rgb(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
        rgb.info = {}  # carries a copy of the EXIF block; a second call would turn the image again
    return rgb


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except Exception:
        return None  # a damaged EXIF block beside a whole image: shown as it is stored


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # a look-up takes a tenth of the time of computing each pixel
        table = _eight_bits(np.arange(1 << 16), 0, 65535)
        return _in_strips(image, lambda strip: Image.fromarray(table[np.asarray(strip)]).convert("RGB"))
    if image.mode in _DEEP_MODES:
        low, high = _value_range(image)

        def convert(strip: Image.Image) -> Image.Image:
            return Image.fromarray(_eight_bits(np.asarray(strip), low, high)).convert("RGB")

        return _in_strips(image, convert)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        return _in_strips(image, _over_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """RGB, where converting all at once takes several times the image's memory."""
    page = Image.new("RGB", image.size)
    for box in _strips(image):
        page.paste(convert(image.crop(box)), box)
    return page


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    columns = min(_STRIP_PIXELS, image.width)  # a single row may have millions
    rows = _STRIP_PIXELS // columns
    for top in range(0, image.height, rows):
        for left in range(0, image.width, columns):
            yield left, top, min(left + columns, image.width), min(top + rows, image.height)


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    page = Image.new("RGB", image.size, "white")
    page.paste(image, mask=image.getchannel("A"))
    return page


def _eight_bits(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Deep pixel values as grey ones of 8 bits, by the rules of `to_rgb`."""
    scaled = (values.astype(np.float64) - low) * (255.0 / (high - low))
    return np.nan_to_num(np.rint(scaled), nan=0.0).clip(0, 255).astype(np.uint8)


def _value_range(image: Image.Image) -> tuple[float, float]:
    """The values of an image of 32 bits that become black and white."""
    strips = (np.asarray(image.crop(box)) for box in _strips(image))
    finite = [values for strip in strips if (values := _extremes(strip[np.isfinite(strip)]))]
    low, high = (min(v[0] for v in finite), max(v[1] for v in finite)) if finite else (0.0, 1.0)
    usual = (1.0, 255.0) if image.mode == "F" else (255.0, 65535.0)
    for top in usual:
        if low >= 0 and high <= top:
            return 0.0, top
    return low, max(high, low + 1e-6)


def _extremes(values: np.ndarray) -> tuple[float, float] | None:
    return (float(values.min()), float(values.max())) if values.size else None


def _cause(path: str | os.PathLike, error: Exception) -> tuple[str, str]:
    """Why an image cannot be read, and the `DataError.cause` of it."""
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
