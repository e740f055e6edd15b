"""What lies where in a tar file, from its headers alone.

Python's ``tarfile`` follows negative sizes backwards for ever, reads a long name of any claimed size into
memory and calls itself for each header before a member. Here every header costs its own 512 bytes and at most
`MAX_EXTENSION_BYTES` of names, and each lies behind the one before it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import IO, Literal, NamedTuple

from evlgen.common.errors import DataError

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 20  # of a header that holds a long name or attributes
_MAX_EXTENSIONS = 16  # such headers before one member; real ones have up to four
_MAX_OFFSET = 1 << 62
_END = bytes(BLOCK)
_FILES, _FOLDERS, _LINKS = b"\x00" + b"07", b"5", b"12"
_WITHOUT_CONTENT = b"123456"  # links, devices, folders, pipes: nothing follows, whatever size they name
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _SPARSE = b"L", b"K", b"xX", b"g", b"S"


class TarMember(NamedTuple):
    """A member of a tar file.

    Attributes:
        name: as written; bytes that are not UTF-8 are lone surrogates.
        offset: where its bytes begin.
        size: how many they are.
        kind: of a sparse file, whose bytes are not all there, ``other``.
    """

    name: str
    offset: int
    size: int
    kind: Literal["file", "folder", "link", "other"] = "file"


class DamagedTarError(ValueError):
    """A tar file that cannot be read on.

    Attributes:
        offset: up to which byte it was read.
    """

    def __init__(self, why: str, offset: int) -> None:
        super().__init__(why)
        self.offset = offset


def tar_members(path: str | os.PathLike) -> Iterator[TarMember]:
    """The regular files in a plain tar file, in their order. Their bytes are passed over.

    Raises:
        DataError: the file cannot be read or is no plain tar file; or, after the members before that place,
            it is damaged or cut off. Members may be cut off too: reading such a one gives fewer bytes.
    """
    try:
        with open(path, "rb") as file:
            yield from (member for member in read_members(file) if member.kind == "file")
    except DamagedTarError as error:
        if error.offset == 0:
            raise DataError(
                f"{path} is not a plain tar file that can be read: {error}.", "damaged shard"
            ) from error
        raise DataError(
            f"{path} is damaged or cut off at byte {error.offset}: {error}.", "damaged shard"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path} is not a plain tar file that can be read: {error.strerror or error}.", "damaged shard"
        ) from error


def read_members(file: IO[bytes], needs_end: bool = False) -> Iterator[TarMember]:
    """All members of a tar file, in their order: ustar, GNU and pax.

    The time is that of one read for each header, the memory that of one header.

    Args:
        file: at its beginning; may be sought forwards. The caller may seek and read in it meanwhile.
        needs_end: whether one that ends without the mark of its end, between two members, is cut off.

    Raises:
        DamagedTarError: at the header that cannot be read.
        OSError: and what else reading the file raises.
    """
    at = extensions = 0
    names: dict[str, str] = {}  # what extensions say of the next member
    while True:
        start = at
        file.seek(at)
        header = file.read(BLOCK)
        if header == _END and not extensions:
            return
        if not header and not extensions and at and not needs_end and _reaches(file, at):
            return
        if len(header) < BLOCK:
            raise DamagedTarError("it is cut off" if at else "it has no header of one", at)
        kind, size = header[156:157], _size(header, at)
        at += BLOCK
        if kind in _PAX or kind in (_LONG_NAME, _LONG_LINK, _PAX_GLOBAL):
            extensions += 1
            if size > MAX_EXTENSION_BYTES:
                raise DamagedTarError(f"a header is too large: it claims {size} bytes of names", start)
            if extensions > _MAX_EXTENSIONS:
                raise DamagedTarError(f"more than {_MAX_EXTENSIONS} headers stand before one member", start)
            if kind == _LONG_NAME:
                names["path"] = _text(_exactly(file, size, start))
            elif kind in _PAX:
                names |= _pax(_exactly(file, size, start), start)
            at += _padded(size)
            continue
        name = names.get("path") or _name(header)
        if "size" in names:
            size = _decimal(names["size"], start)
        is_sparse = kind == _SPARSE or any(key.startswith("GNU.sparse.") for key in names)
        if kind == _SPARSE:
            at = _behind_map(file, header, at)
        if kind in _WITHOUT_CONTENT:
            size = 0
        which = "other" if is_sparse else _kind(kind, name)
        yield TarMember(name.rstrip("/") if which == "folder" else name, at, size, which)
        at += _padded(size)
        if at > _MAX_OFFSET:
            raise DamagedTarError(f"'{name[:200]}' claims {size} bytes", start)
        extensions, names = 0, {}


def _kind(kind: bytes, name: str) -> Literal["file", "folder", "link", "other"]:
    if kind == _FOLDERS or (kind == b"\0" and name.endswith("/")):  # the latter before ustar
        return "folder"
    return "file" if kind in _FILES else "link" if kind in _LINKS else "other"


def _size(header: bytes, at: int) -> int:
    """The size in a header, whose sum must be right."""
    rest = header[:148] + b" " * 8 + header[156:]
    written, total = _octal(header[148:156]), sum(rest)
    if written != total and written != total - 256 * sum(byte > 127 for byte in rest):  # old tars' are signed
        raise DamagedTarError("a header is damaged" if at else "it has no header of one", at)
    field = header[124:136]
    size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)
    if size is None or size > _MAX_OFFSET:
        raise DamagedTarError("a header has a size that is none", at)
    return size


def _octal(field: bytes) -> int | None:
    """A number in octal digits; None where it is none, or negative."""
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits.strip(b"01234567"):
        return None
    return int(digits or b"0", 8)


def _decimal(text: str, at: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= _MAX_OFFSET):
        raise DamagedTarError("a header has a size that is none", at)
    return int(text)


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), header[345:500]
    if header[257:263] == b"ustar\0" and prefix[0]:  # GNU keeps other things there
        return f"{_text(prefix)}/{name}"
    return name


def _pax(content: bytes, at: int) -> dict[str, str]:
    """The records of a pax header that matter here; each is ``<length> <key>=<value>`` and a line end."""
    found, start = {}, 0
    while start < len(content) and content[start]:
        digits = content[start : start + 8].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        end = start + length
        key, equals, value = content[start + len(digits) + 1 : end - 1].partition(b"=")
        if not equals or end > len(content) or content[end - 1 : end] != b"\n":
            raise DamagedTarError("a header is damaged", at)
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse."):
            found[key.decode(errors="replace")] = value.decode(errors="surrogateescape")
        start = end
    return found


def _behind_map(file: IO[bytes], header: bytes, at: int) -> int:
    """Where the content of a sparse file begins: behind the blocks that say where its pieces lie."""
    start, is_continued = at, header[482]
    while is_continued:
        is_continued = _exactly(file, BLOCK, at)[504]
        at += BLOCK
        if at - start > MAX_EXTENSION_BYTES:
            raise DamagedTarError("a header is too large: the map of a sparse file", start)
    return at


def _exactly(file: IO[bytes], size: int, at: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise DamagedTarError("it is cut off", at)
    return content


def _reaches(file: IO[bytes], end: int) -> bool:
    """Whether a file does not end before the byte at which its last member should."""
    file.seek(end - 1)
    return bool(file.read(1))


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="surrogateescape")
