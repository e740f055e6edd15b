"""What a PyTorch file's pickle would do, found out without doing any of it.

``torch.load(weights_only=True)`` runs no code of a file, but it does build what the file asks for: deflated
records of any size, byte arrays of terabytes, tuples nested until Python's own recursion ends the process.
This check goes before it. It walks over the pickle's instructions and lets pass what ``torch.save`` writes
for tensors and plain values, within bounds, and nothing else.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# Of a real checkpoint 0.1 to 1 MB are pickle, and the rest is tensors.
MAX_PICKLE_BYTES = 64 << 20
_MAX_DEPTH = 64
_MAX_SIZE = 10_000_000  # objects in one, where what is shared counts each time
_LEGACY_START = b"\x80\x02"
_LEGACY_PICKLES = 5  # magic number, protocol, system, content, names of the storages

_ALLOWED = {
    *("collections OrderedDict", "collections Counter", "_codecs encode"),
    *("__builtin__ set", "__builtin__ complex", "builtins set", "builtins complex"),
    *(f"torch._utils _rebuild_{what}" for what in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
    *("torch Size", "torch device", "torch.storage UntypedStorage", "torch.storage TypedStorage"),
}
_STORAGE = re.compile(r"torch [A-Z][A-Za-z0-9]{2,16}Storage")
_PUSH = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_PUSH |= {"SHORT_BINSTRING", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
_TAKES = {
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "APPEND": 1,
    "SETITEM": 2,
    "REDUCE": 1,
    "BUILD": 1,
    "NEWOBJ": 1,
}
_TAKES_TO_MARK = {"TUPLE", "APPENDS", "SETITEMS"}


class RefusedPickle(Exception):
    """The pickle asks for more than tensors and plain values."""


class DamagedPickle(Exception):
    """This is no PyTorch file, or not all of one."""


def check_pickles(path: str | os.PathLike) -> None:
    """Returns where a file holds tensors and plain values only, by the layout of ``torch.save``.

    Raises:
        RefusedPickle: it asks for something else, is compressed, or nests beyond reason.
        DamagedPickle: it is cut off or no PyTorch file.
        OSError: it cannot be read.
    """
    if _is_zip(path):
        for pickle in _pickles_in_zip(Path(path)):
            _walk(io.BytesIO(pickle))
        return
    with open(path, "rb") as file:
        start = file.read(MAX_PICKLE_BYTES)
    if not start:
        raise DamagedPickle("it is empty")
    if start[:1] == b"\x80" and not start.startswith(_LEGACY_START):
        raise RefusedPickle("it is a plain pickle, not a file of torch.save")
    if not start.startswith(_LEGACY_START):
        raise DamagedPickle("it is no PyTorch file")
    stream = io.BytesIO(start)
    for _ in range(_LEGACY_PICKLES):
        _walk(stream)


def _is_zip(path: str | os.PathLike) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:  # one in several volumes
        raise DamagedPickle(str(error)) from error


def _pickles_in_zip(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise RefusedPickle("it is compressed, which torch.save never does")
            if sum(entry.file_size for entry in entries) > size:
                raise RefusedPickle("its entries claim more bytes than the file has")
            pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
            if not pickles:
                raise DamagedPickle("it is a zip file without a pickle")
            if sum(entry.file_size for entry in pickles) > MAX_PICKLE_BYTES:
                raise RefusedPickle(f"its pickle is larger than {MAX_PICKLE_BYTES >> 20} MB")
            for entry in pickles:
                yield archive.read(entry)
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise DamagedPickle(str(error)) from error


@dataclasses.dataclass(frozen=True)
class _Shape:
    """How deep an object nests, and how many objects it is made of."""

    depth: int = 0
    size: int = 1


_PLAIN = _Shape()


class _Stack(list):
    """The unpickler's stack, with the shapes of objects in their stead; None is a mark."""

    def take(self, count: int) -> list[_Shape]:
        taken = [self.pop() for _ in range(count)]
        if None in taken:
            raise DamagedPickle("its instructions are in no order")
        return taken

    def take_to_mark(self) -> list[_Shape]:
        taken = []
        while (shape := self.pop()) is not None:
            taken.append(shape)
        return taken


def _walk(stream: io.BytesIO) -> None:
    """Goes over one pickle's instructions up to its end."""
    stack, memo = _Stack(), {}
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            _step(opcode.name, argument, stack, memo)
    except (ValueError, IndexError, KeyError, UnicodeError) as error:
        raise DamagedPickle(str(error)) from error


def _step(name: str, argument: Any, stack: _Stack, memo: dict[int, _Shape]) -> None:
    if name in _PUSH:
        stack.append(_PLAIN)
    elif name == "GLOBAL":
        _check_name(argument)
        stack.append(_PLAIN)
    elif name == "MARK":
        stack.append(None)
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1] or _PLAIN
    elif name == "BINPERSID":  # a storage, by the tuple that says where it is
        stack.take(1)
        stack.append(_PLAIN)
    elif name in _TAKES or name in _TAKES_TO_MARK:
        taken = stack.take(_TAKES[name]) if name in _TAKES else stack.take_to_mark()
        if not name.startswith("TUPLE"):
            taken += stack.take(1)  # the object they go into
        stack.append(_around(taken))
    elif name not in ("PROTO", "STOP"):
        raise RefusedPickle(f"it has the instruction {name}, which torch.save does not write")
    elif name == "PROTO" and argument != 2:
        raise RefusedPickle("it is a plain pickle, not a file of torch.save")


def _around(parts: list[_Shape]) -> _Shape:
    shape = _Shape(1 + max((p.depth for p in parts), default=0), 1 + sum(p.size for p in parts))
    if shape.depth > _MAX_DEPTH or shape.size > _MAX_SIZE:
        raise RefusedPickle("its content nests beyond reason")
    return shape


def _check_name(name: str) -> None:
    module, _, attribute = name.partition(" ")
    is_dtype = module == "torch" and isinstance(getattr(torch, attribute, None), torch.dtype)
    if not (name in _ALLOWED or is_dtype or _STORAGE.fullmatch(name)):
        raise RefusedPickle(f"it asks for {module[:80]}.{attribute[:80]}")
