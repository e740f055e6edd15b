"""Reading annotation files: JSON with errors that name the file and the place."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import PureWindowsPath
from typing import Any

from evlgen.common.errors import DataError, did_you_mean
from evlgen.common.json_io import read_json

_NO_TEXT = re.compile("[\x00\ud800-\udfff]")


def read_annotation(path: str | os.PathLike) -> Any:
    """The content of a JSON file of any size.

    Raises:
        DataError: the file is missing, not text, or not JSON (with line and column).
    """
    return read_json(path, DataError, "annotation", max_bytes=None)


def read_records(path: str | os.PathLike, keys: Sequence[str]) -> list[dict[str, Any]]:
    """A JSON list of mappings that all have ``keys``.

    Raises:
        DataError: another layout, an empty list, or a record without one of the keys.
    """
    records = read_annotation(path)
    if not isinstance(records, list):
        raise DataError(f"annotation {path} must be a list of records, not {describe(records)}.")
    if not records:
        raise DataError(f"annotation {path} has no records: it can be neither trained on nor scored.")
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(
                f"record {index} of {path} must be a mapping with {_listed(keys)}, not {describe(record)}."
            )
        for key in keys:
            if key not in record:
                raise DataError(
                    f"record {index} of {path} has no '{key}'; it has {_listed(record) or 'no keys'}."
                    f"{did_you_mean(key, islice(record, 100))}"
                )
    return records


def check_folders(names: Iterable[str], root: str | os.PathLike, what: str, remedy: str) -> None:
    """Raises `DataError` when a folder that file names (relative to ``root``) point into is not there.

    Args:
        what: what the folder holds, for messages: ``image``.
    """
    folders = Counter(os.path.dirname(name) for name in names)
    for folder, count in sorted(folders.items()):
        path = os.path.join(root, folder)
        if not os.path.isdir(path):
            raise DataError(
                f"{what} folder {path} is missing: {count} of {folders.total()} records "
                f"point into it. {remedy}"
            )


def text_problem(text: str) -> str | None:
    """Why a text can be neither written down nor tokenised; None where it can."""
    found = _NO_TEXT.search(text)
    if found is None:
        return None
    return "a null byte" if found.group() == "\0" else "half of a surrogate pair"


def check_inside(images: Iterable[str], path: str | os.PathLike) -> None:
    """Raises `DataError` for a file name that leads out of the image folder.

    For annotations that come from an address: those of one's own may name any picture of the machine.
    """
    for image in images:
        windows = PureWindowsPath(image)  # takes \\ for / too
        if windows.drive or windows.root or ".." in windows.parts:
            raise DataError(
                f"annotation {path} is refused: it comes from an address, and its image '{image[:200]}' "
                "leads out of the image folder. Where you trust it, name it as a file of your own, without "
                "url."
            )


def describe(value: Any) -> str:
    """A JSON value in a few words, for messages."""
    if isinstance(value, Mapping):
        return f"a mapping with {_listed(value)}" if value else "an empty mapping"
    text = json.dumps(_pruned(value), ensure_ascii=True)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _pruned(value: Any, depth: int = 3) -> Any:
    """The beginning of a value that may be of any size and depth."""
    if isinstance(value, str):
        return value[:50]
    if isinstance(value, list | Mapping) and depth == 0:
        return "..."
    if isinstance(value, list):
        return [_pruned(item, depth - 1) for item in value[:10]]
    if isinstance(value, Mapping):
        return {key[:50]: _pruned(value[key], depth - 1) for key in list(value)[:10]}
    return value


def _listed(names: Iterable[Any], most: int = 8) -> str:
    names = [repr(str(name)[:50]) for name in islice(names, most + 1)]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
