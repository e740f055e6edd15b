"""Picture files and clips: finding them, and reading their frames."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageSequence

from evlgen.common.errors import DataError
from evlgen.common.images import open_image, to_rgb
from evlgen.common.io import resolve

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
VIDEO_SUFFIXES = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv"}


def find_files(paths: Sequence[str], clips: bool) -> list[str]:
    """The paths, and in the place of a folder the pictures in it, by name; its videos too where ``clips``."""
    suffixes = PICTURE_SUFFIXES | VIDEO_SUFFIXES if clips else PICTURE_SUFFIXES
    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            found += [str(p) for p in sorted(Path(path).iterdir()) if p.suffix.lower() in suffixes]
        else:
            found.append(path)
    return found


def read_files(paths: Sequence[str], num_frames: int | None) -> Iterator[tuple[str, list[Image.Image]]]:
    """(path, frames) of each file that can be read; the others are named in a warning.

    Args:
        num_frames: of a clip at most; None: pictures alone are read.
    """
    for path in paths:
        try:
            if num_frames is not None:
                frames = read_frames(path, num_frames)
            elif Path(path).suffix.lower() in VIDEO_SUFFIXES:
                raise DataError(f"{path} is a video; models of clips read those, such as evlgen_video_opt.")
            else:
                frames = [open_image(resolve(path))]
        except DataError as error:
            logger.warning("left out: %s", error)
            continue
        yield path, frames


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
