"""Picture files and the frames of clips."""

from __future__ import annotations

import logging
from pathlib import Path

from PIL import Image, ImageSequence

from evlgen.common.errors import DataError
from evlgen.common.images import open_image, to_rgb
from evlgen.common.io import resolve

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv"}


def read_frames(path: str | Path, num_frames: int) -> list[Image.Image]:
    """One picture, or of a clip (video file, animated GIF) at most ``num_frames`` frames, evenly spaced from
    its first. A clip of fewer frames is named in a warning, and gives those it has.

    Raises:
        DataError: it is missing, or nothing that can be read.
    """
    file = resolve(path)
    if Path(file).suffix.lower() in VIDEO_SUFFIXES:
        return _video_frames(file, num_frames)
    picture = open_image(file)
    if Path(file).suffix.lower() != ".gif":
        return [picture]
    with Image.open(file, formats=["GIF"]) as clip:
        frames = [to_rgb(frame.copy()) for frame in ImageSequence.Iterator(clip)]
    return [frames[i] for i in _chosen(file, len(frames), num_frames)]


def evenly(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of ``count`` positions, evenly spaced from the first on (LAVIS's ``uniform``)."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def _chosen(file: str, count: int, wanted: int) -> list[int]:
    if count < wanted:
        logger.warning(
            "%s has %d frames, fewer than the %d asked for: each is taken once", file, count, wanted
        )
    return evenly(count, wanted)


def _video_frames(file: str, num_frames: int) -> list[Image.Image]:
    if not Path(file).is_file():
        raise DataError(f"cannot read video {file}: the file does not exist.")
    try:
        from decord import DECORDError, VideoReader
    except ImportError as error:
        raise DataError(
            f"cannot read video {file}: decord is not installed. `pip install decord` (eva-decord on a Mac)."
        ) from error
    try:
        reader = VideoReader(file, num_threads=1)
        pixels = reader.get_batch(_chosen(file, len(reader), num_frames)).asnumpy()  # [T, H, W, 3]
    except (DECORDError, RuntimeError) as error:
        raise DataError(f"cannot read video {file}: it is damaged or of no known format.") from error
    return [Image.fromarray(frame) for frame in pixels]
