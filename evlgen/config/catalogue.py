"""What ``python -m evlgen download`` can get: ``configs/downloads.yaml``.

Where files come from and where they belong is read from the datasets' own YAML files.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlparse

from evlgen.common.errors import ConfigError, did_you_mean
from evlgen.config.schema import build_dataclass
from evlgen.config.yaml_io import read_yaml
from evlgen.files.io import PACKAGE_ROOT

CATALOGUE = PACKAGE_ROOT / "configs" / "downloads.yaml"
DATASETS = PACKAGE_ROOT / "configs" / "datasets"
_MEDIA = ("images", "videos")
KINDS = ("annotations", *_MEDIA, "shards")


@dataclass(frozen=True)
class Entry:
    """What is got by one name; see the top of ``downloads.yaml``."""

    title: str
    datasets: list[str]
    licences: list[str]
    sizes: dict[str, int] = field(default_factory=dict)
    strip: dict[str, str] = field(default_factory=dict)
    by_hand: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    use: str | None = None


@dataclass(frozen=True)
class Item:
    """A file, an archive that fills a folder, or a folder of images that have an address each.

    Attributes:
        kind: one of `KINDS`.
        storage: where it belongs, relative to the data root: the file, or the folder of images or videos.
        url: where the file or archive comes from.
        md5: its published sum.
        size: about how many bytes; None where the catalogue does not say.
        strip: the folder of the archive whose content is wanted.
        images: the addresses of the images, by the folder that their file names begin with.
        lists: the annotations that name the images, relative to the data root.
    """

    kind: str
    storage: str
    url: str | None = None
    md5: str | None = None
    size: int | None = None
    strip: str | None = None
    pictures: Mapping[str, str] = field(default_factory=dict)
    lists: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str | None]:
        """What makes it one item: of two datasets too."""
        return self.storage, self.url

    @property
    def address(self) -> str:
        """``url`` of an item that has one."""
        assert self.url is not None
        return self.url

    @property
    def can_be_fetched(self) -> bool:
        """Else it has to be put at its place by hand."""
        return bool(self.url or self.pictures)

    @property
    def is_archive(self) -> bool:
        return self.kind in _MEDIA and self.url is not None

    @property
    def file_name(self) -> str:
        """The last part of the address."""
        return PurePosixPath(unquote(urlparse(self.url or "").path)).name

    @property
    def shown(self) -> str:
        """Its place, and the archive that goes there."""
        return f"{self.storage}/{self.file_name}" if self.is_archive else self.storage


@functools.cache
def catalogue() -> Mapping[str, Entry]:
    """Every entry, by its name."""
    content = read_yaml(CATALOGUE)["downloads"]
    return {
        name: build_dataclass(Entry, section, f"downloads.{name}", lambda _: str(CATALOGUE))
        for name, section in content.items()
    }


def find_entry(name: str) -> Entry:
    """The entry of a name. Raises `ConfigError` with the nearest names where there is none."""
    if name not in catalogue():
        raise ConfigError(
            f"there is no download '{name}'.{did_you_mean(name, catalogue())} "
            f"There are: {', '.join(catalogue())}."
        )
    return catalogue()[name]


def command_for(dataset: str, storage: str) -> str | None:
    """The command that gets a file or folder of a dataset; None where the catalogue does not have it, or the
    dataset has been told of another place."""
    for name, entry in catalogue().items():
        if dataset in entry.datasets and any(
            item.can_be_fetched and item.storage == storage.rstrip("/") for item in items_of(entry)
        ):
            return f"python -m evlgen download {name}"
    return None


def command_that_explains(dataset: str) -> str | None:
    """The command that says where the files of a dataset are to be had; None where the catalogue does not
    have it."""
    names = (name for name, entry in catalogue().items() if dataset in entry.datasets)
    return next((f"python -m evlgen download {name}" for name in names), None)


def items_of(entry: Entry) -> list[Item]:
    """What an entry's datasets need, each place and address once, annotations first."""
    found = {item.key: item for dataset in entry.datasets for item in _items(_section(dataset), entry)}
    return sorted(found.values(), key=lambda item: KINDS.index(item.kind))


def _section(dataset: str) -> Mapping[str, Any]:
    return read_yaml(DATASETS / f"{dataset}.yaml")["datasets"][dataset]


def _items(section: Mapping[str, Any], entry: Entry) -> Iterator[Item]:
    lists = section["build_info"].get("annotations", {})
    named = tuple(storage for source in lists.values() for storage in _as_list(source["storage"]))
    for kind, source in _sources(section, "annotations"):
        storages, urls, sums = (_as_list(source.get(key)) for key in ("storage", "url", "md5"))
        if kind in _MEDIA:  # several archives for one folder
            storages = storages * max(1, len(urls))
        for storage, url, md5 in itertools.zip_longest(storages, urls, sums):
            if storage is None or "://" in storage or Path(storage).is_absolute():
                continue
            item = Item("shards" if "{" in storage else kind, storage.rstrip("/"), url, md5)
            name = item.file_name or item.storage
            facts: dict[str, Any] = {"size": entry.sizes.get(name), "strip": entry.strip.get(name)}
            if kind in _MEDIA and url is None:
                facts.update(pictures=entry.pictures, lists=named)
            yield replace(item, **facts)


def _sources(section: Mapping[str, Any], kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping with a ``storage``, and what kind of files it speaks of. Files to score against are done
    without where no address is published."""
    for key, value in section.items():
        if not isinstance(value, Mapping):
            continue
        inner = key if key in _MEDIA else kind
        if "storage" not in value:
            yield from _sources(value, "ground_truth" if key == "ground_truth" else inner)
        elif kind != "ground_truth":
            yield inner, value
        elif value.get("url"):
            yield "annotations", value


def _as_list(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
