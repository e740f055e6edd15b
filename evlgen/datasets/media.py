"""Where the pictures and clips of a dataset come from, and what a person sees of them."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from evlgen.common.images import open_image
from evlgen.common.video import Video
from evlgen.datasets.annotations import check_folders


class Media:
    """Files by the names that annotations have for them.

    Args:
        root: the folder that names are relative to. Absolute names stand for themselves.
    """

    what: str  # in messages: "image", "video"

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root)

    def open(self, name: str, draft_size: int | None = None) -> Any:
        """What a processor takes: see the subclasses. Raises `DataError` or `OSError`.

        Args:
            draft_size: where the file's format can be decoded smaller at less cost, it may be, as long as
                no side falls below so many pixels. None: as it is.
        """
        raise NotImplementedError(f"{type(self).__name__} must define open(name)")

    def picture(self, name: str) -> Image.Image:
        """What a person is shown of it."""
        raise NotImplementedError(f"{type(self).__name__} must define picture(name)")

    def source(self, name: str) -> Hashable:
        """What the pixels are made from; see `BaseDataset.visual_source`."""
        return self.root / name

    def check(self, names: Iterable[str], remedy: str) -> None:
        """Raises `DataError` where nothing can be there: a folder that names point into is missing."""
        check_folders(names, self.root, self.what, remedy)


class ImageFiles(Media):
    """Picture files: `open` gives an upright RGB Pillow image."""

    what = "image"

    def open(self, name: str, draft_size: int | None = None) -> Image.Image:
        return open_image(self.source(name), draft_size)

    def picture(self, name: str) -> Image.Image:
        return self.open(name)


class VideoFiles(Media):
    """Video files: `open` gives a `Video`, of which a processor decodes the frames it wants.

    Args:
        root: see `Media`.
        reader: see `Video`.
    """

    what = "video"

    def __init__(self, root: str | os.PathLike, reader: str = "auto") -> None:
        super().__init__(root)
        self.reader = reader

    def open(self, name: str, draft_size: int | None = None) -> Video:
        return Video(self.source(name), self.reader)

    def picture(self, name: str) -> Image.Image:
        """The frame in the middle."""
        video = self.open(name)
        return Image.fromarray(video.read([len(video) // 2])[0])
