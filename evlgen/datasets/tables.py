"""Tables in the formats people keep them in: CSV, TSV, JSON, JSON lines, Parquet, Arrow.

A row that cannot be read comes out as a `BadRecord` in its place, and the rows around it are unharmed. Only a
file that is no such table at all is an error.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import itertools
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from evlgen.common.errors import DataError
from evlgen.datasets.annotations import describe, read_annotation
from evlgen.datasets.archive_media import cell_name, open_arrow
from evlgen.datasets.base_dataset import BadRecord

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow")
_JSON_LISTS = ("annotations", "data", "records")  # keys under which JSON files keep their records
_DELIMITERS = ",;\t|"
_SNIFFED_ROWS = 20
_MOST_FIELD = 1 << 24  # characters of a field; Python's own limit of 131,072 is less than some texts have
_NOT_CLOSED = "one is not closed"


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        place: what messages call it: ``line 18 of my.csv``.
        values: by column; one that the row lacks is not there.
    """

    place: str
    values: Mapping[str, Any]


class Table:
    """A file of rows.

    Args:
        path: of the file.
        columns: its columns, in their order.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = list(columns)

    def rows(self, columns: Iterable[str], visuals: Collection[str] = ()) -> Iterator[Row | BadRecord]:
        """The rows in their order, with at least these of the `columns`.

        Args:
            visuals: the columns that hold images. Where these are bytes, or Hugging Face's ``{bytes, path}``,
                their values are names by which `evlgen.datasets.media` reads them; bytes in other columns are
                text, in which those that are not UTF-8 are lone surrogates.
        """
        raise NotImplementedError(f"{type(self).__name__} must define rows(columns, visuals)")


def open_table(path: Path) -> Table:
    """The table in a file.

    Raises:
        DataError: missing, not a regular file, of no known format, damaged as a whole.
    """
    if not os.path.isfile(path):
        raise DataError(f"there is no table at {path}.", "missing file")
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return DelimitedTable(path)
    if suffix in (".jsonl", ".ndjson") or (suffix == ".json" and _is_json_lines(path)):
        return JsonLinesTable(path)
    if suffix == ".json":
        return JsonTable(path)
    if suffix == ".parquet":
        return ParquetTable(path)
    if suffix == ".arrow":
        return ArrowTable(path)
    raise DataError(f"{path} has no known format: a table is one of {', '.join(SUFFIXES)}.")


class DelimitedTable(Table):
    """CSV and TSV: UTF-8, with or without a byte order mark (or UTF-16 with one), as spreadsheets write them.

    What parts the fields is looked for in the first rows: comma, semicolon, tab or bar; in a ``.tsv`` it is
    the tab. What Python's ``csv`` reads by the rules (RFC 4180) is read as it does; see `_records` for the
    rest. The first row names the columns; those without a name are ignored.
    """

    def __init__(self, path: Path) -> None:
        with _reading(path), _text(path) as file:
            self._delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(file)
            file.seek(0)
            header = next((found for _, found in _records(file, self._delimiter)), None)
        if not isinstance(header, list):
            why = f"its first row cannot be read ({header})" if header else "it is empty"
            raise DataError(f"{path} has no row that names its columns: {why}.")
        if not _is_utf8(header):
            raise DataError(f"{path} is not UTF-8 text: save it as UTF-8.", "not UTF-8")
        self._header = [column.strip() for column in header]
        columns = [column for column in self._header if column]
        if not columns:
            raise DataError(f"{path} has no row that names its columns: its first row is empty.")
        twice = sorted({column for column in columns if columns.count(column) > 1})
        if twice:
            raise DataError(f"{path} has two columns '{twice[0]}': give one of them another name.")
        super().__init__(path, columns)

    def rows(self, columns: Iterable[str], visuals: Collection[str] = ()) -> Iterator[Row | BadRecord]:
        with _reading(self.path), _text(self.path) as file:
            records = _records(file, self._delimiter)
            next(records)  # the header
            for line, found in records:
                yield self._row(f"line {line} of {self.path.name}", found)

    def _row(self, place: str, found: list[str] | str) -> Row | BadRecord:
        if isinstance(found, str):
            return BadRecord(place, f"its quotes cannot be read: {found}.", "bad quotes")
        if not _is_utf8(found):
            return BadRecord(place, "it is not UTF-8 text.", "not UTF-8")
        while len(found) > len(self._header) and not found[-1].strip():
            found.pop()
        if len(found) > len(self._header) or any(self._header[len(found) :]):
            why = f"it has {len(found)} fields, and the first row names {len(self.columns)}"
            hint = (
                f"; a text with '{self._delimiter}' in it needs quotes"
                if len(found) > len(self._header)
                else ""
            )
            return BadRecord(place, f"{why}{hint}.", "ragged row")
        return Row(place, {name: cell for name, cell in zip(self._header, found, strict=False) if name})


class JsonTable(Table):
    """JSON: a list of mappings, or a mapping with such a list under ``annotations``, ``data`` or
    ``records``."""

    def __init__(self, path: Path) -> None:
        content = read_annotation(path)
        records = content
        if isinstance(content, Mapping):
            records = next((content[key] for key in _JSON_LISTS if key in content), None)
        if not isinstance(records, list):
            raise DataError(
                f"{path} must be a list of records, or have one under {' or '.join(map(repr, _JSON_LISTS))}; "
                f"it is {describe(content)}."
            )
        self._records = records
        super().__init__(path, _keys(record for record in records if isinstance(record, dict)))

    def rows(self, columns: Iterable[str], visuals: Collection[str] = ()) -> Iterator[Row | BadRecord]:
        for index, record in enumerate(self._records):
            yield _record(f"record {index} of {self.path.name}", record)


class JsonLinesTable(Table):
    """A JSON mapping in every line."""

    def __init__(self, path: Path) -> None:
        self._rows = list(_json_lines(path))
        super().__init__(path, _keys(row.values for row in self._rows if isinstance(row, Row)))

    def rows(self, columns: Iterable[str], visuals: Collection[str] = ()) -> Iterator[Row | BadRecord]:
        yield from self._rows


class _ColumnarTable(Table):
    """A table of typed columns."""

    def __init__(self, path: Path, schema: Any) -> None:
        super().__init__(path, schema.names)
        self._schema = schema

    def rows(self, columns: Iterable[str], visuals: Collection[str] = ()) -> Iterator[Row | BadRecord]:
        wanted = list(columns)
        number = 0
        for batch in self._batches(wanted):
            values = [
                self._visuals(column, batch.column(column), number)
                if column in visuals
                else _plain(batch.column(column))
                for column in wanted
            ]
            for row in zip(*values, strict=True):
                yield Row(f"row {number} of {self.path.name}", dict(zip(wanted, row, strict=True)))
                number += 1

    def _batches(self, columns: list[str]) -> Iterator[Any]:
        raise NotImplementedError(f"{type(self).__name__} must define _batches(columns)")

    def _visuals(self, column: str, values: Any, first: int) -> list[Any]:
        import pyarrow as pa

        kind = self._schema.field(column).type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return self._cells(column, values, first)
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return self._lists(column, values, first, kind.value_type)
        if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
            return _plain(values)
        parts = dict(
            zip((field.name for field in kind), values.flatten(), strict=True)
        )  # null where a row is
        cells = self._cells(column, parts["bytes"], first)
        paths = parts["path"].to_pylist() if "path" in parts else [None] * len(cells)
        return [path if cell is None else cell for cell, path in zip(cells, paths, strict=True)]

    def _lists(self, column: str, values: Any, first: int, kind: Any) -> list[Any]:
        """As `_visuals`, of lists; those of images, bytes or ``{bytes, path}``, become lists of names."""
        import pyarrow as pa

        is_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if not (is_struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            return values.to_pylist()
        lists = []
        for row, cell in enumerate(values, start=first):
            names: list[str | None] = []
            for place, item in enumerate(cell.values if cell.is_valid else ()):
                content = item["bytes"] if is_struct and item.is_valid else item
                if content.is_valid:
                    names.append(cell_name(self.path, column, f"{row}.{place}", content.as_buffer()))
                elif is_struct and item.is_valid and "path" in item:
                    names.append(item["path"].as_py())
                else:
                    names.append(None)
            lists.append(names)
        return lists

    def _cells(self, column: str, values: Any, first: int) -> list[str | None]:
        """The names of the cells of an array of bytes; None for those that are null."""
        contents = (value.as_buffer() for value in values)
        return [
            None if content is None else cell_name(self.path, column, row, content)
            for row, content in enumerate(contents, start=first)
        ]


class ParquetTable(_ColumnarTable):
    """A Parquet file. Only the wanted columns are read."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        with _reading(path), pq.ParquetFile(path) as file:
            super().__init__(path, file.schema_arrow)

    def _batches(self, columns: list[str]) -> Iterator[Any]:
        import pyarrow.parquet as pq

        with _reading(self.path), pq.ParquetFile(self.path) as file:
            yield from file.iter_batches(batch_size=256, columns=columns, use_threads=False)


class ArrowTable(_ColumnarTable):
    """An Arrow file, as Hugging Face's ``save_to_disk`` writes them. It is mapped into memory, not read."""

    def __init__(self, path: Path) -> None:
        self._table = open_arrow(path)
        super().__init__(path, self._table.schema)

    def _batches(self, columns: list[str]) -> Iterator[Any]:
        yield from self._table.select(columns).to_batches()


def _plain(values: Any) -> list[Any]:
    """The values of a column that holds no images: bytes, as Spark and TensorFlow write texts, as text."""
    found = values.to_pylist()
    return list(map(_as_text, found)) if "binary" in str(values.type) else found


def _as_text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    return list(map(_as_text, value)) if isinstance(value, list) else value


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors of a whole file, with its name."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:  # of UTF-16 that is none; pyarrow's errors are ValueErrors too
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0].rstrip('.')}.") from error


def _text(path: Path) -> TextIO:
    """The file as text, its line ends as they are. Bytes that are not UTF-8 become lone surrogates, so that
    they spoil no other row."""
    with open(path, "rb") as file:
        is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding, errors = ("utf-16", "strict") if is_utf16 else ("utf-8-sig", "surrogateescape")
    return open(path, encoding=encoding, errors=errors, newline="")


def _is_utf8(fields: Sequence[str]) -> bool:
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return False
    return True


def _delimiter(file: TextIO) -> str:
    """What parts the fields of a text's first rows: the comma where it gives every row the header's number of
    fields, as the standard has it; else what gives most rows that, then most fields; the comma where nothing
    does."""

    def score(delimiter: str) -> tuple[bool, bool, float, int]:
        file.seek(0)
        records = itertools.islice(_records(file, delimiter), 10 * _SNIFFED_ROWS)
        rows = list(itertools.islice((r for _, r in records if isinstance(r, list)), _SNIFFED_ROWS))
        if not rows or len(rows[0]) < 2:
            return False, False, 0.0, 0
        has_quotes = any('"' in name for name in rows[0])  # a name in quotes was cut in two
        fitting = sum(len(row) == len(rows[0]) for row in rows) / len(rows)
        return not has_quotes, delimiter == "," and fitting == 1, fitting, len(rows[0])

    return max(_DELIMITERS, key=score)


class _Lines:
    """Lines that can be given back, with the number of the one last taken."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._returned: list[str] = []
        self.taken: list[str] = []
        self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._returned.pop() if self._returned else next(self._lines)
        self.taken.append(line)
        self.number += 1
        return line

    def keep_first(self) -> None:
        """Gives back what was taken, but for the first line."""
        self._returned += reversed(self.taken[1:])
        self.number -= len(self.taken) - 1


def _records(lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """The records of a delimited text: the number of the line each starts in, and its fields, or why it has
    none.

    They are those of Python's ``csv``, by the strict rules, as far as it has no objection. Where it has one,
    a quote that does not end in its own row spoils that row only: reading goes on behind it. From there on
    quotes are doubted: what they join, but looks like rows of the table, is rows.
    """
    source, width, doubted = _Lines(lines), 0, False
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    single = 0  # before this line no quote ends that is opened in a line before it
    while True:
        source.taken.clear()
        start = source.number + 1
        try:
            lone = csv.reader([next(source)], delimiter=delimiter, strict=True) if start < single else None
            fields: list[str] | str = _next_fields(lone or reader)
        except StopIteration:
            return
        except csv.Error as error:
            fields = _NOT_CLOSED if "end of data" in str(error) else str(error).rstrip(".")
        else:
            if doubted and _are_rows(source.taken, delimiter, width):
                fields = _NOT_CLOSED
        if isinstance(fields, str):
            doubted, single = True, max(single, source.number)
            source.keep_first()
            if len(source.taken) == 1 and fields != _NOT_CLOSED:
                fields = _plain_fields(source.taken[0], delimiter)
        if fields:
            width = width or len(fields)  # the header's
            yield start, fields


def _next_fields(reader: Iterator[list[str]]) -> list[str]:
    """The next of a csv reader, after which the limit of all csv readers is as it was."""
    before = csv.field_size_limit(_MOST_FIELD)
    try:
        return next(reader)
    finally:
        csv.field_size_limit(before)


def _plain_fields(line: str, delimiter: str) -> list[str]:
    """The fields of a line in which quotes are text: ``1.jpg,"Stop" says a sign``."""
    return line.rstrip("\r\n").split(delimiter)


def _are_rows(lines: Sequence[str], delimiter: str, width: int) -> bool:
    """Whether the lines of one record are rows by themselves, so that a quote in the first was joined with
    one in the last: each has ``width`` fields, no field begins with a blank, as what follows a comma in a
    sentence does, and there is a column of names of files of one kind."""
    if len(lines) < 2 or width < 2:
        return False
    rows = [_plain_fields(line, delimiter) for line in lines]
    if not all(len(row) == width and not any(f[:1].isspace() for f in row) for row in rows):
        return False
    kinds = ({os.path.splitext(field)[1] for field in column} for column in zip(*rows, strict=True))
    return any(len(kind) == 1 and len(next(iter(kind))) > 1 for kind in kinds)


def _is_json_lines(path: Path) -> bool:
    """Whether a file called .json has a whole mapping in its first line, and more after it."""
    with _reading(path), open(path, "rb") as file:
        first, second = file.readline(1 << 20), file.readline(1 << 20)
    try:
        return bool(second.strip()) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(path: Path) -> Iterator[Row | BadRecord]:
    with _reading(path), open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8).strip()
            place = f"line {number} of {path.name}"
            if not line:
                continue
            try:
                yield _record(place, json.loads(line.decode()))
            except UnicodeDecodeError:
                yield BadRecord(place, "it is not UTF-8 text.", "not UTF-8")
            except (ValueError, RecursionError) as error:
                why = str(error).partition(":")[0] or "it is nested too deeply"
                yield BadRecord(place, f"it is not JSON: {why}.", "not JSON")


def _record(place: str, record: Any) -> Row | BadRecord:
    if isinstance(record, dict):
        return Row(place, record)
    return BadRecord(place, f"it must be a mapping, not {describe(record)}.")


def _keys(records: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record))
