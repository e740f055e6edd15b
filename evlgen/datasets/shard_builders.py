"""Builders of captioned images and videos in webdataset shards. They are for training."""

from __future__ import annotations

import functools
import glob
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from braceexpand import braceexpand

from evlgen.common.errors import ConfigError, DataError
from evlgen.common.registry import registry
from evlgen.config.build_info import as_list
from evlgen.config.dataset_config import DatasetConfig
from evlgen.config.schema import NonNegativeInt, PositiveInt
from evlgen.datasets.base_builder import BaseDatasetBuilder
from evlgen.datasets.conversation_shards import ConversationShardDataset, read_conversation_shard
from evlgen.datasets.shards import ShardDataset, ShardIndex, read_shard, stats_path
from evlgen.files.io import near_name
from evlgen.media.video import Reader
from evlgen.processors.base_processor import BaseProcessor, UnchangedProcessor

logger = logging.getLogger(__name__)

_MOST_COUNTED = 50  # shards whose headers are read to know how many samples they have: about a second each


@dataclass(frozen=True)
class ShardInfo:
    """``build_info`` of a dataset in shards.

    Args:
        storage: where they are: paths, absolute or relative to the data root, or addresses; with braces
            (``{00000..01255}.tar``) or, of paths, wildcards (``*.tar``).
    """

    storage: str | list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class ShardConfig(DatasetConfig):
    """The section of a dataset in shards.

    Args:
        build_info: see `ShardInfo`.
        data_type, caption, shuffle_buffer: see `ShardDataset`.
        num_samples: how many samples there are in all; None: what ``<shard>_stats.json`` beside the shards
            say (``successes``, as img2dataset and ``data pack`` write it), else what the headers of a few
            shards say, both where a run has to know. Else it is unknown, and a run's length must be given in
            iterations.
        video_reader: see `Video`.
        dataset_card: a page about the dataset; nothing reads it.
    """

    build_info: ShardInfo
    data_type: Literal["images", "videos"] = "images"
    caption: str = "caption"
    shuffle_buffer: NonNegativeInt = 1000
    num_samples: PositiveInt | None = None
    video_reader: Reader = "auto"
    dataset_card: str | None = None


class ShardBuilder(BaseDatasetBuilder):
    """Captioned images or videos in shards. Those that are not there are left out with a warning, unless all
    are."""

    CONFIG: ClassVar[type[DatasetConfig]] = ShardConfig
    config: ShardConfig

    TRAINING_ONLY = True
    DATASET: ClassVar[type[ShardDataset]] = ShardDataset
    READ: ClassVar[Callable[..., ShardIndex]] = staticmethod(read_shard)

    def __init__(self, name: str, cache_root: str | Path, *section: Any, **values: Any) -> None:
        super().__init__(name, cache_root, *section, **values)
        self._key = f"datasets.{name}.build_info"
        self.build_info = self.config.build_info
        self._named = self._expanded()

    @property
    def splits(self) -> list[str]:
        return ["train"]

    def missing(self, splits: Iterable[str] | None = None) -> list[str]:
        if self._here():
            return []
        first = self._named[0] if self._named else self._path(as_list(self.build_info.storage)[0])
        return [
            f"{self.name}: no shard is there, such as {first}.{near_name(first)} Put the shards there, set "
            f"{self._key}.storage to where they are, or set EVLGEN_CACHE to the data root that has them."
        ]

    def build_split(self, split: str) -> ShardDataset:
        shards = self._here()
        there = set(shards)
        gone = [shard for shard in self._named if shard not in there]
        if gone:
            logger.warning(
                "%s: %d of %d shards are not there (the first: %s); the others are trained on",
                self.name,
                len(gone),
                len(self._named),
                gone[0],
            )
        config = self.config
        read = functools.partial(self.READ, data_type=config.data_type)
        return self.DATASET(
            shards,
            self.vis_processor(split),
            self.text_processor(split),
            data_type=config.data_type,
            caption=config.caption,
            shuffle_buffer=config.shuffle_buffer,
            num_samples=config.num_samples or functools.partial(count_samples, shards, read),
            reader=config.video_reader,
        )

    def _expanded(self) -> list[str]:
        """The shards that ``storage`` names, each once. Wildcards name those that are there."""
        storages = as_list(self.build_info.storage)
        if not storages:
            raise ConfigError(
                f"{self._key}.storage: names no shards. Say where they are, such as "
                "my_data/{00000..00009}.tar"
            )
        found: list[str] = []
        for storage in storages:
            try:
                names = [self._path(name) for name in braceexpand(storage)]
            except ValueError as error:
                raise ConfigError(f"{self._key}.storage: {storage} has braces that do not match.") from error
            for name in names:
                has_wildcard = not _is_remote(name) and glob.has_magic(name) and not os.path.isfile(name)
                found += sorted(glob.glob(name)) if has_wildcard else [name]
        return list(dict.fromkeys(found))

    def _path(self, storage: str) -> str:
        """A path from the data root; an address as it is: it is fetched when it is first read."""
        return storage if _is_remote(storage) else str(self.storage_path(storage))

    def _here(self) -> list[str]:
        return [shard for shard in self._named if _is_remote(shard) or os.path.isfile(shard)]


@registry.register_builder("web_shards")
class WebShardsBuilder(ShardBuilder):
    """Shards of one's own, such as ``data pack`` writes."""

    DEFAULT_CONFIG = "configs/datasets/web_shards.yaml"


@dataclass(frozen=True, kw_only=True)
class ConversationShardConfig(ShardConfig):
    """The section of conversations in shards: of images and videos alike, and without captions."""

    text_processor: dict[str, Any] | None = None  # type: ignore[assignment]  # it may be left out
    data_type: Literal["images", "videos"] = field(default="images", init=False)
    caption: str = field(default="caption", init=False)


@registry.register_builder("conversation_shards")
class ConversationShardsBuilder(ShardBuilder):
    """Conversations in shards; see `evlgen.datasets.conversation_shards`."""

    DEFAULT_CONFIG = "configs/datasets/conversation_shards.yaml"
    DATASET = ConversationShardDataset
    READ = staticmethod(read_conversation_shard)

    CONFIG = ConversationShardConfig

    def text_processor(self, split: str) -> BaseProcessor:
        return UnchangedProcessor()  # of captions, of which there are none


@registry.register_builder("ccs14M")
class Ccs14MBuilder(ShardBuilder):
    """CC3M, CC12M and SBU with the captions that BLIP wrote and filtered (Li et al., ICML 2022)."""

    DEFAULT_CONFIG = "configs/datasets/ccs14M.yaml"


@registry.register_builder("laion115M")
class Laion115MBuilder(ShardBuilder):
    """115M images of LAION-400M with the captions that BLIP wrote and filtered (Li et al., ICML 2022)."""

    DEFAULT_CONFIG = "configs/datasets/laion115M.yaml"


def count_samples(shards: list[str], read: Callable[[str], ShardIndex]) -> int | None:
    """How many samples these shards have by their ``_stats.json``, or, where there are few shards, by their
    headers, which ``read`` gives; None where that takes too long to find out."""
    counts = [_count_in_stats(shard) for shard in shards]
    known = [count for count in counts if count is not None]
    if len(known) == len(counts):
        return sum(known)
    if len(shards) > _MOST_COUNTED or any(_is_remote(shard) for shard in shards):
        return None
    return sum(len(read(shard).samples) for shard in shards)


def _count_in_stats(shard: str) -> int | None:
    path = stats_path(shard)
    if _is_remote(shard) or not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            count = json.load(file)["successes"]
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"successes is {count!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} does not say how many samples its shard has ({error}). Delete it: they are counted then."
        ) from error
    return count


def _is_remote(shard: str) -> bool:
    return "://" in shard
