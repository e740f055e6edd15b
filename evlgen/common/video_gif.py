"""Animated GIFs, read by Pillow. See `evlgen.common.video`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from evlgen.common.images import open_image, to_rgb


class File:
    """An open GIF file. Raises `DataError` where it is none."""

    ERRORS = (OSError, EOFError, SyntaxError, ValueError)

    def __init__(self, file: str) -> None:
        open_image(file)  # says what is wrong with it
        self._image = Image.open(file, formats=["GIF"])
        self.num_frames = self._image.n_frames

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for index in indices:
            self._image.seek(index)
            yield np.asarray(to_rgb(self._image.copy()))

    def close(self) -> None:
        self._image.close()
