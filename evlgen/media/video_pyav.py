"""Videos, read by PyAV. See `evlgen.media.video`."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

import av
import numpy as np
from PIL import Image

# Containers that store no times at which frames are shown, or not for every frame: what ffmpeg makes up for
# frames that are stored in another order than they are shown in is wrong.
_WITHOUT_TIMES = ("avi", "mpeg")


class File:
    """An open video file. A frame is found by the time at which it is shown, where the file has such times
    and a key frame can be sought by them; else by counting from the first frame on."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._container = _opened(file)
        packets = [p for p in self._container.demux(video=0) if p.size and not p.is_discard]
        self.num_frames = len(packets)
        self._times = sorted(p.pts for p in packets if p.pts is not None)  # by frame
        self._keys = sorted(p.pts for p in packets if p.pts is not None and p.is_keyframe)
        named = self._container.format.name not in _WITHOUT_TIMES
        self._has_times = named and bool(self._keys) and len(set(self._times)) == self.num_frames

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        left = list(indices)
        for frame in self._sought(indices) if self._has_times else ():
            left.pop(0)
            yield _upright(frame)
        yield from map(_upright, self._counted(left))

    def _sought(self, indices: Sequence[int]) -> Iterator[av.VideoFrame]:
        """The frames as long as they are where their times say."""
        decoded: Iterator[av.VideoFrame] = iter(())
        now = None  # time of the last frame decoded
        for index in indices:
            time = self._times[index]
            key = self._keys[max(0, bisect.bisect_right(self._keys, time) - 1)]
            if now is None or now < key:
                decoded = self._from(key)
            frame = next((f for f in decoded if f.pts is None or f.pts >= time), None)
            if frame is None or frame.pts != time:
                return
            now = time
            yield frame

    def _from(self, key: int) -> Iterator[av.VideoFrame]:
        stream = self._container.streams.video[0]
        self._container.seek(key, stream=stream)
        return self._container.decode(stream)

    def _counted(self, indices: Sequence[int]) -> Iterator[av.VideoFrame]:
        if not indices:
            return
        self.close()
        self._container = _opened(self._file)
        wanted = set(indices)
        for index, frame in enumerate(self._container.decode(video=0)):
            if index in wanted:
                yield frame
                wanted.discard(index)
            if not wanted:
                return
        raise av.InvalidDataError(0, "frames are missing at the end", self._file)

    def close(self) -> None:
        self._container.close()


def _opened(file: str) -> av.container.InputContainer:
    container = av.open(file, metadata_errors="ignore")
    if not container.streams.video or container.streams.video[0].codec_context is None:
        container.close()
        raise av.InvalidDataError(0, "no video stream, or of a codec that is not known", file)
    codec = container.streams.video[0].codec_context
    codec.thread_count = 1  # the loader has a process for each core
    if Image.MAX_IMAGE_PIXELS is not None:
        codec.options = {"max_pixels": str(Image.MAX_IMAGE_PIXELS)}  # of a frame; larger ones are damage
    return container


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """RGB, uint8 [H, W, 3], turned as the file's display matrix says (counter-clockwise, in degrees)."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
