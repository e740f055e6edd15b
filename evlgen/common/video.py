"""Reading videos: a file becomes upright RGB frames, of which only the wanted ones are decoded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import numpy as np

Reader = Literal["auto", "decord", "pyav"]


class Video:
    """A video file, opened when it is first asked for something.

    Args:
        path: anything iopath knows.
        reader: the library that decodes; ``auto``: decord where it is installed, else PyAV.

    Raises:
        DataError: (by its methods) missing, damaged, of no known format; no reader is installed.
    """

    def __init__(self, path: str | os.PathLike, reader: Reader = "auto") -> None:
        self.path, self.reader = path, reader

    def __len__(self) -> int:
        """The number of frames."""
        raise NotImplementedError

    def read(self, indices: Sequence[int], size: tuple[int, int] | None = None) -> np.ndarray:
        """Frames, upright.

        Args:
            indices: of the frames, ascending; an index may be there twice.
            size: (height, width) to resize to while decoding; None: as they are.

        Returns:
            uint8 [T, H, W, 3].
        """
        raise NotImplementedError
