"""Where the images and videos of a dataset come from, and what a person sees of them.

A name is that of a file, of a member of an archive (``photos.tar/0001.jpg``, or any name where the root is an
archive), of a cell of a table (see `evlgen.datasets.archive_media.cell_name`), or an address.
"""

from __future__ import annotations

import itertools
import logging
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from evlgen.common.errors import DataError
from evlgen.datasets.archive_media import Container, Place, open_container, split_cell, split_place
from evlgen.files.io import NamedBytes, read_bytes, resolve, scheme_of
from evlgen.media.images import open_image
from evlgen.media.video import Reader, Video

logger = logging.getLogger(__name__)


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
        self._has_told_of_backslashes = False

    def open(self, name: str, draft_size: int | None = None) -> Any:
        """What a processor takes: see the subclasses. Raises `DataError` or `OSError`.

        Args:
            draft_size: where the file's format can be decoded smaller at less cost, it may be, as long as
                no side falls below so many pixels. None: as it is.
        """
        raise NotImplementedError(f"{type(self).__name__} must define open(name)")

    def image(self, name: str) -> Image.Image:
        """What a person is shown of it."""
        raise NotImplementedError(f"{type(self).__name__} must define image(name)")

    def spelled(self, name: str) -> str:
        """A name as the files have it, where only that is there: ``a/1.png`` for Windows' ``a\\1.png``, and a
        letter with an accent (or a Korean one) in one character, or in parts as on Macs (Unicode's forms)."""
        if (name.isascii() and "\\" not in name) or is_address(name) or self._has(name):
            return name
        slashed = name.replace("\\", "/")
        others = (slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD")))
        found = next((other for other in others if other != name and self._has(other)), name)
        if "\\" in name and "\\" not in found and not self._has_told_of_backslashes:
            self._has_told_of_backslashes = True
            logger.warning("names with backslashes are read with slashes, such as %s for %r", found, name)
        return found

    def _has(self, name: str) -> bool:
        place = self.place(name)
        if place is None:
            return os.path.exists(os.path.join(self.root, name))
        try:
            return self._container(place).has(place.member)
        except DataError:
            return False

    def source(self, name: str) -> Hashable:
        """What the pixels are made from; see `BaseDataset.visual_source`."""
        if is_address(name):
            return name
        name = self.spelled(name)
        place = self.place(name)
        if place is None:
            return self.root / name
        if (cell := split_cell(name)) and cell.digest:
            return f"bytes {cell.digest}"
        try:
            return self._container(place).identity(place.member)
        except DataError:  # said where it is read
            return f"{place.file} {place.column} {place.member} cannot be read"

    def place(self, name: str) -> Place | None:
        """Where an image lies inside a larger file; None for one in a file of its own."""
        return None if is_address(name) else split_place(os.path.join(self.root, name))

    def read(self, name: str) -> bytes:
        """The file as it is, for copying. Raises `DataError` or `OSError`."""
        if is_address(name):
            return read_bytes(_fetched(name))
        name = self.spelled(name)
        place = self.place(name)
        return read_bytes(self.root / name) if place is None else self._container(place).read(place.member)

    def check(self, names: Iterable[str], remedy: str) -> None:
        """Looks for folders that are missing, and archives that cannot be read or have none of the members
        that are named. Where that is some of them, a warning says so, and the samples come out as `Skipped`.

        Raises:
            DataError: it is all of them.
        """
        addresses = 0
        folders: Counter[str] = Counter()
        inside: dict[tuple[Path, str | None], list[Place]] = defaultdict(list)
        for given, alike in itertools.groupby(names):  # of an image with five captions mostly in a row
            name, count = self.spelled(given), sum(1 for _ in alike)
            if is_address(name):
                addresses += count
            elif (place := self.place(name)) is None:
                folders[os.path.dirname(name)] += count
            else:
                inside[place.file, place.column] += [place] * count
        total = addresses + folders.total() + sum(map(len, inside.values()))
        problems = [*self._missing_folders(folders, total), *self._bad_containers(inside.values())]
        if not problems:
            return
        count, worst = max(problems)
        lost = sum(count for count, _ in problems)
        if lost == total:
            raise DataError(f"{worst} {remedy}")
        others = f" (It is so with {lost - count} elsewhere.)" if lost > count else ""
        logger.warning("%d of %d records will be skipped: %s%s %s", lost, total, worst, others, remedy)

    def _missing_folders(self, folders: Counter[str], total: int) -> Iterator[tuple[int, str]]:
        for folder, count in folders.items():
            path = os.path.join(self.root, folder)
            if not os.path.isdir(path):
                yield (
                    count,
                    f"{self.what} folder {path} is missing: {count} of {total} records point into it.",
                )

    def _bad_containers(self, containers: Iterable[list[Place]]) -> Iterator[tuple[int, str]]:
        for places in containers:
            first = places[0]
            try:
                container = self._container(first)
            except DataError as error:
                yield len(places), str(error)
                continue
            if not any(container.has(place.member) for place in places):
                yield (
                    len(places),
                    f"{first.file} has none of the {len(places)} {self.what}s that are named, such as "
                    f"'{first.member}'; it has '{next(iter(container.names()), 'nothing')}'.",
                )

    def _container(self, place: Place) -> Container:
        """The opened file of a place: opened once, and its directory kept for worker processes."""
        key = place.file, place.column
        if key not in self._containers:
            self._containers[key] = open_container(place)
        return self._containers[key]


class ImageFiles(Media):
    """Images: `open` gives an upright RGB Pillow image."""

    what = "image"

    def open(self, name: str, draft_size: int | None = None) -> Image.Image:
        return open_image(self._file(name), draft_size)

    def image(self, name: str) -> Image.Image:
        return self.open(name)

    def _file(self, name: str) -> Path | NamedBytes:
        if is_address(name):
            return _fetched(name)
        name = self.spelled(name)
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

    def __init__(self, root: str | os.PathLike, reader: Reader = "auto") -> None:
        super().__init__(root)
        self.reader = reader

    def open(self, name: str, draft_size: int | None = None) -> Video:
        name = self.spelled(name)
        if (place := self.place(name)) is not None:
            raise DataError(
                f"{place.file} is an archive, and videos are not read inside of one: unpack it, and name the "
                "folder.",
                "video in an archive",
            )
        return Video(_fetched(name) if is_address(name) else self.root / name, self.reader)

    def image(self, name: str) -> Image.Image:
        """The frame in the middle."""
        video = self.open(name)
        return Image.fromarray(video.read([len(video) // 2])[0])


def is_address(name: str) -> bool:
    """Whether a name is an address, of which `evlgen.files.io.resolve` makes a file: ``https://..``,
    ``evlgen://..``, and what else iopath has handlers for."""
    return scheme_of(name) is not None


def _fetched(address: str) -> Path:
    try:
        return Path(resolve(address))
    except DataError as error:
        raise DataError(str(error), "not downloaded") from error
    except Exception as error:  # whatever a handler raises that somebody registered
        raise DataError(
            f"{address} cannot be fetched: {error or type(error).__name__}", "not downloaded"
        ) from error
