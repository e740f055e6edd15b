"""From the rows of a table to records of captions or questions: which columns are meant, what they hold."""

from __future__ import annotations

import ast
import itertools
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from evlgen.common.errors import ConfigError, DataError, did_you_mean
from evlgen.datasets.annotations import as_text, describe, is_id, text_problem
from evlgen.datasets.archive_media import split_cell
from evlgen.datasets.base_dataset import BadRecord
from evlgen.datasets.compact_records import PackedRecords
from evlgen.datasets.media import Media, is_address
from evlgen.datasets.records import good, refuse_bad
from evlgen.datasets.table_folders import split_named
from evlgen.datasets.tables import Row, Table

logger = logging.getLogger(__name__)

Record = dict[str, Any]

# What columns are usually called, by what they hold. Letters' case, blanks and hyphens do not count.
_FILES = ("path", "file_name", "filename", "file_path", "filepath", "file", "url")
USUAL_NAMES = {
    "image": (
        "image",
        "image_path",
        "img",
        "img_path",
        "image_file",
        *_FILES,
        "image_url",
        "picture",
        "photo",
    ),
    "video": ("video", "video_path", "video_file", *_FILES, "video_url", "clip"),
    "text": ("caption", "captions", "text", "texts", "description", "sentence", "sentences"),
    "id": ("image_id", "video_id", "id"),
    "question": ("question", "questions"),
    "answer": ("answer", "answers"),
    "question_id": ("question_id", "qid"),
    "split": ("split",),
}
# An entry of a list as Python and numpy write them, and what stands before the next one.
_ENTRY = re.compile(
    r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|None|null|nan|NaN|-?[0-9]+(?:\.[0-9]+)?)(?:[\s,]+|$)""",
    re.DOTALL,
)
_NOTHING = ("None", "null", "nan", "NaN")


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are called: ``columns`` in the YAML. What is left out is guessed from
    `USUAL_NAMES`.

    Args:
        text: the captions: one in each row, lists of them, or several columns.
        id: the image's (or video's) own id; without one its file name serves.
        question: with it the dataset is one of questions.
        answer: their answers; as ``text``, or lists of ``{"answer": text}``, as VQA's are.
        question_id: without one the number of the row serves.
        split: what tells which split a row is in: train, val (validation, dev) or test. A blank name: no
            column does.
    """

    text: str | list[str] | None = None
    id: str | None = None
    question: str | None = None
    answer: str | list[str] | None = None
    question_id: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class ImageColumns(Columns):
    """Columns of a table about images; see `Columns`.

    Args:
        image: names of files, addresses, or the bytes themselves.
    """

    image: str | None = None


@dataclass(frozen=True)
class VideoColumns(Columns):
    """Columns of a table about videos; see `Columns`.

    Args:
        video: names of files, or addresses.
    """

    video: str | None = None


@dataclass(frozen=True)
class Found:
    """The columns of one table that make its records.

    Attributes:
        visual: of the images or videos.
        texts: of captions or, where there is a question, answers; may be none.
        id, question, question_id, split: None where there is none.
        guessed: those of the keys of ``columns`` that were not given.
    """

    visual: str
    texts: list[str]
    id: str | None
    question: str | None
    question_id: str | None
    split: str | None
    guessed: tuple[str, ...]

    def names(self) -> list[str]:
        """All of them."""
        single = (self.visual, self.id, self.question, self.question_id, self.split)
        return list(dict.fromkeys([*filter(None, single), *self.texts]))


def find_columns(table: Table, columns: Columns, visual: str, key: str) -> Found:
    """The columns of a table that are meant.

    Args:
        columns: as given.
        visual: ``image`` or ``video``.
        key: of ``columns`` in the YAML, for messages.

    Raises:
        ConfigError: a column that was named is not there, or none is known to hold images.
        DataError: the table has no columns, since it has no rows.
    """
    if not table.columns:
        first = next(iter(table.rows(())), None)
        why = f"{first.id}: {first.reason}" if isinstance(first, BadRecord) else "it is empty."
        raise DataError(f"{table.path} has no row that names columns: {why}")
    given = {f.name: getattr(columns, f.name) for f in fields(columns) if getattr(columns, f.name)}
    for name, wanted in given.items():
        for column in _listed(wanted):
            if name != "split":
                _check_column(table, column, f"{key}.{name}")
    guesses = {name: _usual(name, table.columns) for name in USUAL_NAMES if name not in given}
    found = {**guesses, **given}
    if not found[visual]:
        raise _not_guessed(table, visual, key)
    is_question = "question" in given or (not found["text"] and bool(found["question"]))
    used = (visual, "id", *(("question", "answer", "question_id") if is_question else ("text",)))
    return Found(
        visual=found[visual],
        texts=_listed(found["answer" if is_question else "text"]),
        id=found["id"],
        question=found["question"] if is_question else None,
        question_id=found["question_id"] if is_question else None,
        split=_split_column(table, columns, key),
        guessed=tuple(name for name in used if guesses.get(name)),
    )


def _check_column(table: Table, column: str, key: str) -> None:
    if column not in table.columns:
        raise ConfigError(
            f"{key}: {table.path} has no column '{column}'.{did_you_mean(column, table.columns)} "
            f"Columns: {', '.join(table.columns)}."
        )


def _split_column(table: Table, columns: Columns, key: str) -> str | None:
    if columns.split is None:
        return _usual("split", table.columns)
    column = columns.split.strip() or None
    if column is not None:
        _check_column(table, column, f"{key}.split")
    return column


def count_splits(tables: Sequence[Table], columns: Columns, key: str) -> dict[str, int]:
    """How many rows of each split there are by the tables' column of splits, in the order train, val, test;
    empty where they have none. The log says what was found.

    Args:
        columns, key: see `find_columns`.

    Raises:
        ConfigError: a column that was named is not there, or names no splits.
    """
    found: Counter[str | None] = Counter()
    others: dict[str, None] = {}
    column = None
    for table in tables:
        column = _split_column(table, columns, key)
        for row in _filled(table.rows([column])) if column else ():
            value = _cell(row, column) if isinstance(row, Row) else None
            split = split_named(value)
            found[split] += 1
            if split is None and isinstance(row, Row) and len(others) < 5:
                others[describe(value)] = None
    counts = {split: found[split] for split in ("train", "val", "test") if found[split]}
    if counts:
        logger.info(
            "%s: the column '%s' says which split a row is in: %s%s",
            tables[0].path.name,
            column,
            ", ".join(f"{split} {count}" for split, count in counts.items()),
            f"; {found[None]} rows are in none" if found[None] else "",
        )
    elif others:
        why = f"{tables[0].path.name}: its column '{column}' names no splits but {', '.join(others)}"
        if columns.split:
            raise ConfigError(f"{key}.split: {why}. Splits are train, val and test.")
        logger.info("%s: it is not used", why)
    return counts


def read_records(
    tables: Sequence[Table],
    columns: Columns,
    visual: str,
    root: Path,
    key: str,
    needs_text: bool,
    split: str | None = None,
    has_strays: bool = True,
) -> PackedRecords:
    """The records of tables, read one after the other: ``visual`` and, of captions, ``caption`` (a list) and
    ``image_id``; of questions ``question``, ``question_id``, ``answers`` (a list) and ``image_id``. An id
    that is not known is not there. A row that makes no record is a `BadRecord` in its place.

    Args:
        columns, visual, key: see `find_columns`.
        root: the folder that images are read from: names inside it come without it.
        needs_text: whether a record without a caption, or answer, is bad.
        split: only rows of this split, by the column of splits. None: all.
        has_strays: whether rows that are in no split, which are bad, are among them.

    Raises:
        ConfigError: see `find_columns`; there is no column of texts where they are needed.
        DataError: a table has no rows, or none of all makes a record.
    """
    records: list[Record | BadRecord] = []
    ids = _Ids(())
    media, numbers = Media(root), itertools.count()
    for table in tables:
        found = find_columns(table, columns, visual, key)
        if needs_text and not found.texts:
            raise _not_guessed(table, "answer" if found.question else "text", key)
        if not records:
            _log_guessed(table, found, visual)
            ids = _Ids(found.guessed)
        rows = _filled(table.rows(found.names(), [found.visual]))
        if split is not None:
            rows = _of_split(rows, found.split, split, has_strays)
        records += _records(rows, found, media, needs_text, ids, numbers)
    for name in sorted(ids.unused):
        logger.info(
            "%s: its ids are not one for each, so they are not used as `%s`. Name the column in %s.%s if it "
            "is the one.",
            tables[0].path.name,
            name,
            key,
            name,
        )
    ids.drop_unused(records)
    for record in good(records):
        if cell := split_cell(record["visual"]):  # its number is that of a row, or of a shard
            record.setdefault("image_id", cell.place)
    if not records:
        paths = ", ".join(str(table.path) for table in tables)
        raise DataError(f"{paths}: there are no rows, so it can be neither trained on nor scored.")
    refuse_bad(records)
    return PackedRecords(records)


def _not_guessed(table: Table, name: str, key: str) -> ConfigError:
    return ConfigError(
        f"{key}.{name}: no column of {table.path} has a usual name for it ({', '.join(USUAL_NAMES[name])}). "
        f"Say which it is. Columns: {', '.join(table.columns)}."
    )


def _records(
    rows: Iterable[Row | BadRecord],
    found: Found,
    media: Media,
    needs_text: bool,
    ids: _Ids,
    numbers: Iterator[int],
) -> Iterator[Record | BadRecord]:
    for number, row in zip(numbers, rows, strict=False):
        if isinstance(row, BadRecord):
            yield row
            continue
        try:
            record, empty = _record(row, found, media, needs_text, number)
            ids.note(record)
        except DataError as error:
            yield BadRecord(row.place, str(error), error.cause)
            continue
        yield record
        yield from [BadRecord(row.place, "one of its captions is empty.", "empty caption")] * empty


def _filled(rows: Iterable[Row | BadRecord]) -> Iterator[Row | BadRecord]:
    """Rows without those of blank cells alone, which spreadsheets write behind and between the others."""
    for row in rows:
        cells = row.values.values() if isinstance(row, Row) else ()
        if not cells or not all(isinstance(cell, str) and not cell.strip() for cell in cells):
            yield row


def _of_split(
    rows: Iterable[Row | BadRecord], column: str | None, split: str, has_strays: bool
) -> Iterator[Row | BadRecord]:
    """The rows of a split; a `BadRecord` stands for one that is in none."""
    for row in rows:
        value = _cell(row, column) if isinstance(row, Row) else None
        own = split_named(value)
        if own == split:
            yield row
        elif own is None and has_strays:
            why = f"'{column}' must be train, val or test, not {describe(value)}."
            yield BadRecord(row.place, why, "no split") if isinstance(row, Row) else row


def _cell(row: Row, column: str | None) -> Any:
    return row.values.get(column) if column else None


def _record(row: Row, found: Found, media: Media, needs_text: bool, number: int) -> tuple[Record, int]:
    """A row's record, and how many empty captions there are among those of a list.

    Raises:
        DataError: it makes none.
    """
    record: Record = {"visual": _file_name(row.values.get(found.visual), found.visual, media)}
    written = [text for column in found.texts for text in _texts(row.values.get(column), column)]
    texts = [text for text in written if not _is_nothing(text)]
    if needs_text and not texts:
        what = "answer" if found.question else "caption"
        raise DataError(f"it has no {what} in {' or '.join(map(repr, found.texts))}.", f"empty {what}")
    if (image_id := _id(_cell(row, found.id), found.id)) is not None:
        record["image_id"] = image_id
    if found.question is None:
        return {**record, "caption": texts}, len(written) - len(texts)
    questions = _texts(row.values.get(found.question), found.question)
    if len(questions) != 1:
        raise DataError(
            f"it has {len(questions)} questions in '{found.question}', not one.", "empty question"
        )
    question_id = _id(_cell(row, found.question_id), found.question_id)
    record["question_id"] = number if question_id is None else question_id
    return {**record, "question": questions[0], "answers": texts}, 0


def _file_name(value: Any, column: str, media: Media) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"'{column}' must be a file name or address, not {describe(value)}.", "bad record")
    name = value.strip()
    _check_text(name, column)
    if is_address(name):
        return name
    return os.path.normpath(media.spelled(name)).removeprefix(os.path.join(media.root, ""))


def _texts(value: Any, column: str) -> list[str]:
    """The texts in a cell: one, those of a list (which may be empty texts), or none where it is empty."""
    values = _written_list(value) if isinstance(value, str) else value
    if not isinstance(values, list | tuple):
        values = [] if _is_nothing(value) else [value]
    plain = [value.get("answer", value) if isinstance(value, dict) else value for value in values]
    texts = ["" if _is_nothing(text) else as_text(text) for text in plain]
    for text in texts:
        if not isinstance(text, str):
            why = f"'{column}' must be text or a list of texts, not {describe(value)}."
            raise DataError(why, "bad record")
        _check_text(text, column)
    return texts


def _is_nothing(value: Any) -> bool:
    """Whether a cell is empty: nothing, blanks, or the NaN that pandas writes for nothing."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _check_text(text: str, column: str) -> None:
    if problem := text_problem(text):
        cause = "null byte" if "null" in problem else "not UTF-8"
        raise DataError(f"'{column}' holds {problem}: {describe(text)}.", cause)


def _written_list(text: str) -> list[Any] | None:
    """The list in one cell: JSON's ``["a", null]``, and what pandas makes of a column of lists
    (``['a', None]``) or of arrays (``['a' 'b']``). None where it is not a list of texts, numbers or nulls."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = _python_list(text[1:-1].strip())
    plain = isinstance(values, list) and all(
        value is None or (isinstance(value, str | int | float) and not isinstance(value, bool))
        for value in values
    )
    return values if plain else None


def _python_list(text: str) -> list[Any] | None:
    values, at = [], 0
    while at < len(text):
        if (found := _ENTRY.match(text, at)) is None:
            return None
        try:
            values.append(None if found[1] in _NOTHING else ast.literal_eval(found[1]))
        except (ValueError, SyntaxError):
            return None
        at = found.end()
    return values


def _id(value: Any, column: str | None) -> int | str | None:
    """An id as number or text; None where the cell is empty."""
    if column is None or _is_nothing(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes floats of whole numbers beside an empty cell
    if not is_id(value):
        raise DataError(f"'{column}' must be a number or text, not {describe(value)}.", "bad record")
    return value


class _Ids:
    """Sees to it that every image has one name and one id only, and every question its own id.

    A column that was guessed and holds something else (one id for each caption, say, or for each group of
    images) is not used; of one that was named, the rows that contradict earlier ones are bad. (Two images
    of one id in a column that was named are found where they are scored.)

    Args:
        guessed: the keys of ``columns`` that were.
    """

    def __init__(self, guessed: Collection[str]) -> None:
        self._guessed = guessed
        self._cells: dict[str, str] = {}
        self._of_image: dict[str, int | str] = {}
        self._images: dict[int | str, str] = {}
        self._questions: set[int | str] = set()
        self.unused: set[str] = set()

    def note(self, record: Record) -> None:
        """Gives an image that was in another cell before the name of that one. Raises `DataError` where the
        record's ids contradict those of an earlier one."""
        if (cell := split_cell(record["visual"])) and cell.digest:
            record["visual"] = self._cells.setdefault(cell.digest, record["visual"])
        if "image_id" in record:
            visual, image_id = record["visual"], record["image_id"]
            if (known := self._of_image.setdefault(visual, image_id)) != image_id:
                self._object("id", f"the id of {visual} is {image_id!r} here and {known!r} in another row")
            if self._images.setdefault(image_id, visual) != visual and "id" in self._guessed:
                self.unused.add("id")
        if "question" in record:
            if record["question_id"] in self._questions:
                self._object("question_id", f"the question_id {record['question_id']!r} is another row's too")
            self._questions.add(record["question_id"])

    def _object(self, key: str, why: str) -> None:
        if key not in self._guessed:
            raise DataError(f"{why}. Fix it, or leave columns.{key} out.", "duplicate id")
        self.unused.add(key)

    def drop_unused(self, records: Iterable[Record | BadRecord]) -> None:
        """Takes ids out of the records that are none."""
        for number, record in enumerate(records if self.unused else ()):
            if isinstance(record, BadRecord):
                continue
            if "id" in self.unused:
                record.pop("image_id", None)
            if "question_id" in self.unused:
                record["question_id"] = number


def _log_guessed(table: Table, found: Found, visual: str) -> None:
    """Logs what was guessed."""
    meant = {
        visual: found.visual,
        "id": found.id,
        "question": found.question,
        "question_id": found.question_id,
    }
    meant["answer" if found.question else "text"] = ", ".join(found.texts)
    if found.guessed:
        columns = ", ".join(f"{name}: {meant[name]}" for name in found.guessed)
        logger.info("%s: columns taken by their names: {%s}", table.path.name, columns)


def _usual(name: str, columns: Sequence[str]) -> str | None:
    """The column whose name is the most usual one for what it holds."""
    plain = {re.sub(r"[\s-]+", "_", column.strip().lower()): column for column in reversed(columns)}
    return next((plain[usual] for usual in USUAL_NAMES[name] if usual in plain), None)


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
