"""Visual tokens of many images in one file, written by several processes and read memory-mapped.

A store is a folder::

    tokens.bf16    raw bfloat16 [entries, views, *shape], sparse until filled
    status         one byte for each entry: 0 to do, 1 done, 2 broken
    broken.jsonl   why the broken ones could not be read
    card.json      what the tokens were made of and by, for people to read

An entry's tokens are on the disk before its status says so: whatever ends a process, a store holds no tokens
that are not what they claim to be, and filling it goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evlgen.common.errors import DataError

TO_DO, DONE, BROKEN = 0, 1, 2

TOKENS_FILE, STATUS_FILE, BROKEN_FILE, CARD_FILE = "tokens.bf16", "status", "broken.jsonl", "card.json"
_BYTES = 2  # of a bfloat16


class TokenStore:
    """An existing store. May be sent to other processes: each maps the file itself when it first reads.

    Args:
        folder: of `create_store`.
        entries, views, shape: what it must hold.

    Raises:
        DataError: it is damaged.
    """

    def __init__(self, folder: Path, entries: int, views: int, shape: tuple[int, ...]) -> None:
        self.folder, self.entries, self.views, self.shape = folder, entries, views, shape
        self._tokens: np.ndarray | None = None
        self._check_sizes()
        self.id: str = self._read_card()["id"]
        self.refresh()

    def refresh(self) -> None:
        """Reads again which entries are done, and why others are broken."""
        self.status = np.fromfile(self.folder / STATUS_FILE, dtype=np.uint8)
        self._problems: dict[int, tuple[str, str]] = {}
        for line in (self.folder / BROKEN_FILE).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill cut off
                record = json.loads(line)
                self._problems[int(record["entry"])] = (str(record["reason"]), str(record["cause"]))

    def problem(self, entry: int) -> DataError | None:
        """Why an entry has no tokens; None where it has."""
        if self.status[entry] == DONE:
            return None
        unknown = ("it could not be read when the vision cache was filled", "unreadable")
        return DataError(*self._problems.get(entry, unknown))

    def read(self, entry: int, view: int = 0) -> Tensor:
        """The tokens of an entry that is done: a copy, bfloat16 [*shape]."""
        if self._tokens is None:
            shape = (self.entries, self.views, *self.shape)
            mapped = np.memmap(self.folder / TOKENS_FILE, dtype=np.int16, mode="r", shape=shape)
            self._tokens = np.asarray(mapped)
        return torch.from_numpy(self._tokens[entry, view].copy()).view(torch.bfloat16)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokens": None}

    def _check_sizes(self) -> None:
        wanted = {TOKENS_FILE: store_bytes(self.entries, self.views, self.shape), STATUS_FILE: self.entries}
        for name, size in wanted.items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                raise DataError(
                    f"{path} has {'no' if found is None else found} bytes where {size} belong: the vision "
                    f"cache is damaged. Delete {self.folder}; it is filled again."
                )

    def _read_card(self) -> dict[str, Any]:
        try:
            card = json.loads((self.folder / CARD_FILE).read_text(encoding="utf-8"))
            return {"id": str(card["id"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.folder / CARD_FILE} cannot be read ({error}): the vision cache is damaged. "
                f"Delete {self.folder}; it is filled again."
            ) from error


class TokenWriter:
    """Fills entries of a store; several processes may, each its own. What was put is safe after `flush`."""

    def __init__(self, store: TokenStore) -> None:
        self.store = store
        self._tokens = open(store.folder / TOKENS_FILE, "r+b")
        self._status = open(store.folder / STATUS_FILE, "r+b")
        self._broken = open(store.folder / BROKEN_FILE, "a", buffering=1, encoding="utf-8")
        self._pending: dict[int, int] = {}

    def put(self, entry: int, tokens: Tensor) -> None:
        """An entry's tokens [views, *shape], rounded to bfloat16."""
        bits = tokens.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
        self._tokens.seek(entry * bits.nbytes)
        self._tokens.write(bits.data)
        self._pending[entry] = DONE

    def put_broken(self, entry: int, reason: str, cause: str) -> None:
        """Notes why an entry cannot be made; see `DataError` for the cause."""
        self._broken.write(json.dumps({"entry": entry, "reason": reason, "cause": cause}) + "\n")
        self._pending[entry] = BROKEN

    def flush(self) -> None:
        """Brings what was put to the disk, and only then says that it is there."""
        for file in (self._tokens, self._broken):
            file.flush()
            os.fsync(file.fileno())
        for entry, status in self._pending.items():
            self._status.seek(entry)
            self._status.write(bytes([status]))
        self._status.flush()
        os.fsync(self._status.fileno())
        self._pending = {}

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._tokens, self._status, self._broken):
            file.close()


def store_bytes(entries: int, views: int, shape: Iterable[int]) -> int:
    """The size of a store's tokens."""
    return entries * views * math.prod(shape) * _BYTES


def create_store(folder: Path, card: dict[str, Any], entries: int, views: int, shape: Iterable[int]) -> None:
    """Makes an empty store, whole or not at all; does nothing where there is one. Raises `OSError`."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making.") as temporary:
        making = Path(temporary) / "store"
        making.mkdir()
        size = store_bytes(entries, views, shape)
        for name, length in ((TOKENS_FILE, size), (STATUS_FILE, entries), (BROKEN_FILE, 0)):
            with open(making / name, "wb") as file:
                file.truncate(length)
        (making / CARD_FILE).write_text(json.dumps({"id": uuid.uuid4().hex, **card}, indent=1) + "\n")
        try:
            making.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was first
                raise
