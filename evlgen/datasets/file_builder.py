"""Builders of datasets in files: annotations, a media folder, ground truth. Keys are LAVIS's."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evlgen.common.errors import ConfigError
from evlgen.config.build_info import Annotation, BuildInfo, DataFiles, Source, as_list
from evlgen.config.dataset_config import DatasetConfig
from evlgen.datasets.base_builder import BaseDatasetBuilder
from evlgen.datasets.media import ImageFiles, Media, VideoFiles
from evlgen.media.video import Reader


@dataclass(frozen=True, kw_only=True)
class FileConfig(DatasetConfig):
    """The section of a dataset in files.

    Args:
        build_info: see `BuildInfo`.
        data_type: ``images`` or ``videos``: what the annotations' file names are.
        dataset_card: a page about the dataset; nothing reads it.
        video_reader: the library that decodes videos; see `evlgen.media.video`.
    """

    build_info: BuildInfo
    data_type: Literal["images", "videos"] = "images"
    dataset_card: str | None = None
    video_reader: Reader = "auto"


class FileBuilder(BaseDatasetBuilder):
    """A dataset whose files are named in ``build_info``. A subclass defines `build_split`."""

    CONFIG = FileConfig
    config: FileConfig

    def __init__(self, name: str, cache_root: str | Path, *section: Any, **values: Any) -> None:
        super().__init__(name, cache_root, *section, **values)
        self.data_type = self.config.data_type
        self.build_info = self.config.build_info
        self._check_sources()

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
        return ImageFiles(root) if self.data_type == "images" else VideoFiles(root, self.config.video_reader)

    def missing(self, splits: Iterable[str] | None = None) -> list[str]:
        return self._files.missing(self.splits if splits is None else splits)

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
        return self._files.media_remedy()

    @property
    def _files(self) -> DataFiles:
        return DataFiles(self.name, self.cache_root, self.build_info, self.data_type, self._local)

    def _local(self, storage: str) -> Path | None:
        """The path a storage must be at; None for addresses, which are fetched when they are read."""
        return None if _is_url(storage) else self.storage_path(storage)

    def _check_sources(self) -> None:
        path = f"datasets.{self.name}.build_info"
        if not self.build_info.annotations:
            raise ConfigError(
                f"{path}.annotations: names no split. Give it one, such as "
                "{train: {storage: train.json}}."
            )
        if self.media_source is None:
            raise ConfigError(
                f"{path}.{self.data_type}: is missing. Name the folder that the annotations' file names are "
                f"relative to: {{storage: my_data/{self.data_type}}}."
            )


def _is_url(storage: str) -> bool:
    return storage.startswith(("http://", "https://"))
