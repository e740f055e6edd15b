"""Reading videos: a file becomes upright RGB frames, of which only the wanted ones leave the decoder.

Two libraries decode, and give the same frames: numbered in the order they are shown, converted to RGB at
their own size, and resized one by one with Pillow. Video of 8 bits with an even height, which is nearly all
there is, comes out the same bit for bit. Where the height is odd (4:2:0) or colours have more bits (4:2:0,
4:2:2), the ffmpegs inside them interpolate colours differently: in MSR-VTT videos re-encoded so, values of
0 to 255 differed by 0.6 on average, 99 of 100 by at most 6 and single ones by 36. They get to a frame in two
ways:

- PyAV (``pip install "evlgen[pyav]"``) seeks to the key frame before a wanted frame and knows by the frames'
  times where it is; files without such times (AVI, MPEG programme streams) are read from their start.
- decord, which comes with this package, reads on from the first frame and drops what is not wanted. Its own
  seeking is not used: decord 0.6.0 lands up to 110 frames off in AVI, MPEG, WMV and HEVC files and in H.264
  with open groups of images. For videos of seconds that costs little. It reads no AV1, and of MPEG transport
  streams the wrong frames, which is why they are refused.

Of a damaged file both give what they can decode, numbered as it comes, and refuse what lies behind its end.
What they give is checked; where it cannot be right, the other reader is tried where it is installed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from evlgen.common.errors import DataError, EVLGenError
from evlgen.common.safe_text import shown_name
from evlgen.files.io import resolve

Reader = Literal["auto", "decord", "pyav"]
_MODULES: dict[Reader, str] = {"pyav": "av", "decord": "decord"}
Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of a frame's width and height
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
# How lists of other files begin (HLS, ffmpeg's concat, DASH and other XML): ffmpeg would read those files.
_LIST = re.compile(rb"#EXTM3U|ffconcat|(\xef\xbb\xbf)?\s*<[?!\w][^\0]{16}")
#: How video files are called; where a sample has several, the first is taken. A GIF is an image, too.
VIDEO_SUFFIXES = (
    *(".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp"),
    *(".ts", ".mts", ".m2ts"),
)


class VideoSource:
    """Frames in the order they are shown. A subclass defines `__len__` and `frames`."""

    def __len__(self) -> int:
        """The number of frames."""
        raise NotImplementedError

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """The frames of ascending, different indices, each upright RGB: uint8 [H, W, 3]."""
        raise NotImplementedError

    def read(
        self, indices: Sequence[int], size: tuple[int, int] | None = None, box: Box = WHOLE
    ) -> np.ndarray:
        """Frames, upright.

        Args:
            indices: of the frames; an index may be there twice.
            size: (height, width) to which each is resized as it is decoded; None: as they are.
            box: the part of every frame to resize to ``size``.

        Returns:
            uint8 [T, H, W, 3].

        Raises:
            IndexError: there is no such frame.
            DataError: the frames are not uint8 [H, W, 3], all of one size.
        """
        wanted = sorted(set(indices))
        if wanted and not 0 <= wanted[0] <= wanted[-1] < len(self):
            raise IndexError(f"frames {wanted[0]} to {wanted[-1]} of a video of {len(self)} frames.")
        frames = _checked(self.frames(wanted))
        found = {i: _resized(f, size, box) for i, f in zip(wanted, frames, strict=True)}
        return np.stack([found[i] for i in indices])


class FrameList(VideoSource):
    """Frames that are in memory: uint8 arrays [H, W, 3] or RGB Pillow images."""

    def __init__(self, images: Sequence[np.ndarray | Image.Image]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        return (np.asarray(self.images[i]) for i in indices)


Clip, Pictures = VideoSource, FrameList  # their earlier names, for processors and scripts that have them


class Video(VideoSource):
    """A video file or animated GIF, opened when it is first asked for something and closed after `read`.

    Args:
        path: anything iopath knows.
        reader: the library that decodes; ``auto``: PyAV where it is installed, else decord. What is a GIF
            inside is read by Pillow.

    Raises:
        DataError: (by its methods) missing, damaged, of no known format; no reader is installed. Its
            ``cause`` says which of these.
    """

    def __init__(self, path: str | os.PathLike, reader: Reader = "auto") -> None:
        self.path, self.reader = path, reader
        self._opened: tuple[int, Any] | None = None  # the process that opened the file, and the open file

    def __len__(self) -> int:
        return self._open().num_frames

    def read(
        self, indices: Sequence[int], size: tuple[int, int] | None = None, box: Box = WHOLE
    ) -> np.ndarray:
        try:
            return super().read(indices, size, box)
        except _WrongFrames as error:
            for reader in self._other_readers():
                with contextlib.suppress(DataError, IndexError):  # the first reader's error says more
                    return VideoSource.read(Video(self.path, reader), indices, size, box)
            raise DataError(f"cannot read video {shown_name(self.path)}: {error}", error.cause) from error

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        file = self._open()
        try:
            yield from file.frames(indices)
        except EVLGenError:
            raise
        except Exception as error:  # damaged files make the libraries raise whatever Python has
            raise DataError(
                f"cannot read video {shown_name(self.path)}: it is damaged.", "damaged video"
            ) from error
        finally:
            self._opened = None
            file.close()

    def _other_readers(self) -> list[Reader]:
        if _is_gif(resolve(self.path)):
            return []
        used = installed_reader(self.reader)
        return [name for name in _MODULES if name != used and importlib.util.find_spec(_MODULES[name])]

    def _open(self) -> Any:
        """The open file. A process that was forked opens its own: the two would share one position."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), _open(self.path, self.reader))
        return self._opened[1]


class _WrongFrames(DataError):
    """Frames as no reader should give them."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "wrong frames")


def _checked(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    first = None
    for frame in frames:
        shape: tuple[int, ...] = getattr(frame, "shape", ())
        dtype = getattr(frame, "dtype", type(frame).__name__)
        if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise _WrongFrames(f"a frame is {dtype} {list(shape)} instead of uint8 [height, width, 3].")
        first = first or shape
        if shape != first:
            raise _WrongFrames(
                f"its frames differ in size: {first[1]} x {first[0]} and {shape[1]} x {shape[0]} pixels."
            )
        yield frame


def _open(path: str | os.PathLike, reader: Reader) -> Any:
    """A ``File`` of evlgen.media.video_{decord,pyav,gif}: ``num_frames`` is counted, as the number in a
    file's header is often missing and sometimes wrong, ``frames`` is as in `VideoSource`, and there is
    ``close``. They raise whatever their libraries do."""
    file = resolve(path)
    problem = _problem(file)
    if problem is not None:
        raise DataError(f"cannot read video {shown_name(path)}: {problem[0]}", problem[1])
    if _LIST.match(_start_of(file)):
        raise DataError(f"cannot read video {shown_name(path)}: it is a list of other files.", "not a video")
    name = "gif" if _is_gif(file) else installed_reader(reader)
    opener = importlib.import_module(f"evlgen.media.video_{name}").File
    try:
        opened = opener(file)
    except EVLGenError:
        raise
    except Exception as error:
        more = ' PyAV reads more of them: pip install "evlgen[pyav]".' if name == "decord" else ""
        raise DataError(
            f"cannot read video {shown_name(path)}: it is damaged, or no video of a format that {name} "
            f"reads.{more}",
            "not a video",
        ) from error
    if not opened.num_frames:
        raise DataError(f"cannot read video {shown_name(path)}: it has no frames.", "damaged video")
    return opened


def _is_gif(file: str) -> bool:
    """Whether a file that is there holds a GIF, whatever it is called: sites serve MP4 under .gif names."""
    return _start_of(file).startswith((b"GIF87a", b"GIF89a"))


def _start_of(file: str) -> bytes:
    with open(file, "rb") as opened:
        return opened.read(64)


def installed_reader(reader: Reader) -> Reader:
    """``decord`` or ``pyav``: what ``reader`` stands for on this machine.

    Raises:
        DataError: it is not installed.
    """
    candidates: list[Reader] = list(_MODULES) if reader == "auto" else [reader]
    for name in candidates:
        if importlib.util.find_spec(_MODULES[name]) is not None:
            return name
    raise DataError(
        f"no video can be read: {' or '.join(candidates)} is not installed. "
        '`pip install "evlgen[pyav]"`, or `pip install decord` (eva-decord on a Mac).',
        "no video reader",
    )


def _problem(file: str) -> tuple[str, str] | None:
    """Why there is nothing to decode at all, and the `DataError.cause` of it."""
    if not os.path.exists(file):
        return "the file does not exist.", "missing file"
    if not os.path.isfile(file):
        return ("it is a folder." if os.path.isdir(file) else "it is not a regular file."), "not a file"
    if not os.access(file, os.R_OK):
        return "no permission to read it.", "no permission"
    if not os.path.getsize(file):
        return "the file is empty.", "empty file"
    return None


def _resized(frame: np.ndarray, size: tuple[int, int] | None, box: Box) -> np.ndarray:
    height, width = frame.shape[:2]
    if size is None or (size == (height, width) and box == WHOLE):
        return frame
    pixels = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
    return np.asarray(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BICUBIC, pixels))


def spread(count: int, wanted: int) -> list[int]:
    """``wanted`` of ``count`` positions, evenly spaced from the first on (LAVIS's ``uniform``); some of them
    more than once where there are fewer."""
    return [i * count // wanted for i in range(wanted)]
