"""Reading annotation files: JSON with errors that name the file and the place."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import PureWindowsPath
from typing import Any

from evlgen.common.errors import DataError, did_you_mean
from evlgen.files.io import read_bytes, scheme_of
from evlgen.files.json_io import json_errors

_WHAT = "annotation"
_NO_TEXT = re.compile("[\x00\ud800-\udfff]")
_NO_UTF8 = re.compile("[\udc80-\udcff]")  # what Python's "surrogateescape" makes of bytes that are not UTF-8
_SPACE = re.compile(r"[ \t\n\r]*")  # of JSON


def read_annotation(path: str | os.PathLike) -> Any:
    """The content of a JSON file of any size.

    Raises:
        DataError: the file is missing, not text, or not JSON (with line and column).
    """
    return _parsed(path, _read_text(path))


def open_annotation(path: str | os.PathLike) -> Any:
    """As `read_annotation`, but a list comes as an iterator over its items, each parsed when it is asked for:
    the records of a large file are not all there at once."""
    text = _read_text(path)
    return _list_items(path, text) if _after_space(text, 0) == text.find("[") else _parsed(path, text)


def text_problem(text: str) -> str | None:
    """Why a text can be neither written down nor tokenised; None where it can."""
    found = _NO_TEXT.search(text)
    if found is None:
        return None
    if found.group() == "\0":
        return "a null byte"
    return "bytes that are not UTF-8" if _NO_UTF8.match(found.group()) else "half of a surrogate pair"


def is_id(value: Any) -> bool:
    """Whether an id is a number or a text, such as they are written: no null byte, no 4,000 digits."""
    if isinstance(value, str):
        return text_problem(value) is None
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def number_of(value: Any) -> int | None:
    """The number that an id is, or that its digits write; None where it is none."""
    if isinstance(value, str):
        return int(value) if re.fullmatch("[0-9]{1,18}", value) else None
    return value if is_id(value) else None


def known_as(value: int | str, known: Container[int | str]) -> int | str:
    """An id as others have it, number or text: files that belong together write 42 and "42". As it is where
    they have neither."""
    if value in known:
        return value
    other = str(value) if isinstance(value, int) else number_of(value)
    return other if other is not None and other in known else value


def as_text(value: Any) -> Any:
    """A number as the text that it is where a text is meant: tables and JSON write ``3`` for the answer "3",
    and pandas ``3.0`` for whole numbers beside an empty cell. Anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if not math.isfinite(value):
        return value
    return str(int(value)) if value == int(value) else str(value)


def check_inside(images: Iterable[str], path: str | os.PathLike) -> None:
    """Raises `DataError` for a file name that leads out of the image folder: to other files of this machine,
    or into a store that it has the keys to.

    For annotations that come from an address: those of one's own may name any image. Web addresses pass,
    and so do names in the store that the annotation itself is in.
    """
    allowed = (None, "http", "https", scheme_of(str(path)))
    for image in images:
        windows = PureWindowsPath(image)  # takes \\ for / too
        outside = windows.drive or windows.root or ".." in windows.parts
        if scheme_of(image) not in allowed or (outside and scheme_of(image) is None):
            raise DataError(
                f"annotation {path} is refused: it comes from an address, and its image '{image[:200]}' "
                "leads out of the image folder. Where you trust it, name it as a file of your own, without "
                "url."
            )


def has_keys(record: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raises `DataError` naming the first of the keys that a record lacks."""
    for key in keys:
        if key not in record:
            raise DataError(
                f"it has no '{key}' but {listed(record) or 'no keys'}."
                f"{did_you_mean(key, islice(map(str, record), 100))}",
                "bad record",
            )


def describe(value: Any) -> str:
    """A value of JSON or of a typed table in a few words, for messages."""
    if isinstance(value, Mapping):
        return f"a mapping with {listed(value)}" if value else "an empty mapping"
    text = json.dumps(_pruned(value), ensure_ascii=True)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _pruned(value: Any, depth: int = 3) -> Any:
    """The beginning of a value that may be of any size and depth."""
    if isinstance(value, str):
        return value[:50]
    if isinstance(value, list | tuple | Mapping) and depth == 0:
        return "..."
    if isinstance(value, list | tuple):
        return [_pruned(item, depth - 1) for item in value[:10]]
    if isinstance(value, Mapping):
        return {str(key)[:50]: _pruned(value[key], depth - 1) for key in list(value)[:10]}
    return value if value is None or isinstance(value, int | float) else repr(value)[:50]


def listed(names: Iterable[Any], most: int = 8) -> str:
    """The first of some names, quoted, for messages."""
    names = [repr(str(name)[:50]) for name in islice(names, most + 1)]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _read_text(path: str | os.PathLike) -> str:
    """The text of a file, with or without a byte order mark. What is not UTF-8 in it comes as surrogates, so
    that the records that have it are bad, not the file; see `text_problem`."""
    with json_errors(path, DataError, _WHAT):
        return read_bytes(path).decode("utf-8-sig", "surrogateescape")


def _parsed(path: str | os.PathLike, text: str) -> Any:
    if not text.strip():
        raise DataError(f"{_WHAT} {path} is empty. Fetch or write it again.", "empty file")
    with json_errors(path, DataError, _WHAT), _utf8_errors(text):
        return json.loads(text)


def _list_items(path: str | os.PathLike, text: str) -> Iterator[Any]:
    parse = json.JSONDecoder().raw_decode
    with json_errors(path, DataError, _WHAT), _utf8_errors(text):
        start = _after_space(text, text.index("[") + 1)
        end = start if text.startswith("]", start) else None
        while end is None:
            item, at = parse(text, start)
            yield item
            at = _after_space(text, at)
            if text.startswith(",", at):
                start = _after_space(text, at + 1)
            elif text.startswith("]", at):
                end = at
            else:
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        if (rest := _after_space(text, end + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, rest)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


@contextlib.contextmanager
def _utf8_errors(text: str) -> Iterator[None]:
    """Where a text is no JSON and was no UTF-8, the latter is why."""
    try:
        yield
    except json.JSONDecodeError as error:
        if not (found := _NO_UTF8.search(text)):
            raise
        start = len(text[: found.start()].encode())
        raise UnicodeDecodeError("utf-8", b"", start, start + 1, "not UTF-8") from error
