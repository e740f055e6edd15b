"""Animated GIFs, read by Pillow. See `evlgen.media.video`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from evlgen.media.images import decoding, open_image, to_rgb


class File:
    """An open GIF file. Its methods raise `DataError` where it is damaged, or is not a GIF file."""

    def __init__(self, file: str) -> None:
        open_image(file)  # says what is wrong with it
        self._file = file
        with decoding(file):
            self._image = Image.open(file, formats=["GIF"])
            self._whole = (0, 0, *self._image.size)
            self.num_frames: int = getattr(self._image, "n_frames", 1)

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for index in indices:
            with decoding(self._file):
                self._image.seek(index)
                # Pillow enlarges the image for a frame that lies outside of it, which browsers cut off.
                frame = np.asarray(to_rgb(self._image.crop(self._whole)))
            yield frame

    def close(self) -> None:
        self._image.close()
