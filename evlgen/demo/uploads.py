"""Files that visitors of the page give: images and videos of unknown senders."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from evlgen.common.errors import DataError
from evlgen.media.frames import read_frames
from evlgen.media.video import VIDEO_SUFFIXES
from evlgen.serving.errors import Refusal
from evlgen.serving.limits import Limits
from evlgen.serving.uploads import MEDIA_TYPES, decode

_BEGINNINGS = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG": "image/png",
    b"RIFF": "image/webp",
    b"GIF8": "image/gif",
}


def read_upload(path: str | os.PathLike, limits: Limits, num_frames: int) -> list[Image.Image]:
    """The image in a file, or frames of the video in it, upright RGB.

    Args:
        limits: ``body_bytes`` of a file and ``image_pixels`` of an image or frame, at most.
        num_frames: of a video at most, evenly spaced.

    Raises:
        DataError: the file is broken, too large, or of another kind; it says so without the file's place.
    """
    path = Path(path)
    try:
        if path.stat().st_size > limits.body_bytes:
            raise DataError(f"the file is too large: at most {limits.body_bytes / 1e6:.0f} MB are read.")
        frames = _frames(path, limits, num_frames)
    except (DataError, Refusal, OSError) as error:
        raise DataError(str(error).replace(str(path), path.name).replace("(upload)", path.name)) from error
    if max(frame.width * frame.height for frame in frames) > limits.image_pixels:
        raise DataError(f"the video is too large: at most {limits.image_pixels / 1e6:g} megapixels are read.")
    return frames


def _frames(path: Path, limits: Limits, num_frames: int) -> list[Image.Image]:
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return list(read_frames(path, num_frames))
    data = path.read_bytes()
    if not data:
        raise DataError("the file is empty.")
    media_type = next((kind for start, kind in _BEGINNINGS.items() if data.startswith(start)), None)
    if media_type is None:
        known = sorted({name for name in MEDIA_TYPES.values()})
        raise DataError(f"{path.name} is not an image that is read here ({', '.join(known)}), nor a video.")
    image = decode(data, media_type, limits.image_pixels)
    is_gif = media_type == "image/gif" and path.suffix.lower() == ".gif"
    return read_frames(path, num_frames) if is_gif else [image]
