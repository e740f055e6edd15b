"""Videos and animated GIFs, damaged, for each library that reads them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from evlgen.media.video import Video, spread
from fuzzing.images import few_pixels
from fuzzing.mutate import mutate

_FRAMES, _SIZE = 12, (48, 64)
_CODECS = {
    "a.avi": "mpeg4", "b.mp4": "libx264", "c.mkv": "libx265", "d.webm": "libvpx-vp9", "e.mpg": "mpeg1video",
    "f.wmv": "wmv2", "g.mov": "mpeg4", "h.flv": "flv", "i.ts": "mpeg2video", "j.mkv": "ffv1",
    "k.mp4": "mpeg4", "l.avi": "mjpeg",
}  # fmt: skip


class Reader:
    """What the campaign needs of a reader: ``pyav``, ``decord`` or ``gif``."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def prepare(self, folder: Path) -> None:
        """Whole videos."""
        (folder / "whole").mkdir()
        if self.__name__ == "gif":
            _save_gifs(folder / "whole")
            return
        for name, codec in _CODECS.items():
            if not (self.__name__ == "decord" and name.endswith(".ts")):  # which is refused unread
                _encode(folder / "whole" / name, codec)

    def damaged(
        self, folder: Path, rng: random.Random, keep: Callable[[Path], None]
    ) -> tuple[str, Callable[[], None]]:
        """What is damaged, and its reading."""
        whole = rng.choice(sorted((folder / "whole").iterdir()))
        path = folder / f"damaged{whole.suffix}"
        path.write_bytes(mutate(whole.read_bytes(), rng))
        keep(path)
        size = rng.choice((None, (16, 16)))
        reader = "auto" if self.__name__ == "gif" else self.__name__
        return whole.name, lambda: _read(path, reader, size)


def _read(path: Path, reader: str, size: tuple[int, int] | None) -> None:
    with few_pixels():
        video = Video(path, reader)
        frames = video.read(spread(len(video), 4), size)
    assert frames.dtype == np.uint8 and frames.shape[::4] == (4,) and frames.shape[3] == 3


def _pixels() -> list[np.ndarray]:
    rows, columns = np.indices(_SIZE)
    return [
        np.stack([rows * 2 + 10 * i, columns * 2 + 30, 200 - rows - columns], 2).astype(np.uint8)
        for i in range(_FRAMES)
    ]


def _encode(path: Path, codec: str) -> None:
    import av

    with av.open(path, "w") as file:
        quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        stream = file.add_stream(codec, rate=25, options=quiet)
        stream.height, stream.width = _SIZE
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size = 5
        for i, pixels in enumerate(_pixels()):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = i
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def _save_gifs(folder: Path) -> None:
    frames = [Image.fromarray(pixels[:16, :20]) for pixels in _pixels()[:5]]
    rest = {"save_all": True, "append_images": frames[1:]}
    frames[0].save(folder / "plain.gif", **rest)
    frames[0].save(folder / "disposed.gif", disposal=[2, 3, 1, 0, 2], loop=0, comment=b"c" * 300, **rest)
    clear = [frame.convert("RGBA") for frame in frames]
    for i, frame in enumerate(clear):
        frame.paste((0, 0, 0, 0), (i, i, i + 5, i + 5))
    clear[0].save(folder / "clear.gif", save_all=True, append_images=clear[1:], disposal=2)
    frames[0].quantize(4).save(folder / "interlaced.gif", interlace=True)
