"""Image files and videos: finding them, and reading their frames."""

from __future__ import annotations

import base64
import io
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from evlgen.common.errors import DataError
from evlgen.common.safe_text import shown_name
from evlgen.files.io import resolve
from evlgen.media.images import IMAGE_SUFFIXES, open_image
from evlgen.media.video import VIDEO_SUFFIXES, Video, spread

logger = logging.getLogger(__name__)


def find_files(paths: Sequence[str], videos: bool) -> list[str]:
    """The paths, and in the place of a folder the images in it and in its folders, by name; its videos too
    where ``videos``."""
    suffixes = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) if videos else IMAGE_SUFFIXES
    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            found += [name for name in _walked(path) if Path(name).suffix.lower() in suffixes]
        else:
            found.append(path)
    return found


def without_result(paths: Sequence[str], done: Collection[str], videos: bool) -> list[str]:
    """Those of the paths given to `find_files` of which no file is among ``done``."""
    return [path for path in paths if not any(name in done for name in find_files([path], videos))]


def _walked(folder: str) -> Iterator[str]:
    """The files in a folder, then those in its folders, by name; links to folders are followed once. Hidden
    folders are left out."""
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_warn):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(root, name) for name in sorted(names))


def _warn(error: OSError) -> None:
    logger.warning("left out: folder %s: %s", shown_name(error.filename), error.strerror)


def read_files(
    paths: Iterable[str],
    num_frames: int | None,
    on_error: Callable[[str, DataError], None] = lambda path, error: None,
) -> Iterator[tuple[str, list[Image.Image]]]:
    """(path, frames) of each file that can be read; the others are named in a warning.

    Args:
        num_frames: of a video at most; None: images alone are read.
        on_error: called for each file that cannot be read.
    """
    for path in paths:
        try:
            if num_frames is not None:
                frames = read_frames(path, num_frames)
            elif Path(path).suffix.lower() in VIDEO_SUFFIXES:
                raise DataError(
                    f"{shown_name(path)} is a video; models of videos read those, such as evlgen_video_opt."
                )
            else:
                frames = [open_image(resolve(path))]
        except DataError as error:
            logger.warning("left out: %s", error)
            on_error(path, error)
            continue
        yield path, frames


def read_frames(path: str | Path, num_frames: int) -> list[Image.Image]:
    """One image, or of a video (video file, animated GIF) at most ``num_frames`` frames, evenly spaced from
    its first. A video of fewer frames is named in a warning, and gives those it has.

    Raises:
        DataError: it is missing, or nothing that can be read.
    """
    suffix = Path(path).suffix.lower()
    if suffix != ".gif" and suffix not in VIDEO_SUFFIXES:
        return [open_image(resolve(path))]
    video = Video(path)
    count = len(video)
    if 1 < count < num_frames:
        logger.warning(
            "%s has %d frames, fewer than the %d asked for: each is taken once",
            shown_name(path),
            count,
            num_frames,
        )
    return [Image.fromarray(frame) for frame in video.read(spread(count, min(count, num_frames)))]


def is_data_address(name: str) -> bool:
    """Whether a name is the image itself, ``data:image/png;base64,..``."""
    return name.startswith("data:")


def decode_address(address: str) -> io.BytesIO:
    """The bytes in a data address. Raises `DataError` where there are none."""
    head, found, content = address.partition(",")
    try:
        if not found or not head.endswith(";base64"):
            raise ValueError("it is not base64")
        return io.BytesIO(base64.b64decode(content, validate=True))
    except ValueError as error:
        raise DataError(f"the address {address:.40} holds no image: {error}.", "not an image") from error
