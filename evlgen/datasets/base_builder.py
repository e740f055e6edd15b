"""The contract of dataset builders: where the data is, which splits it has, and what is missing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from evlgen.common.errors import ConfigError, DataError, did_you_mean
from evlgen.common.safe_text import message_lines
from evlgen.config.dataset_config import DatasetConfig
from evlgen.config.schema import unknown_key
from evlgen.datasets.base_dataset import BaseDataset
from evlgen.files.archives import fetch_archive, is_archive
from evlgen.files.io import resolve
from evlgen.processors import build_processor
from evlgen.processors.base_processor import BaseProcessor

ROLES = ("train", "eval")
_EXAMPLES = {
    "vis_processor": "{name: blip_image_eval, image_size: 224}",
    "text_processor": "{name: blip_caption}",
}


class BaseDatasetBuilder:
    """Builds the datasets of one name in a YAML file's ``datasets:`` section.

    A subclass declares the keys of its section as the fields of a dataclass, ``CONFIG``; or, without one, as
    the parameters of a constructor of its own, which are handed in save those in ``FROM_FRAMEWORK``. It
    defines `splits` and `build_split`, and `missing` where it reads files.

    Args:
        name: the section's name.
        cache_root: the data root that relative storage paths start from.
        section: the section as its ``CONFIG``; or the values of its keys.

    Raises:
        ConfigError, RegistryError: the section, or a processor's in it, is wrong.
    """

    CONFIG: ClassVar[type[DatasetConfig]] = DatasetConfig
    DEFAULT_CONFIG: str | None = None  # YAML of the defaults, relative to the package
    FROM_FRAMEWORK = ("name", "cache_root", "builder")

    config: DatasetConfig

    def __init__(self, name: str, cache_root: str | Path, *section: Any, **values: Any) -> None:
        self.name = name
        self.cache_root = Path(cache_root)
        self.config = self.CONFIG.from_arguments(name, *section, **values)
        self.vis_processors = self._build_processors("vis_processor", self.config.vis_processor)
        self.text_processors = self._build_processors("text_processor", self.config.text_processor or {})

    @property
    def splits(self) -> list[str]:
        """Names of the splits, in the order of the YAML."""
        raise NotImplementedError(f"{type(self).__name__} must define splits")

    def build_split(self, split: str) -> BaseDataset:
        """The dataset of one of `splits`, whose files are there. Raises `DataError` when they are damaged."""
        raise NotImplementedError(f"{type(self).__name__} must define build_split(split)")

    def missing(self, splits: Iterable[str] | None = None) -> list[str]:
        """What these splits (by default all) need and is not there: a line each, with place and remedy."""
        return []

    def get_split(self, split: str) -> BaseDataset:
        """The dataset of a split.

        Raises:
            ConfigError: there is no split of this name.
            DataError: its files are missing or damaged.
        """
        if split not in self.splits:
            raise ConfigError(
                f"dataset '{self.name}' has no split '{split}'.{did_you_mean(split, self.splits)} "
                f"Splits: {', '.join(self.splits)}."
            )
        missing = self.missing([split])
        if missing:
            raise DataError(message_lines(missing))
        return self.build_split(split)

    def build_datasets(self) -> dict[str, BaseDataset]:
        """The datasets of all splits, by name. Raises as `get_split`."""
        return {split: self.get_split(split) for split in self.splits}

    def vis_processor(self, split: str) -> BaseProcessor:
        """The image or video processor of a split, by its role. Raises `ConfigError` where none is given."""
        return self._processor_of("vis_processor", self.vis_processors, split)

    def text_processor(self, split: str) -> BaseProcessor:
        """The text processor of a split; see `vis_processor`."""
        return self._processor_of("text_processor", self.text_processors, split)

    def storage_path(self, storage: str, md5: str | None = None) -> Path:
        """Where a ``storage`` is: absolute, relative to the data root, or with a scheme that iopath knows.

        An address is fetched now, with ``md5`` as its published sum; that of an archive is unpacked too.
        """
        if storage.startswith(("http://", "https://")) and is_archive(storage):
            return fetch_archive(storage, md5)
        if "://" in storage:
            return Path(resolve(storage, md5))
        return self.cache_root / os.path.expanduser(storage)

    def _build_processors(self, key: str, sections: Mapping[str, Any]) -> dict[str, BaseProcessor]:
        path = f"datasets.{self.name}.{key}"
        for role in sections:
            if role not in ROLES:
                raise ConfigError(f"{path}.{role}: {unknown_key(role, ROLES)}.")
        return {role: build_processor(section, f"{path}.{role}") for role, section in sections.items()}

    def _processor_of(self, key: str, processors: Mapping[str, BaseProcessor], split: str) -> BaseProcessor:
        if role_of(split) not in processors:
            raise ConfigError(
                f"datasets.{self.name}.{key}.{role_of(split)} is missing: split '{split}' needs it. "
                f"Give it a processor, such as {_EXAMPLES[key]}."
            )
        return processors[role_of(split)]


def role_of(split: str) -> str:
    """``train`` for a split whose name starts so, else ``eval``."""
    return "train" if split.startswith("train") else "eval"
