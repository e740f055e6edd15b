"""What a PyTorch file's pickle would do, found out without doing any of it.

``torch.load(weights_only=True)`` runs no code of a file, but it does build what the file asks for: deflated
records of any size, storages of terabytes, tuples nested until Python's own recursion ends the process.
This check goes before it. It walks over the pickle's instructions and lets pass what ``torch.save`` writes
for tensors and plain values, within bounds, and nothing else.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickletools
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

# Of a real checkpoint 0.1 to 1 MB are pickle, and the rest is tensors.
MAX_PICKLE_BYTES = 64 << 20
_MAX_DEPTH = 64
_MAX_SIZE = 10_000_000  # objects in one, where what is shared counts each time
_ZIP_START = b"PK\x03\x04"
_LEGACY_START = b"\x80\x02"
# The fields used of the records at a zip file's end (APPNOTE 4.3.14 to 4.3.16).
_ZIP_END = struct.Struct("<4s 12x L H")  # signature, the directory's offset, length of the comment
_ZIP64_LOCATOR = struct.Struct("<4s 4x Q 4x")  # signature, offset of the next
_ZIP64_END = struct.Struct("<48x Q")  # the directory's offset
_LEGACY_PICKLES = 5  # magic number, protocol, system, content, names of the storages

_ENCODE = "_codecs encode"  # bytes, as text of this encoding: others take hours over some texts
_BYTES_ENCODING = "latin1"
_CALLABLE = {
    *("collections OrderedDict", "collections Counter", _ENCODE),
    *("__builtin__ set", "__builtin__ complex", "builtins set", "builtins complex"),
    *(f"torch._utils _rebuild_{what}" for what in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
    *("torch Size", "torch device"),
}
# Named where a storage is described, never called: a call makes one of any size.
_NAMED = {"torch.storage UntypedStorage", "torch.storage TypedStorage"}
_STORAGE = re.compile(r"torch [A-Z][A-Za-z0-9]{2,16}Storage")
_PUSH = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_PUSH |= {"SHORT_BINSTRING", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
_TAKES = {
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "APPEND": 1,
    "SETITEM": 2,
    "BUILD": 1,
}
_TAKES_TO_MARK = {"TUPLE", "APPENDS", "SETITEMS"}


class RefusedPickle(Exception):
    """The pickle asks for more than tensors and plain values."""


class DamagedPickle(Exception):
    """This is no PyTorch file, or not all of one."""


def check_pickles(path: str | os.PathLike) -> None:
    """Returns where a file holds tensors and plain values only, by the layout of ``torch.save``.

    Raises:
        RefusedPickle: it asks for something else, is compressed, or is nested too deeply.
        DamagedPickle: it is truncated or not a PyTorch file.
        OSError: it cannot be read.
    """
    if is_zip(path):
        _walk(io.BytesIO(_pickle_in_zip(Path(path))))
        return
    with open(path, "rb") as file:
        start = file.read(MAX_PICKLE_BYTES)
    if not start:
        raise DamagedPickle("it is empty")
    if start[:1] == b"\x80" and not start.startswith(_LEGACY_START):
        raise RefusedPickle("it is a plain pickle, not a file of torch.save")
    if not start.startswith(_LEGACY_START):
        raise DamagedPickle("it is not a PyTorch file")
    stream = io.BytesIO(start)
    for _ in range(_LEGACY_PICKLES):
        _walk(stream)


def is_zip(path: str | os.PathLike) -> bool:
    """Whether ``torch.load`` takes a file for a zip file: by its first bytes, whatever is at its end."""
    with open(path, "rb") as file:
        return file.read(len(_ZIP_START)) == _ZIP_START


def _pickle_in_zip(path: Path) -> bytes:
    """What PyTorch's own zip reader, which ``torch.load`` uses, has as the pickle.

    It finds names without regard to case and ends them at a zero byte: another reader may find another entry.
    """
    try:
        _check_zip(path)
        reader: Any = torch._C.PyTorchFileReader(str(path))
        if not reader.has_record("data.pkl"):
            raise DamagedPickle("it is a zip file without a pickle")
        return reader.get_record("data.pkl")
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise DamagedPickle(str(error)) from error


def _check_zip(path: Path) -> None:
    """Bounds what reading a zip file's entries can take."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if archive.start_dir != _directory_offset(path, size):
            raise DamagedPickle("its directory is not where it says")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise RefusedPickle("it is compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > size:
        raise RefusedPickle("its entries claim more bytes than the file has")
    pickles = [entry for entry in entries if entry.orig_filename.lower().endswith(".pkl")]
    if sum(entry.file_size for entry in pickles) > MAX_PICKLE_BYTES:
        raise RefusedPickle(f"its pickle is larger than {MAX_PICKLE_BYTES >> 20} MB")


def _directory_offset(path: Path, size: int) -> int:
    """Where a zip file says its directory is, which must be what every reader finds first (APPNOTE 4.3.14 to
    4.3.16): no bytes after its end, and nothing between the records at its end."""
    with open(path, "rb") as file:
        file.seek(-min(_ZIP_END.size + _ZIP64_LOCATOR.size + _ZIP64_END.size, size), os.SEEK_END)
        tail = file.read()
    signature, offset, comment = _ZIP_END.unpack(tail[-_ZIP_END.size :])
    if signature != b"PK\5\6" or comment:
        raise DamagedPickle("it has bytes after its end")
    if len(tail) < _ZIP_END.size + _ZIP64_LOCATOR.size + _ZIP64_END.size:
        return offset
    signature, end = _ZIP64_LOCATOR.unpack_from(tail, _ZIP64_END.size)
    if signature != b"PK\6\7":
        return offset
    if end != size - len(tail):
        raise DamagedPickle("its directory is not where it says")
    return _ZIP64_END.unpack_from(tail)[0]


@dataclasses.dataclass(eq=False)
class _Shape:
    """How deep an object is nested, and how many objects it is made of."""

    depth: int = 0
    size: int = 1
    name: str | None = None  # of a global
    text: str | None = None  # of a string, or of a tuple's last string
    held: bool = False  # by another object

    def add(self, parts: list[_Shape]) -> None:
        """Puts parts into it, while the memo refers to it."""
        for part in parts:
            part.held = True
            self.depth = max(self.depth, part.depth + 1)
            self.size += part.size
        if self.held:
            raise RefusedPickle("it has objects that contain themselves")
        if self.depth > _MAX_DEPTH or self.size > _MAX_SIZE:
            raise RefusedPickle("its content is nested too deeply, or too large")


class _Stack(list):
    """The unpickler's stack, with shapes instead of objects; None is a mark."""

    def take(self, count: int) -> list[_Shape]:
        """The last objects, the last one first."""
        taken = [self.pop() for _ in range(count)]
        if None in taken:
            raise DamagedPickle("its instructions are not in order")
        return taken

    def take_to_mark(self) -> list[_Shape]:
        taken = []
        while (shape := self.pop()) is not None:
            taken.append(shape)
        return taken


def _walk(stream: io.BytesIO) -> None:
    """Goes over one pickle's instructions up to its end."""
    stack = _Stack()
    memo: dict[Any, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            _step(opcode.name, argument, stack, memo)
    except (ValueError, IndexError, KeyError, UnicodeError) as error:
        raise DamagedPickle(str(error)) from error


def _step(name: str, argument: Any, stack: _Stack, memo: dict[int, _Shape]) -> None:
    if name in _PUSH:
        stack.append(_Shape(text=argument if isinstance(argument, str) else None))
    elif name == "GLOBAL":
        _check_name(argument)
        stack.append(_Shape(name=argument))
    elif name == "MARK":
        stack.append(None)
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1] or _Shape()
    elif name == "BINPERSID":  # a storage, by the tuple that says where it is
        stack.take(1)
        stack.append(_Shape())
    elif name in ("REDUCE", "NEWOBJ"):
        arguments, called = stack.take(2)
        _check_call(called, arguments)
        stack.append(_around([arguments]))
    elif name in _TAKES or name in _TAKES_TO_MARK:
        taken = stack.take(_TAKES[name]) if name in _TAKES else stack.take_to_mark()
        if name.startswith("TUPLE"):
            stack.append(_around(taken))
        else:
            (target,) = stack.take(1)
            target.add(taken)
            stack.append(target)
    elif name not in ("PROTO", "STOP"):
        raise RefusedPickle(f"it has the instruction {name}, which torch.save does not write")
    elif name == "PROTO" and argument != 2:
        raise RefusedPickle("it is a plain pickle, not a file of torch.save")


def _around(parts: list[_Shape]) -> _Shape:
    """A new object of parts, the last one first."""
    shape = _Shape(depth=1, text=parts[0].text if parts else None)
    shape.add(parts)
    return shape


def _check_call(called: _Shape, arguments: _Shape) -> None:
    if called.name not in _CALLABLE:
        raise RefusedPickle(f"it calls {called.name or 'a value'}, which torch.save does not")
    if called.name == _ENCODE and arguments.text != _BYTES_ENCODING:
        raise RefusedPickle(f"it encodes text as {str(arguments.text)[:80]!r}, which torch.save does not")


def _check_name(name: str) -> None:
    module, _, attribute = name.partition(" ")
    is_dtype = module == "torch" and isinstance(vars(torch).get(attribute), torch.dtype)
    if not (name in _CALLABLE or name in _NAMED or is_dtype or _STORAGE.fullmatch(name)):
        raise RefusedPickle(f"it asks for {module[:80]}.{attribute[:80]}")
