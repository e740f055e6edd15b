"""Delimited tables: what Python's csv reads by the rules comes out as it does; nothing breaks on the rest."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st

from evlgen.datasets.base_dataset import BadRecord
from evlgen.datasets.tables import open_table
from fuzzing.mutate import mutate

_cells = st.text("ab ,;\t|\"\n\r'.é\u2028", max_size=12) | st.sampled_from(
    ["a.png", "STOP\n1,000 m ahead", "x\ny,z", "b.png,red\nc.png,blue", '"', '""', '","', "[1, 2]", ""]
)
_tables = st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(_cells, min_size=n, max_size=n), max_size=8))
_writers = st.tuples(
    st.sampled_from(",,,;\t|"),
    st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)),
    st.sampled_from(("\r\n", "\n")),
)
_raw = st.text('ab,"\n.p', max_size=80).map(lambda text: f"path,caption\n{text}")

inputs = st.tuples(_tables, _writers) | _raw | st.tuples(st.integers(0, 2**32).map(random.Random), _tables)


def prepare(folder: Path) -> None:
    """Nothing is needed but the files that are written."""


def action(folder: Path, drawn: tuple | str, keep: Callable[[Path], None]) -> Callable[[], object]:
    """What is done with one input: a table that Python's csv reads is compared with what it reads."""
    delimiter, content = ",", drawn
    if isinstance(drawn, tuple) and isinstance(drawn[0], random.Random):
        content = mutate(_written(drawn[1], ",", csv.QUOTE_MINIMAL, "\n").encode(), drawn[0])
    elif isinstance(drawn, tuple):
        has_one_column = len((drawn[0] or [[1, 2]])[0]) == 1  # nothing shows what parts its fields: the comma
        delimiter = "," if has_one_column else drawn[1][0]
        content = _written(drawn[0], delimiter, *drawn[1][1:])
    path = folder / ("a.tsv" if delimiter == "\t" else "a.csv")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    keep(path)

    def read() -> None:
        table = open_table(path)
        found = list(table.rows(table.columns))
        assert all(isinstance(row, BadRecord) or list(row.values) == table.columns for row in found)
        if isinstance(content, str) and (expected := by_csv(content, delimiter)) is not None:
            assert [None if isinstance(row, BadRecord) else list(row.values.values()) for row in found] == [
                _of_width(row, len(table.columns)) for row in expected
            ]

    return read


def by_csv(text: str, delimiter: str) -> list[list[str]] | None:
    """The rows behind the header as Python's csv has them; None where it finds fault with any."""
    try:
        return [row for row in csv.reader(io.StringIO(text, ""), delimiter=delimiter, strict=True) if row][1:]
    except csv.Error:
        return None


def _of_width(row: list[str], width: int) -> list[str] | None:
    """A row with as many cells as there are columns, or empty ones more; None for any other."""
    return row[:width] if len(row) >= width and not any(cell.strip() for cell in row[width:]) else None


def _written(rows: list[list[str]], delimiter: str, quoting: int, end: str) -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writerow([f"column {i}" for i in range(len(rows[0]) if rows else 2)])
    writer.writerows(rows)
    return out.getvalue()
