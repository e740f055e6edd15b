"""Images that lie in one large file: members of zip and tar archives, bytes in Parquet and Arrow tables.

They are read in place, nothing is unpacked. A file is opened once in each process that reads from it.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import os
import re
import zipfile
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast

from evlgen.common.errors import DataError, did_you_mean
from evlgen.files.archives import DAMAGED
from evlgen.files.io import atomic_file, cache_root
from evlgen.files.tar_headers import DamagedTarError, read_members

if TYPE_CHECKING:
    import pyarrow

T = TypeVar("T")

MAX_MEMBER_BYTES = 256 << 20  # no image is larger; what claims to be would fill the memory
_TABLES = (".parquet", ".arrow")
_ARCHIVE = re.compile(r"\.(zip|tar|tar\.gz|tgz|tar\.bz2|tar\.xz)(?=/|$)", re.IGNORECASE)
_CELL_END = re.compile(r"(?P<row>[0-9]{1,18}(\.[0-9]{1,9})?)(=(?P<digest>[0-9a-f]+))?")
_LONGEST_PATH = 4096  # of a file; what lies in it may have a longer name


class Place(NamedTuple):
    """Where an image lies inside a file: a member of an archive, or a cell of a table."""

    file: Path
    column: str | None  # of a table; None for archives
    member: str  # of an archive; of a table the number of the row, and in a list of images ``.`` and its own


class Cell(NamedTuple):
    """What the name of a cell says."""

    file: str
    column: str
    row: str
    digest: str | None  # of the bytes in it; cells of equal bytes hold the same image

    @property
    def place(self) -> str:
        """``train.parquet#image:17``."""
        return f"{self.file}#{self.column}:{self.row}"


def cell_name(file: str | os.PathLike, column: str, row: int | str, content: Any = b"") -> str:
    """The name by which `split_place` finds a cell of a table, and `split_cell` the digest of its bytes. In a
    cell of several images ``row`` is ``17.0``, ``17.1``, and so on."""
    place = f"{file}#{column}:{row}"
    return f"{place}={hashlib.blake2b(content, digest_size=12).hexdigest()}" if len(content) else place


def split_cell(name: str) -> Cell | None:
    """The parts of a name that `cell_name` made; None for any other name."""
    place, _, end = name.rpartition(":")
    found = _CELL_END.fullmatch(end)
    if found is None:
        return None
    start = max(place.rfind(f"{suffix}#", 0, len(place) - 1) for suffix in _TABLES)  # a column has a name
    if start < 0:
        return None
    file, _, column = place[start:].partition("#")
    return Cell(place[:start] + file, column, found["row"], found["digest"])


def split_place(path: str) -> Place | None:
    """The archive or table that a path leads into: ``photos.tar/a/1.jpg``, ``train.parquet#image:17``; None
    for a file of its own. A folder may be called ``x.zip`` too."""
    if (cell := split_cell(path)) is not None and os.path.isfile(cell.file):
        return Place(Path(cell.file), cell.column, cell.row)
    for found in _ARCHIVE.finditer(path, 0, _LONGEST_PATH):
        file, member = path[: found.end()], path[found.end() + 1 :]
        if os.path.isfile(file):
            return Place(Path(file), None, member)
    return None


def open_container(place: Place) -> Container:
    """The container of a place. Raises `DataError` where it cannot be read."""
    if place.column is not None:
        return TableColumn(place.file, place.column)
    suffix = place.file.suffix.lower()
    if suffix == ".zip":
        return ZipArchive(place.file)
    if suffix == ".tar":
        return TarArchive(place.file)
    raise DataError(
        f"{place.file} is compressed as a whole, so its members cannot be read in place. Unpack it, or pack "
        "its files as .zip or plain .tar.",
        "compressed archive",
    )


class PerProcess(Generic[T]):
    """What is opened once in each process: an open file has one position, which forked processes share."""

    def __init__(self, opener: Callable[[], T]) -> None:
        self._opener = opener
        self._pid: int | None = None
        self._opened: T | None = None

    def get(self) -> T:
        """What was opened in this process."""
        if self._pid != os.getpid():
            self._opened, self._pid = self._opener(), os.getpid()
        return cast(T, self._opened)

    def __getstate__(self) -> dict[str, Any]:
        return {"_opener": self._opener, "_pid": None, "_opened": None}


class Container:
    """A file with images in it. Raises `DataError` on construction where it cannot be read.

    Args:
        file: its path.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def names(self) -> Collection[Any]:
        """The names of its members."""
        raise NotImplementedError(f"{type(self).__name__} must define names()")

    def has(self, member: str) -> bool:
        """Whether there is a member of the name."""
        return _plain(member) in self.names()

    def read(self, member: str) -> bytes:
        """The bytes of a member.

        Raises:
            DataError: there is none of the name, or it is damaged.
        """
        raise NotImplementedError(f"{type(self).__name__} must define read(member)")

    def identity(self, member: str) -> str:
        """A text that is another one when the member's bytes are: by the file's name, size and time."""
        stamp = os.stat(self.file)
        return f"{self.file} {stamp.st_size} {stamp.st_mtime_ns} {member}"

    def _missing(self, member: str, remark: str = "") -> DataError:
        names = self.names()
        tail = os.path.basename(member)
        hint = did_you_mean(member, [n for n in islice(names, 100_000) if os.path.basename(n) == tail])
        return DataError(
            f"{self.file} has no member '{member}' (it has {len(names)}, such as "
            f"'{next(iter(names), '')}').{hint}{remark}",
            "missing file",
        )

    def _damaged(self, member: str, why: object) -> DataError:
        return DataError(f"cannot read {self.file}/{member}: {why}.", "damaged archive")

    def _checked_size(self, member: str, size: int) -> int:
        if size > MAX_MEMBER_BYTES:
            raise DataError(
                f"{self.file}/{member} claims to hold {size} bytes: that is no image.", "too large"
            )
        return size


class ZipArchive(Container):
    """A zip file, by its central directory. Backslashes in its names, which some programs of Windows write
    against the standard, are slashes."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self._zip = PerProcess(functools.partial(_open_zip, file))
        slashed = {name.replace("\\", "/"): name for name in self._zip.get().namelist()}
        self._members = {_plain(name): own for name, own in slashed.items() if not name.endswith("/")}

    def names(self) -> Collection[str]:
        return self._members.keys()

    def read(self, member: str) -> bytes:
        opened = self._zip.get()
        name = self._members.get(_plain(member))
        if name is None:
            raise self._missing(member)
        self._checked_size(member, opened.getinfo(name).file_size)
        try:
            return opened.read(name)
        except (*DAMAGED, OSError) as error:
            raise self._damaged(member, _said(error)) from error

    def identity(self, member: str) -> str:
        """By the directory's checksum: an archive that was copied, moved or packed again is the same."""
        name = self._members.get(_plain(member))
        if name is None:
            return f"{self.file} {member} missing"
        info = self._zip.get().getinfo(name)
        return f"{name} {info.file_size} {info.CRC:08x}"


class TarArchive(Container):
    """A plain tar file. Its headers are read once, from the first to the last; a file in it by its place."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self._places: dict[str, tuple[int, int]] = {}
        self._end = self._read_headers()
        self._opened: PerProcess[Any] = PerProcess(functools.partial(open, file, "rb"))

    def names(self) -> Collection[str]:
        return self._places.keys()

    def read(self, member: str) -> bytes:
        if (place := self._places.get(_plain(member))) is None:
            remark = f" It is damaged or cut off after byte {self._end}." if self._end is not None else ""
            raise self._missing(member, remark)
        start, size = place
        self._checked_size(member, size)
        opened = self._opened.get()
        opened.seek(start)
        content = opened.read(size)
        if len(content) < size:
            raise self._damaged(member, f"the archive is cut off after {len(content)} of its {size} bytes")
        return content

    def _read_headers(self) -> int | None:
        """Notes where each file lies; a later one of the same name is meant, as tar has it.

        Returns:
            the place where the headers break off; None where the archive ends as it should.
        """
        try:
            with open(self.file, "rb") as file:
                for member in read_members(file, needs_end=True):
                    if member.kind == "file":
                        self._places[_plain(member.name)] = member.offset, member.size
        except (DamagedTarError, OSError) as error:
            if not self._places:
                raise DataError(
                    f"{self.file} is not a tar archive: {_said(error)}.", "damaged archive"
                ) from error
            return error.offset if isinstance(error, DamagedTarError) else 0
        return None


class TableColumn(Container):
    """A column of images in a Parquet or Arrow file: bytes, or Hugging Face's ``{bytes, path}``.

    An Arrow file is mapped into memory. A Parquet file has its rows in compressed groups, of which one would
    be unpacked for each image: its column is written once to an Arrow file in the cache.

    Args:
        file: its path.
        column: of the images.
    """

    def __init__(self, file: Path, column: str) -> None:
        super().__init__(file)
        self.column = column
        mapped = file if file.suffix.lower() == ".arrow" else _as_arrow_file(file, column)
        self._chunks = PerProcess(functools.partial(_open_chunks, mapped, column))
        self._ends = list(accumulate(len(chunk) for chunk in self._chunks.get()))

    def names(self) -> range:
        return range(self._ends[-1] if self._ends else 0)

    def has(self, member: str) -> bool:
        return int(member.partition(".")[0]) in self.names()

    def identity(self, member: str) -> str:
        return super().identity(f"{self.column}:{member}")

    def read(self, member: str) -> bytes:
        number, _, place = member.partition(".")
        row = int(number)
        which = bisect.bisect_right(self._ends, row)
        if which == len(self._ends):
            raise DataError(f"{self.file} has no row {row}.", "missing file")
        chunk = self._chunks.get()[which]
        value = chunk[row - (self._ends[which - 1] if which else 0)]
        value = value[int(place)].as_py() if place else value.as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes) or not content:
            raise DataError(f"row {row} of {self.file} has no bytes in '{self.column}'.", "empty file")
        return content


def _open_zip(file: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except (*DAMAGED, OSError) as error:
        raise DataError(
            f"{file} is not a zip archive that can be read: {_said(error)}.", "damaged archive"
        ) from error


def _plain(member: str) -> str:
    """``./a//b.jpg`` and ``a/b.jpg`` are one member."""
    return os.path.normpath(member) if member.startswith(".") or "/." in member or "//" in member else member


def open_arrow(file: Path) -> pyarrow.Table:
    """An Arrow file, of the stream or the file format, mapped into memory.

    Raises:
        DataError: it is neither, or is damaged.
    """
    import pyarrow as pa

    try:
        with open(file, "rb") as opened:
            is_file_format = opened.read(6) == b"ARROW1"
        source = pa.memory_map(str(file))
        reader = pa.ipc.open_file(source) if is_file_format else pa.ipc.open_stream(source)
        return reader.read_all()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file} is not an Arrow file that can be read: {_said(error)}.", "damaged table"
        ) from error


def _open_chunks(file: Path, column: str) -> list[pyarrow.Array]:
    table = open_arrow(file)
    _check_column(column, table.column_names, file)
    return table.column(column).chunks


def _check_column(column: str, columns: Sequence[str], file: Path) -> None:
    if columns.count(column) != 1:
        raise DataError(
            f"{file} has {columns.count(column) or 'no'} columns '{column}'.{did_you_mean(column, columns)}",
            "missing file",
        )


def _as_arrow_file(file: Path, column: str) -> Path:
    """The column of a Parquet file as an Arrow file in the cache, written where it is not there yet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    stamp = os.stat(file)
    mark = f"{file.resolve()} {stamp.st_size} {stamp.st_mtime_ns} {column}"
    digest = hashlib.blake2b(mark.encode(errors="surrogateescape"), digest_size=12).hexdigest()
    target = cache_root() / "pictures_of_tables" / f"{file.stem}-{digest}.arrow"
    if target.is_file():
        return target
    try:
        with pq.ParquetFile(file) as source, atomic_file(target, "wb") as sink:
            _check_column(column, source.schema_arrow.names, file)
            schema = pa.schema([source.schema_arrow.field(column)])
            with pa.ipc.new_stream(sink, schema) as writer:
                for batch in source.iter_batches(batch_size=64, columns=[column], use_threads=False):
                    writer.write_batch(batch)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"the images of {file} cannot be read: {_said(error)}.", "damaged table") from error
    return target


def _said(error: BaseException) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__
