"""Reading annotation files: JSON with errors that name the file and the place."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evlgen.common.errors import DataError, did_you_mean


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: the file is missing, not text, or not JSON (with line and column).
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"annotation {path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}. "
            "Fetch it again if it was cut off."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"annotation {path} is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise DataError(f"annotation {path} cannot be read: {error.strerror}.") from error


def read_records(path: str | os.PathLike, keys: Sequence[str]) -> list[dict[str, Any]]:
    """A JSON list of mappings that all have ``keys``.

    Raises:
        DataError: another layout, an empty list, or a record without one of the keys.
    """
    records = read_json(path)
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
                    f"{did_you_mean(key, record)}"
                )
    return records


def check_image_folders(images: Iterable[str], root: str | os.PathLike, remedy: str) -> None:
    """Raises `DataError` when a folder that file names (relative to ``root``) point into is not there."""
    folders = Counter(os.path.dirname(image) for image in images)
    for folder, count in sorted(folders.items()):
        path = os.path.join(root, folder)
        if not os.path.isdir(path):
            raise DataError(
                f"image folder {path} is missing: {count} of {folders.total()} records "
                f"point into it. {remedy}"
            )


def describe(value: Any) -> str:
    """A JSON value in a few words, for messages."""
    if isinstance(value, Mapping):
        return f"a mapping with {_listed(value)}" if value else "an empty mapping"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _listed(names: Iterable[Any], most: int = 8) -> str:
    names = [f"'{name}'" for name in names]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
