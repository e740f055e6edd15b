"""What ``python -m evlgen download`` can get: ``configs/downloads.yaml``.

Where files come from and where they belong is read from the datasets' own YAML files.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlparse

from evlgen.common.errors import ConfigError, did_you_mean
from evlgen.common.io import PACKAGE_ROOT
from evlgen.common.schema import build_dataclass
from evlgen.common.yaml_io import read_yaml

CATALOGUE = PACKAGE_ROOT / "configs" / "downloads.yaml"
DATASETS = PACKAGE_ROOT / "configs" / "datasets"
_MEDIA = ("images", "videos")
KINDS = ("annotations", *_MEDIA)


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
    """A file, or an archive that fills a folder.

    Attributes:
        kind: one of `KINDS`.
        storage: where it belongs, relative to the data root: the file, or the folder of pictures or clips.
        url: where it comes from; None: it has to be put there by hand.
        md5: its published sum.
        size: about how many bytes; None where the catalogue does not say.
        strip: the folder of the archive whose content is wanted.
    """

    kind: str
    storage: str
    url: str | None = None
    md5: str | None = None
    size: int | None = None
    strip: str | None = None

    @property
    def is_archive(self) -> bool:
        return self.kind in _MEDIA

    @property
    def file_name(self) -> str:
        """The last part of the address."""
        return PurePosixPath(unquote(urlparse(self.url or "").path)).name

    @property
    def shown(self) -> str:
        """Its place, and the archive that goes there."""
        return f"{self.storage}/{self.file_name}" if self.is_archive and self.url else self.storage


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
            item.url and item.storage == storage.rstrip("/") for item in items_of(entry)
        ):
            return f"python -m evlgen download {name}"
    return None


def items_of(entry: Entry) -> list[Item]:
    """What an entry's datasets need, each place and address once, annotations first."""
    found = {
        (item.storage, item.url): item
        for dataset in entry.datasets
        for item in _items(_section(dataset), entry)
    }
    return sorted(found.values(), key=lambda item: KINDS.index(item.kind))


def _section(dataset: str) -> Mapping[str, Any]:
    return read_yaml(DATASETS / f"{dataset}.yaml")["datasets"][dataset]


def _items(section: Mapping[str, Any], entry: Entry) -> Iterator[Item]:
    for kind, source in _sources(section, "annotations"):
        storages, urls, sums = (_as_list(source.get(key)) for key in ("storage", "url", "md5"))
        if kind in _MEDIA:  # several archives for one folder
            storages = storages * max(1, len(urls))
        for storage, url, md5 in itertools.zip_longest(storages, urls, sums):
            if storage is None or "://" in storage or Path(storage).is_absolute():
                continue
            item = Item(kind, storage.rstrip("/"), url, md5)
            name = item.file_name
            yield Item(kind, item.storage, url, md5, entry.sizes.get(name), entry.strip.get(name))


def _sources(section: Mapping[str, Any], kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping with a ``storage``, and what kind of files it speaks of."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            inner = key if key in _MEDIA else kind
            if "storage" in value:
                yield inner, value
            else:
                yield from _sources(value, inner)


def _as_list(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
