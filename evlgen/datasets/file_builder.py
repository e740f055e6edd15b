"""Builders of datasets in files: annotations, a media folder, ground truth. Keys are LAVIS's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from evlgen.common.errors import ConfigError
from evlgen.config.catalogue import command_for, command_that_explains
from evlgen.config.schema import build_dataclass
from evlgen.datasets.base_builder import BaseDatasetBuilder
from evlgen.datasets.media import ImageFiles, Media, VideoFiles
from evlgen.files.archives import is_archive
from evlgen.files.io import cache_root
from evlgen.media.video import Reader


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


S = TypeVar("S", bound=Annotation)


class FileBuilder(BaseDatasetBuilder):
    """A dataset whose files are named in ``build_info``. A subclass defines `build_split`.

    Args:
        build_info: see `BuildInfo`.
        data_type: ``images`` or ``videos``: what the annotations' file names are.
        video_reader: the library that decodes videos; see `evlgen.media.video`.
    """

    def __init__(
        self,
        name: str,
        cache_root: str | Path,
        vis_processor: dict,
        text_processor: dict,
        build_info: BuildInfo,
        data_type: Literal["images", "videos"] = "images",
        dataset_card: str | None = None,
        video_reader: Reader = "auto",
    ) -> None:
        super().__init__(name, cache_root, vis_processor, text_processor)
        self.video_reader = video_reader
        self.data_type = data_type
        self.dataset_card = dataset_card
        self.build_info = self._checked(build_info)

    @property
    def splits(self) -> list[str]:
        return list(self.build_info.annotations)

    @property
    def media_source(self) -> Source:
        """The folder of images or videos, and where it comes from."""
        return getattr(self.build_info, self.data_type)

    def media(self) -> Media:
        """Where this dataset's images or videos are read."""
        root = self.source_path(self.media_source)
        return ImageFiles(root) if self.data_type == "images" else VideoFiles(root, self.video_reader)

    def missing(self, splits: Iterable[str] | None = None) -> list[str]:
        lines = []
        for split in self.splits if splits is None else splits:
            source = self.build_info.annotations[split]
            for i, storage in enumerate(as_list(source.storage)):
                path = self._local(storage)
                if path is not None and not os.path.isfile(path):
                    remedy = self._remedy(storage, source.downloads()[i : i + 1], "to that path")
                    lines.append(f"{self.name}: the {split} annotation is not at {path}. {remedy}")
        root = self._local(self.media_source.storage)
        if root is not None and not (os.path.isdir(root) or (is_archive(root) and os.path.isfile(root))):
            what = self.data_type.removesuffix("s")
            lines.append(f"{self.name}: the {what} folder is not at {root}. {self.media_remedy()}")
        return lines

    def annotation_files(self, split: str) -> list[tuple[Path, bool]]:
        """The annotation files of a split, fetched where they are addresses, and whether each comes from an
        address: its file names are then not to lead out of the media folder (`check_inside`)."""
        source = self.build_info.annotations[split]
        storages = as_list(source.storage)
        return [(self.source_path(source, i), bool(source.url) or _is_url(s)) for i, s in enumerate(storages)]

    def ground_truth_file(self, split: str) -> Path | None:
        """The file to score a split against, or None where there is none."""
        source = self.build_info.ground_truth.get(split)
        path = self.source_path(source) if source else None
        return path if path is not None and os.path.isfile(path) else None

    def source_path(self, source: Annotation, index: int = 0) -> Path:
        """Where a source's file is; an address is fetched, and must have the source's sum."""
        sums = as_list(source.md5)
        return self.storage_path(as_list(source.storage)[index], sums[index] if index < len(sums) else None)

    def media_remedy(self) -> str:
        """What to do where images or videos are missing."""
        source, key = self.media_source, f"datasets.{self.name}.build_info.{self.data_type}.storage"
        return (
            f"{self._remedy(source.storage, source.downloads(), 'and unpack into that folder')} "
            f"{self.data_type.capitalize()} kept elsewhere: set {key} to their folder."
        )

    def _remedy(self, storage: str, downloads: list[str], where: str) -> str:
        if command := command_for(self.name, storage):
            elsewhere = self.cache_root.resolve() != cache_root()
            fetch = f"Run `{command} --to {self.cache_root}`" if elsewhere else f"Run `{command}`"
        else:
            fetch = f"Download {' and '.join(downloads)} {where}" if downloads else "Put it there"
            if not downloads and (command := command_that_explains(self.name)):
                fetch += f" (`{command}` says where it is to be had)"
        return f"{fetch}, or set EVLGEN_CACHE to the data root that has it."

    def _local(self, storage: str) -> Path | None:
        """The path a storage must be at; None for addresses, which are fetched when they are read."""
        return None if _is_url(storage) else self.storage_path(storage)

    def _checked(self, given: BuildInfo | Mapping[str, Any]) -> BuildInfo:
        path = f"datasets.{self.name}.build_info"
        info = given if isinstance(given, BuildInfo) else build_dataclass(BuildInfo, given, path)
        if not info.annotations:
            raise ConfigError(
                f"{path}.annotations: names no split. Give it one, such as "
                "{train: {storage: train.json}}."
            )
        if getattr(info, self.data_type) is None:
            raise ConfigError(
                f"{path}.{self.data_type}: is missing. Name the folder that the annotations' file names are "
                f"relative to: {{storage: my_data/{self.data_type}}}."
            )
        return BuildInfo(
            annotations={s: _source(Annotation, value) for s, value in info.annotations.items()},
            images=info.images,
            videos=info.videos,
            ground_truth={s: _source(Source, value) for s, value in info.ground_truth.items()},
        )


def as_list(value: str | list[str] | None) -> list[str]:
    """One value, several or none, as a list."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _source(cls: type[S], given: S | Mapping[str, Any]) -> S:
    return cls(**given) if isinstance(given, Mapping) else given


def _is_url(storage: str) -> bool:
    return storage.startswith(("http://", "https://"))
