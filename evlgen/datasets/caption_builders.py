"""Builders of captioned pictures. COCO's is registered here; a dataset like it is a subclass of two lines."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.common.schema import build_dataclass
from evlgen.datasets.annotations import check_image_folders, check_inside
from evlgen.datasets.base_builder import BaseDatasetBuilder, role_of
from evlgen.datasets.base_dataset import BaseDataset
from evlgen.datasets.caption_dataset import (
    CaptionDataset,
    CaptionEvalDataset,
    read_caption_records,
    read_ground_truth,
)


@dataclass(frozen=True)
class Source:
    """A file or folder of a dataset: where it is kept and where it comes from.

    Args:
        storage: path, absolute or relative to the data root.
        url: address of the file, or of the archives that fill the folder.
        md5: of what is at ``url``, in the same order.
    """

    storage: str
    url: str | list[str] | None = None
    md5: str | list[str] | None = None

    def downloads(self) -> list[str]:
        """``https://.. (md5 ..)`` for each address."""
        sums = _as_list(self.md5)
        return [
            f"{url} (md5 {sums[i]})" if i < len(sums) else url for i, url in enumerate(_as_list(self.url))
        ]


@dataclass(frozen=True)
class Annotation(Source):
    """An annotation in one file or in several that are read one after the other, with an address for each."""

    storage: str | list[str]


@dataclass(frozen=True)
class CaptionBuildInfo:
    """``build_info`` of a caption dataset.

    Args:
        annotations: a file in Karpathy's layout for each split.
        images: the folder that file names in the annotations are relative to.
        ground_truth: files in COCO's layout to score against, by split. One that is not there is done
            without: the annotation's own captions are the references then.
    """

    annotations: dict[str, Annotation]
    images: Source
    ground_truth: dict[str, Source] = field(default_factory=dict)


class CaptionBuilder(BaseDatasetBuilder):
    """Captioned pictures on disk: Karpathy annotations and a folder of images. Keys are LAVIS's."""

    train_dataset = CaptionDataset
    eval_dataset = CaptionEvalDataset

    def __init__(
        self,
        name: str,
        cache_root: str | Path,
        vis_processor: dict,
        text_processor: dict,
        build_info: CaptionBuildInfo,
        data_type: Literal["images"] = "images",
        dataset_card: str | None = None,
    ) -> None:
        super().__init__(name, cache_root, vis_processor, text_processor)
        self.build_info = _build_info(build_info, f"datasets.{name}.build_info")
        self.data_type = data_type
        self.dataset_card = dataset_card

    @property
    def splits(self) -> list[str]:
        return list(self.build_info.annotations)

    def build_split(self, split: str) -> BaseDataset:
        records = self._records(split)
        root = self._path(self.build_info.images)
        check_image_folders((record["image"] for record in records), root, self._image_remedy())
        vis_processor = self.vis_processor(split)
        if role_of(split) == "train":
            return self.train_dataset(records, root, vis_processor, self.text_processor(split))
        text_processor = self.text_processors.get("eval")
        return self.eval_dataset(records, root, vis_processor, text_processor, self._ground_truth(split))

    def missing(self, splits: Iterable[str] | None = None) -> list[str]:
        lines = []
        for split in self.splits if splits is None else splits:
            source = self.build_info.annotations[split]
            for i, storage in enumerate(_as_list(source.storage)):
                path = self._local(storage)
                if path is not None and not os.path.isfile(path):
                    remedy = _remedy(source.downloads()[i : i + 1], "to that path")
                    lines.append(f"{self.name}: the {split} annotation is not at {path}. {remedy}")
        root = self._local(self.build_info.images.storage)
        if root is not None and not os.path.isdir(root):
            lines.append(f"{self.name}: the image folder is not at {root}. {self._image_remedy()}")
        return lines

    def _records(self, split: str) -> list[dict[str, Any]]:
        source = self.build_info.annotations[split]
        found = []
        for i, storage in enumerate(_as_list(source.storage)):
            file = self._path(source, i)
            records = read_caption_records(file)
            if source.url or storage.startswith(("http://", "https://")):
                check_inside((record["image"] for record in records), file)
            found += records
        return found

    def _ground_truth(self, split: str) -> dict[int | str, list[str]] | None:
        source = self.build_info.ground_truth.get(split)
        path = self._path(source) if source else None
        return read_ground_truth(path) if path is not None and os.path.isfile(path) else None

    def _path(self, source: Source, index: int = 0) -> Path:
        """Where a source's file is; an address is fetched, and must have the source's sum."""
        sums = _as_list(source.md5)
        return self.storage_path(_as_list(source.storage)[index], sums[index] if index < len(sums) else None)

    def _local(self, storage: str) -> Path | None:
        """The path a storage must be at; None for addresses, which are fetched when they are read."""
        return None if storage.startswith(("http://", "https://")) else self.storage_path(storage)

    def _image_remedy(self) -> str:
        key = f"datasets.{self.name}.build_info.images.storage"
        return (
            f"{_remedy(self.build_info.images.downloads(), 'and unpack into that folder')} "
            f"Images kept elsewhere: set {key} to their folder."
        )


@registry.register_builder("coco_caption")
class CocoCaptionBuilder(CaptionBuilder):
    """COCO captions in Karpathy's splits (Karpathy and Fei-Fei, CVPR 2015), as LAVIS distributes them."""

    DEFAULT_CONFIG = "configs/datasets/coco_caption.yaml"


def _build_info(given: CaptionBuildInfo | Mapping[str, Any], path: str) -> CaptionBuildInfo:
    info = given if isinstance(given, CaptionBuildInfo) else build_dataclass(CaptionBuildInfo, given, path)
    if not info.annotations:
        raise ConfigError(
            f"{path}.annotations: names no split. Give it one, such as {{train: {{storage: train.json}}}}."
        )
    return CaptionBuildInfo(
        annotations={s: _source(Annotation, value) for s, value in info.annotations.items()},
        images=info.images,
        ground_truth={s: _source(Source, value) for s, value in info.ground_truth.items()},
    )


def _source(cls: type[Source], given: Source | Mapping[str, Any]) -> Source:
    return given if isinstance(given, Source) else cls(**given)


def _remedy(downloads: list[str], where: str) -> str:
    fetch = f"Download {' and '.join(downloads)} {where}" if downloads else "Put it there"
    return f"{fetch}, or set EVLGEN_CACHE to the data root that has it."


def _as_list(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
