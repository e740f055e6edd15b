"""``build_info`` of datasets in files: where annotations and media lie, and what of them is missing. Keys are
LAVIS's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from evlgen.config.catalogue import command_for, command_that_explains
from evlgen.files.archives import is_archive
from evlgen.files.io import cache_root, near_name


@dataclass(frozen=True)
class Annotation:
    """An annotation in one file or in several that are read one after the other, with an address for each.

    Args:
        storage: paths, absolute or relative to the data root.
        url: addresses of the files, or of the archives that fill a folder.
        md5: of what is at ``url``, in the same order.
    """

    storage: str | list[str]
    url: str | list[str] | None = None
    md5: str | list[str] | None = None

    def downloads(self) -> list[str]:
        """``https://.. (md5 ..)`` for each address."""
        sums = as_list(self.md5)
        return [f"{url} (md5 {sums[i]})" if i < len(sums) else url for i, url in enumerate(as_list(self.url))]


@dataclass(frozen=True)
class Source(Annotation):
    """A file or folder of a dataset: as an annotation, in one place."""

    storage: str


@dataclass(frozen=True)
class BuildInfo:
    """``build_info`` of a dataset in files.

    Args:
        annotations: the file, or files, of each split.
        images: the folder that file names in the annotations are relative to.
        videos: likewise, for videos.
        ground_truth: files to score against, by split. A missing file is ignored.
    """

    annotations: dict[str, Annotation]
    images: Source | None = None
    videos: Source | None = None
    ground_truth: dict[str, Source] = field(default_factory=dict)


@dataclass(frozen=True)
class DataFiles:
    """The files of a dataset on this machine.

    Args:
        name: the dataset's, in messages.
        data_root: that relative storage paths start from.
        info: where everything is.
        data_type: ``images`` or ``videos``, which of the two the dataset has.
        path_of: the path of a storage; None of an address, which is fetched when it is read.
    """

    name: str
    data_root: Path
    info: BuildInfo
    data_type: str
    path_of: Callable[[str], Path | None]

    def missing(self, splits: Iterable[str]) -> list[str]:
        """What these splits need and is not there: a line each, with place and remedy."""
        lines = []
        for split in splits:
            source = self.info.annotations[split]
            for i, storage in enumerate(as_list(source.storage)):
                path = self.path_of(storage)
                if path is not None and not os.path.isfile(path):
                    remedy = self._remedy(storage, source.downloads()[i : i + 1], "to that path")
                    lines.append(f"{self.name}: the {split} annotation is not at {path}. {remedy}")
        root = self.path_of(self._media.storage)
        if root is not None and not (os.path.isdir(root) or (is_archive(root) and os.path.isfile(root))):
            what = self.data_type.removesuffix("s")
            lines.append(f"{self.name}: the {what} folder is not at {root}. {self.media_remedy()}")
        return lines

    def media_remedy(self) -> str:
        """What to do where images or videos are missing."""
        source, key = self._media, f"datasets.{self.name}.build_info.{self.data_type}.storage"
        return (
            f"{self._remedy(source.storage, source.downloads(), 'and unpack into that folder')} "
            f"{self.data_type.capitalize()} kept elsewhere: set {key} to their folder."
        )

    @property
    def _media(self) -> Source:
        return getattr(self.info, self.data_type)

    def _remedy(self, storage: str, downloads: list[str], where: str) -> str:
        if command := command_for(self.name, storage):
            elsewhere = self.data_root.resolve() != cache_root()
            fetch = f"Run `{command} --to {self.data_root}`" if elsewhere else f"Run `{command}`"
        else:
            fetch = f"Download {' and '.join(downloads)} {where}" if downloads else "Put it there"
            if not downloads and (path := self.path_of(storage)) and (near := near_name(path)):
                return f"{near.strip()} {fetch}, or set EVLGEN_CACHE to the data root that has it."
            if not downloads and (command := command_that_explains(self.name)):
                fetch += f" (`{command}` says where it is to be had)"
        return f"{fetch}, or set EVLGEN_CACHE to the data root that has it."


def as_list(value: str | list[str] | None) -> list[str]:
    """One value, several or none, as a list."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)
