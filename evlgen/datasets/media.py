"""Where the pictures and clips of a dataset come from, and what a person sees of them.

A name is that of a file, of a member of an archive (``photos.tar/0001.jpg``, or any name where the root is an
archive), of a cell of a table (see `evlgen.datasets.archive_media.cell_name`), or an address.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from evlgen.common.errors import DataError
from evlgen.common.images import open_image
from evlgen.common.io import NamedBytes, read_bytes, resolve
from evlgen.common.video import Video
from evlgen.datasets.annotations import check_folders
from evlgen.datasets.archive_media import Container, Place, open_container, split_cell, split_place


class Media:
    """Files by the names that annotations have for them.

    Args:
        root: the folder, or archive, that names are relative to. Absolute names and addresses stand for
            themselves.
    """

    what: str  # in messages: "image", "video"

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root)
        self._containers: dict[tuple[Path, str | None], Container] = {}

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
        if is_address(name):
            return name
        place = self.place(name)
        if place is None:
            return self.root / name
        if (cell := split_cell(name)) and cell.digest:
            return f"bytes {cell.digest}"
        stamp = os.stat(place.file)
        inside = place.member if place.column is None else f"{place.column}:{place.member}"
        return f"{place.file} {stamp.st_size} {stamp.st_mtime_ns} {inside}"

    def place(self, name: str) -> Place | None:
        """Where a picture lies inside a larger file; None for one in a file of its own."""
        return None if is_address(name) else split_place(os.path.join(self.root, name))

    def read(self, name: str) -> bytes:
        """The file as it is, for copying. Raises `DataError` or `OSError`."""
        if is_address(name):
            return read_bytes(_fetched(name))
        place = self.place(name)
        return read_bytes(self.root / name) if place is None else self._container(place).read(place.member)

    def check(self, names: Iterable[str], remedy: str) -> None:
        """Raises `DataError` where nothing can be there: a folder that names point into is missing, an
        archive cannot be read or has none of its members."""
        files: list[str] = []
        inside: dict[tuple[Path, str | None], list[Place]] = defaultdict(list)
        for name in names:
            place = self.place(name)
            if place is not None:
                inside[place.file, place.column].append(place)
            elif not is_address(name):
                files.append(name)
        check_folders(files, self.root, self.what, remedy)
        for places in inside.values():
            known = self._container(places[0]).names()
            if not any(self._container(place).has(place.member) for place in places):
                raise DataError(
                    f"{places[0].file} has none of the {len(places)} {self.what}s that are named, such as "
                    f"'{places[0].member}'; it has '{next(iter(known), 'nothing')}'. {remedy}"
                )

    def _container(self, place: Place) -> Container:
        """The opened file of a place: opened once, and its directory kept for worker processes."""
        key = place.file, place.column
        if key not in self._containers:
            self._containers[key] = open_container(place)
        return self._containers[key]


class ImageFiles(Media):
    """Pictures: `open` gives an upright RGB Pillow image."""

    what = "image"

    def open(self, name: str, draft_size: int | None = None) -> Image.Image:
        return open_image(self._file(name), draft_size)

    def picture(self, name: str) -> Image.Image:
        return self.open(name)

    def _file(self, name: str) -> Path | NamedBytes:
        if is_address(name):
            return _fetched(name)
        place = self.place(name)
        if place is None:
            return self.root / name
        return NamedBytes(self._container(place).read(place.member), os.path.join(self.root, name))


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
        if (place := self.place(name)) is not None:
            raise DataError(
                f"{place.file} is an archive, and clips are not read inside of one: unpack it, and name the "
                "folder.",
                "clip in an archive",
            )
        return Video(_fetched(name) if is_address(name) else self.root / name, self.reader)

    def picture(self, name: str) -> Image.Image:
        """The frame in the middle."""
        video = self.open(name)
        return Image.fromarray(video.read([len(video) // 2])[0])


def is_address(name: str) -> bool:
    """Whether a name is an http(s) address, which is fetched once into the cache."""
    return name.startswith(("http://", "https://"))


def _fetched(address: str) -> Path:
    try:
        return Path(resolve(address))
    except DataError as error:
        raise DataError(str(error), "not downloaded") from error
