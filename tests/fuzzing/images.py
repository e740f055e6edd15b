"""Images of every format that is read, damaged."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from evlgen.media.images import FORMATS, open_image
from fuzzing.mutate import mutate

MAX_PIXELS = 4_000_000  # an image may take 46 MiB
_SIZE = (24, 17)
# format -> what one is saved as: a Pillow mode, and options
_SAVED: dict[str, tuple[tuple[str, dict], ...]] = {
    "AVIF": (("RGB", {}), ("RGBA", {})),
    "BMP": (("RGB", {}), ("P", {}), ("1", {}), ("RGBA", {})),
    "GIF": (("P", {}), ("L", {"transparency": 3})),
    "ICO": (("RGBA", {"sizes": [(16, 16), (24, 17)]}), ("RGBA", {"bitmap_format": "bmp"})),
    "JPEG": (("RGB", {"exif": True}), ("L", {}), ("CMYK", {}), ("RGB", {"progressive": True})),
    "JPEG2000": (("RGB", {}), ("L", {}), ("RGBA", {}), ("I;16", {})),
    "PNG": (
        *(("RGB", {"exif": True}), ("P", {"transparency": 3}), ("1", {}), ("I;16", {}), ("LA", {})),
        ("RGBA", {"icc_profile": bytes(200)}),
    ),
    "PPM": (("RGB", {}), ("1", {}), ("I", {}), ("F", {})),
    "TGA": (("RGB", {"compression": "tga_rle"}), ("P", {}), ("LA", {}), ("RGBA", {})),
    "TIFF": (
        *((mode, {"compression": "tiff_deflate"}) for mode in ("RGBA", "F", "I;16", "CMYK")),
        *(("RGB", {"compression": name, "exif": True}) for name in (None, "jpeg", "tiff_lzw", "packbits")),
        *(("1", {"compression": "group4"}), ("I", {}), ("LAB", {})),
    ),
    "WEBP": (("RGB", {"exif": True}), ("RGBA", {"lossless": True})),
}  # fmt: skip
assert set(_SAVED) == set(FORMATS)


def prepare(folder: Path) -> None:
    """Whole images, as ``folder/FORMAT/number``."""
    for form, kinds in _SAVED.items():
        (folder / form).mkdir()
        for number, (mode, options) in enumerate(kinds):
            options = dict(options)
            if options.get("exif"):
                options["exif"] = Image.Exif()
                options["exif"][0x0112] = 6
            _image(mode).save(folder / form / str(number), form, **options)


def damaged(folder: Path, rng: random.Random, keep: Callable[[Path], None]) -> tuple[str, Callable[[], None]]:
    """What is damaged, and its reading."""
    form = rng.choice(FORMATS)
    whole = rng.choice(sorted((folder / form).iterdir()))
    content = mutate(whole.read_bytes(), rng)
    if form == "PNG" and rng.random() < 0.7:
        content = _with_right_sums(content)
    path = folder / "damaged"
    path.write_bytes(content)
    keep(path)
    draft_size = rng.choice((None, 8))
    return f"{form} {whole.name}", lambda: _read(path, draft_size)


def _read(path: Path, draft_size: int | None) -> None:
    with few_pixels():
        image = open_image(path, draft_size)
    assert image.mode == "RGB" and 0 not in image.size


@contextlib.contextmanager
def few_pixels() -> Iterator[None]:
    """Within the block larger images are refused, so that the guard's bounds hold for the others."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _image(mode: str) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (_SIZE[1], _SIZE[0], 3), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    if mode == "LAB":
        return Image.frombytes("LAB", _SIZE, values.tobytes())
    return Image.fromarray(values).convert(mode)


def _with_right_sums(content: bytes) -> bytes:
    """A PNG whose chunks have the check sums of what they hold, so that more than the sums is read."""
    out = io.BytesIO(content)
    place = 8
    while place + 12 <= len(content):
        (length,) = struct.unpack(">L", content[place : place + 4])
        end = place + 8 + length
        if end + 4 > len(content):
            break
        out.seek(end)
        out.write(struct.pack(">L", zlib.crc32(content[place + 4 : end])))
        place = end + 4
    return out.getvalue()
