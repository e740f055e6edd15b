"""Images in requests: data URLs and downloaded bytes, from unknown senders."""

from __future__ import annotations

import base64
import binascii
import re
import struct
import zipfile

from PIL import Image

from evlgen.common.errors import DataError
from evlgen.files.io import NamedBytes
from evlgen.media.images import open_image
from evlgen.serving.errors import Refusal

#: Media types that are read, and Pillow's name of the format.
MEDIA_TYPES = {
    "image/jpeg": "JPEG",
    "image/jpg": "JPEG",
    "image/png": "PNG",
    "image/webp": "WEBP",
    "image/gif": "GIF",
}
_PARAM = "messages"
_MOST_SCANS = 100  # of a progressive JPEG: usual are ten, and each costs a pass over the whole image
# Long enough that the bytes of compressed pixels are not taken for one: of four letters, one photograph in
# thousands has them.
_DOCUMENT = re.compile(
    rb"<script|<\?php\s|<!doctype html|<(html|svg)(\s*>\s*[<\w]|\s+[\w:]+\s*=)", re.IGNORECASE
)


def from_data_url(url: str) -> tuple[bytes, str]:
    """The bytes in a data URL, and their media type.

    Raises:
        Refusal: another type than those of `MEDIA_TYPES`, or not base64.
    """
    head, comma, content = url.partition(",")
    media_type, *settings = (part.strip().lower() for part in head[:200].removeprefix("data:").split(";"))
    check_media_type(media_type)
    if not comma or "base64" not in settings:
        raise Refusal(400, "the data URL must be data:TYPE;base64,CONTENT.", "invalid_image_url", _PARAM)
    try:
        data = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(
            400, "the content of the data URL is not base64.", "invalid_base64_image", _PARAM
        ) from None
    return data, media_type


def check_media_type(media_type: str) -> None:
    """Raises `Refusal` for a media type that is not read."""
    if media_type not in MEDIA_TYPES:
        raise Refusal(
            400,
            f"images of type '{media_type[:60]}' are not read: send one of {', '.join(MEDIA_TYPES)}.",
            "unsupported_image_type",
            _PARAM,
        )


def decode(data: bytes, media_type: str, max_pixels: int) -> Image.Image:
    """An upload as upright RGB.

    Raises:
        Refusal: it is empty, broken, of another format than its media type says, larger than ``max_pixels``,
            or another kind of file besides.
    """
    kind = MEDIA_TYPES[media_type]
    try:
        found = _other_content(data, kind)
        if found is not None:
            raise Refusal(400, f"the image is refused: {found}.", "suspicious_image", _PARAM)
        return open_image(NamedBytes(data, "(upload)"), formats=(kind,), max_pixels=max_pixels)
    except DataError as error:
        if error.cause == "too large":
            message = f"the image is too large: at most {max_pixels / 1e6:g} megapixels are read."
            raise Refusal(400, message, "image_too_large", _PARAM) from error
        message = f"{error}" if data else "the image is empty."
        if error.cause == "not an image" and data:
            message = f"the image is not what its type says, {media_type}, or it is broken."
        raise Refusal(400, message, "invalid_image", _PARAM) from error


def _other_content(data: bytes, kind: str) -> str | None:
    """What a file holds besides an image, in words: such files are images to one program and something
    else to the next."""
    if data[:1024].find(b"%PDF-") >= 0:
        return "it is a PDF document, too"
    if zipfile.is_zipfile(NamedBytes(data, "(upload)")):
        return "it is a ZIP archive, too"
    if _DOCUMENT.search(data):
        return "it holds markup or a program"
    if kind == "JPEG" and data.count(b"\xff\xda") > _MOST_SCANS:
        return f"it has more than {_MOST_SCANS} scans"
    end = {"PNG": _end_of_png, "WEBP": _end_of_webp, "GIF": _end_of_gif}.get(kind, lambda _: None)(data)
    if end is not None and data[end:].strip(b"\0"):
        return f"{len(data) - end:,} bytes follow after the end of the image"
    return None


def _end_of_png(data: bytes) -> int | None:
    """Where the last chunk of a PNG ends; None where it has none."""
    place = 8
    while place + 12 <= len(data):
        (length,), name = struct.unpack_from(">I", data, place), data[place + 4 : place + 8]
        place += 12 + length
        if name == b"IEND":
            return place
    return None


def _end_of_webp(data: bytes) -> int | None:
    return 8 + struct.unpack_from("<I", data, 4)[0] if len(data) >= 12 else None


def _end_of_gif(data: bytes) -> int | None:
    """Where the trailer of a GIF ends; None where it is not reached."""

    def table(flags: int) -> int:
        return 3 << ((flags & 7) + 1) if flags & 0x80 else 0

    try:
        place = 13 + table(data[10])
        while data[place] != 0x3B:
            if data[place] == 0x2C:
                place += 11 + table(data[place + 9])  # descriptor, colours, code size
            elif data[place] == 0x21:
                place += 2
            else:
                return None
            while data[place]:  # blocks of at most 255 bytes
                place += 1 + data[place]
            place += 1
        return place + 1
    except IndexError:
        return None
