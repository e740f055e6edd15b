"""Which tables a folder holds, by split: Hugging Face dataset folders, and folders of tables like them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from evlgen.common.errors import DataError
from evlgen.datasets.tables import SUFFIXES
from evlgen.files.json_io import read_json

# What splits are called in names of files and folders:
# huggingface.co/docs/hub/datasets-file-names-and-splits
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "validation", "validate", "valid", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_ONE_DATASET = (".parquet", ".arrow")  # several such files without split names are shards of one table


def split_named(name: object) -> str | None:
    """The split that a name means, ``val`` for ``Validation``; None where it is that of none."""
    return _SPLITS.get(str(name).strip().lower())


class Tables(NamedTuple):
    """The tables of one split, read one after the other.

    Attributes:
        files: at least one.
        root: the folder that names of images in them start from.
    """

    files: list[Path]
    root: Path


def find_tables(path: Path) -> dict[str | None, Tables]:
    """The tables at a path, by split; under None where nothing says of which split they are.

    A path is a table, or a folder: one of ``save_to_disk``; one of tables with ``train``, ``validation`` or
    ``test`` in their names, such as ``data/train-00000-of-00002.parquet``; or one of images with a
    ``metadata.csv`` (or ``.jsonl``), once or in a folder for each split.

    Raises:
        DataError: nothing is there, or several tables of a split of which none is meant more than the others.
    """
    if not os.path.isdir(path):
        return {None: Tables([path], path.parent)}
    if (path / "dataset_dict.json").is_file():
        return {_SPLITS.get(s, s): _saved(path / s) for s in _named_in(path / "dataset_dict.json", "splits")}
    if (path / "state.json").is_file():
        return {None: _saved(path)}
    found = _by_split(path, [*_tables_of(path), *_tables_of(path / "data")])
    found = found or _by_folder(path)
    if not found:
        raise DataError(
            f"{path} holds no table ({', '.join(SUFFIXES)}) and is no Hugging Face dataset folder."
        )
    for split, tables in found.items():
        _check_one(path, split, tables.files)
    return found


def _by_split(folder: Path, files: Iterable[Path]) -> dict[str | None, Tables]:
    found: dict[str | None, Tables] = {}
    for file in files:
        words = re.split(r"[-_.]", file.stem.lower())
        split = next((_SPLITS[word] for word in words if word in _SPLITS), None)
        found.setdefault(split, Tables([], folder)).files.append(file)
    if len(found) > 1:
        found.pop(None, None)  # a README's table, a list of answers
    return found


def _by_folder(path: Path) -> dict[str | None, Tables]:
    found: dict[str | None, Tables] = {}
    for name, split in _SPLITS.items():
        for folder in (path / name, path / "data" / name):
            if files := _tables_of(folder):
                found.setdefault(split, Tables([], folder)).files.extend(files)
    return found


def _tables_of(folder: Path) -> list[Path]:
    """The tables in a folder, by name; the ones called ``metadata`` where there are such."""
    if not os.path.isdir(folder):
        return []
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.stem != "dataset_infos")
    return [f for f in files if f.stem == "metadata"] or files


def _saved(folder: Path) -> Tables:
    """What ``save_to_disk`` wrote into a folder."""
    names = [entry["filename"] for entry in _named_in(folder / "state.json", "_data_files")]
    return Tables([folder / os.path.basename(name) for name in names], folder)


def _named_in(file: Path, key: str) -> list:
    content = read_json(file, DataError, "dataset description")
    if not isinstance(content, dict) or not isinstance(content.get(key), list) or not content[key]:
        raise DataError(f"{file} has no list '{key}': the folder was not written by save_to_disk.")
    return content[key]


def _check_one(folder: Path, split: str | None, files: list[Path]) -> None:
    """Several files are one table where they are shards: of one format that has shards, in one folder."""
    kinds = {(file.parent, file.suffix.lower()) for file in files}
    if len(files) > 1 and (len(kinds) > 1 or files[0].suffix.lower() not in _ONE_DATASET):
        names = ", ".join(str(file.relative_to(folder)) for file in files[:8])
        of_split = f" of the split '{split}'" if split else ""
        raise DataError(f"{folder} holds several tables{of_split} ({names}): name the one that is meant.")
