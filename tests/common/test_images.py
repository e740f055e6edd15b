"""Every Pillow mode and every damaged file of `evlgen.media.images`."""

from __future__ import annotations

import io
import random
import struct
import tempfile
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from evlgen.common.errors import DataError
from evlgen.media.images import open_image, to_rgb

RAMP = np.linspace(0, 255, 8 * 12, dtype=np.uint8).reshape(8, 12)
COLOURS = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
MODES = ("1", "L", "P", "RGB", "RGBA", "RGBa", "RGBX", "LA", "PA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F")


def grey(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("mode", [*MODES, "I;16", "I;16B", "I;16L", "La"])
def test_every_mode_becomes_rgb_of_the_same_size(mode: str) -> None:
    rgb = to_rgb(Image.new(mode, (5, 3)))
    assert (rgb.mode, rgb.size) == ("RGB", (5, 3))


@pytest.mark.parametrize("mode", ["YCbCr", "CMYK", "RGBA", "RGBX", "HSV"])
def test_colours_survive_modes_that_hold_them(mode: str) -> None:
    image = Image.fromarray(COLOURS)
    far = np.abs(np.asarray(to_rgb(image.convert(mode))).astype(int) - COLOURS)
    assert far.max() <= (8 if mode == "HSV" else 3)


def test_upright_rgb_is_not_copied() -> None:
    image = Image.fromarray(COLOURS)
    assert to_rgb(image) is image


def test_sixteen_bit_is_scaled_instead_of_clipped_to_white() -> None:
    deep = RAMP.astype(np.uint16) * 257
    assert np.array_equal(grey(to_rgb(Image.fromarray(deep))), RAMP)


def test_thirty_two_bit_integers_are_read_by_their_range() -> None:
    assert np.array_equal(grey(to_rgb(Image.fromarray(RAMP.astype(np.int32)))), RAMP)
    assert np.array_equal(grey(to_rgb(Image.fromarray(RAMP.astype(np.int32) * 257))), RAMP)
    wide = RAMP.astype(np.int32) * 1000 - 7
    assert np.array_equal(grey(to_rgb(Image.fromarray(wide))), RAMP)


def test_floats_are_read_by_their_range() -> None:
    for image in (RAMP / 255, RAMP.astype(float), RAMP * 3.0 - 50):
        assert np.array_equal(grey(to_rgb(Image.fromarray(image.astype(np.float32)))), RAMP)


def test_floats_that_are_no_numbers_are_black() -> None:
    values = (RAMP / 255).astype(np.float32)
    values[0, :2] = np.nan, np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = grey(to_rgb(Image.fromarray(values)))
    assert pixels[0, 0] == 0 and np.array_equal(pixels[1:], RAMP[1:])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_white_and_half_transparent_ones_half_white(mode: str) -> None:
    image = Image.new(mode, (3, 1), 0)
    image.putalpha(Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint8)))
    assert grey(to_rgb(image)).tolist() == [[255, 127, 0]]


def test_transparent_colour_of_a_palette_is_white(tmp_path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "p.png", transparency=0)
    assert np.asarray(open_image(tmp_path / "p.png")).tolist() == [[[255, 255, 255], [200, 100, 50]]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
def test_every_exif_orientation_is_applied_once(orientation: int, kind: str, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{kind}"
    Image.fromarray(COLOURS).save(path, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    upright = open_image(path)
    with Image.open(path) as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    assert np.array_equal(upright, expected)
    assert np.array_equal(to_rgb(upright), expected)
    assert (upright.size == (8, 12)) == (orientation >= 5)


def test_damaged_exif_block_does_not_lose_the_image(tmp_path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=b"Exif\0\0 not a TIFF header")
    assert np.array_equal(open_image(tmp_path / "a.png"), COLOURS)


def test_something_else_than_an_image_says_what_to_do() -> None:
    with pytest.raises(DataError, match="expected a Pillow image, got ndarray.*fromarray"):
        to_rgb(COLOURS)
    with pytest.raises(DataError, match="no pixels"):
        to_rgb(Image.new("RGB", (0, 5)))


def test_unreadable_files_name_path_and_cause(tmp_path) -> None:
    whole = io.BytesIO()
    Image.fromarray(COLOURS).resize((200, 200)).save(whole, "JPEG")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:-600])
    (tmp_path / "folder.jpg").mkdir()
    causes = {
        "missing.jpg": "does not exist",
        "empty.jpg": "is empty",
        "text.jpg": "not an image",
        "cut.jpg": "truncated",
        "folder.jpg": "is a folder",
    }
    for name, cause in causes.items():
        with pytest.raises(DataError, match=cause) as caught:
            open_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_decompression_bomb_is_refused(tmp_path, monkeypatch) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(DataError, match=r"bomb\.png.*MAX_IMAGE_PIXELS"):
        open_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "RGBA", "LA", "PA", "La", "RGBa", "P", "L", "RGB"])
def test_images_are_converted_alike_in_strips_and_as_a_whole(mode: str, monkeypatch) -> None:
    if mode in ("I;16", "I", "F"):
        image = Image.fromarray((RAMP * 200.0 - (0 if mode == "I;16" else 9)).astype(
            {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        ))  # fmt: skip
    else:
        image = Image.fromarray(np.dstack([COLOURS, RAMP])).convert(mode)
        image.info["transparency"] = image.getpixel((3, 3))
    if mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        del image.info["transparency"]
    whole = np.asarray(to_rgb(image))
    for pixels in (24, 5):  # two rows; a part of a row
        monkeypatch.setattr("evlgen.media.images._STRIP_PIXELS", pixels)
        assert np.array_equal(to_rgb(image), whole) and whole.std() > 10


@pytest.mark.parametrize("size", [(2000, 2000), (4_000_000, 1)])
@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_images_take_little_memory_to_convert(mode: str, size: tuple[int, int]) -> None:
    """Beside the image and its RGB form, which Python does not see: all at once it would be 110 MB."""
    image = Image.new(mode, size, 7)
    tracemalloc.start()
    try:
        to_rgb(image)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8e6


def tiff_of_one_tile(width: int, height: int) -> bytes:
    """A TIFF of 16 x 16 RGB pixels in a tile of more, of which next to nothing is there."""
    data = zlib.compress(bytes(1000))
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1)]
    tags += [(322, width), (323, height), (324, 8), (325, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return (
        struct.pack("<4sI", b"II*\0", 8 + len(data))
        + data
        + struct.pack("<H", len(tags))
        + entries
        + bytes(4)
    )


def test_the_memory_that_an_image_will_take_is_limited(tmp_path, monkeypatch) -> None:
    (tmp_path / "tile.tif").write_bytes(tiff_of_one_tile(32752, 65520))
    with pytest.raises(
        DataError, match=r"tile\.tif: it takes 2,046 MiB.*16 x 16.*limit is 1,023 MiB"
    ) as caught:
        open_image(tmp_path / "tile.tif")
    assert caught.value.cause == "too large"
    for kind in ("PNG", "WEBP"):
        Image.fromarray(COLOURS).save(tmp_path / kind, kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8 * 12)
    assert open_image(tmp_path / "PNG").size == (12, 8)
    with pytest.raises(DataError, match="WEBP, RGB, 12 x 8.*MAX_IMAGE_PIXELS"):  # whose decoder takes more
        open_image(tmp_path / "WEBP")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(tmp_path / "WEBP").size == (12, 8)


def test_an_image_opened_by_the_caller_and_damaged_is_named(tmp_path) -> None:
    Image.fromarray(COLOURS).resize((200, 200)).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(DataError, match=r"cut\.png") as caught:
        to_rgb(image)
    assert caught.value.cause == "damaged image"


def test_a_damaged_stream_without_a_name_is_refused() -> None:
    with tempfile.TemporaryFile() as file, pytest.raises(DataError, match="not an image"):
        file.write(b"not an image")
        file.seek(0)
        open_image(file)  # its name is a number


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_damaged_bytes_give_an_image_or_a_data_error(kind: str, tmp_path) -> None:
    rng = random.Random(kind)
    whole = io.BytesIO()
    Image.fromarray(COLOURS).save(whole, kind)
    path = tmp_path / "damaged"
    failures = 0
    for _ in range(100):
        damaged = bytearray(whole.getvalue())
        for _ in range(4):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.randrange(1, len(damaged) + 1)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert open_image(path).mode == "RGB"
            except DataError:
                failures += 1
    assert failures > 10
