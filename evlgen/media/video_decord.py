"""Videos, read by decord. See `evlgen.media.video`.

decord 0.6.0 ends the process where a damaged header claims more frames than there is memory for. Each file is
therefore opened by a helper process first.
"""

from __future__ import annotations

import bisect
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

import decord
import numpy as np

from evlgen.common.errors import DataError

decord.logging.set_level(decord.logging.QUIET)  # else ffmpeg writes every trouble to stderr

_NONE = 1e-9  # the share of frames that decord may make up from their neighbours; it takes 0 for any
_PACKETS = (188, 192, 204)  # bytes of an MPEG transport stream's packets: plain, with times, with check sums
_DAY = 24 * 3600  # seconds; a time that is missing shows as millions of years before the start


class File:
    """An open video file.

    Frames are read from the first one on, without seeking: see the module this belongs to for why. decord
    seeks where it skips past a key frame, so it is made to skip to the frame before each, and to decode that.
    It knows the frames to skip by their times; where these are missing, every frame is decoded.
    """

    def __init__(self, file: str) -> None:
        if _is_transport_stream(file):
            raise DataError(
                f"cannot read video {file}: decord finds wrong frames in MPEG transport streams. PyAV reads "
                'them: pip install "evlgen[pyav]", and take the reader auto or pyav.',
                "not a video",
            )
        if not _opener.can_open(file):
            raise DataError(f"cannot read video {file}: it is damaged.", "damaged video")
        self._reader = decord.VideoReader(file, num_threads=1, fault_tol=_NONE)
        self._keys = self._reader.get_key_indices()
        self.num_frames = len(self._reader)
        times = self._reader.get_frame_timestamp(range(self.num_frames))[:, 0]  # seconds
        self._has_times = len(np.unique(times)) == self.num_frames and bool((times > -_DAY).all())

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        at = 0
        for index in indices:
            while at < index:
                at = self._skip(at, index)
            yield _without_padding(self._reader.next().asnumpy())
            at = index + 1

    def _skip(self, at: int, index: int) -> int:
        """Goes on towards ``index``, at most to the next key frame; where it is now."""
        if not self._has_times:
            self._reader.next()
            return at + 1
        following = bisect.bisect_right(self._keys, at)
        key = self._keys[following] if following < len(self._keys) else index + 1
        if key > index:
            self._reader.skip_frames(index - at)
            return index
        if key - 1 > at:
            self._reader.skip_frames(key - 1 - at)
        self._reader.next()
        return key

    def close(self) -> None:
        self._reader = None


def _without_padding(frame: np.ndarray) -> np.ndarray:
    """RGB, uint8 [H, W, 3]. ffmpeg pads rows, and where that is enough decord 0.6.0 takes it for channels: of
    frames 16, 24 or 48 pixels wide for the fourth to the sixth."""
    height, width = frame.shape[:2]
    return frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def _is_transport_stream(file: str) -> bool:
    """Whether packets of one size begin with 0x47, each of them (ISO/IEC 13818-1, 2.4.3.2)."""
    with open(file, "rb") as opened:
        start = opened.read(4096)
    columns = (start[first::size] for size in _PACKETS for first in range(min(size, len(start))))
    return any(len(column) > 4 and set(column) == {0x47} for column in columns)


class _Opener:
    """The helper process, of which each process that reads videos has its own."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._owner = 0

    def can_open(self, file: str) -> bool:
        """Whether the helper outlives opening a file. It does where decord raises an error."""
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-c", _HELPER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for those it serves
            )
        try:
            assert self._process.stdin and self._process.stdout
            self._process.stdin.write(os.fsencode(os.path.abspath(file)).hex().encode() + b"\n")
            self._process.stdin.flush()
            is_alive = bool(self._process.stdout.readline())
        except BrokenPipeError:
            is_alive = False
        if not is_alive:  # until it has ended, `poll` does not know, and the next file would fail too
            self._process.wait()
        return is_alive


# Reads names of files, in hexadecimal digits, and answers each with a line, until its input ends.
_HELPER = """
import os, sys
import decord
decord.logging.set_level(decord.logging.QUIET)
for line in sys.stdin:
    try:
        decord.VideoReader(os.fsdecode(bytes.fromhex(line)), num_threads=1, fault_tol=1e-9)
    except Exception:
        pass
    print(flush=True)
"""
_opener = _Opener()
