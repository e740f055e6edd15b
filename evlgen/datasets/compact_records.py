"""Millions of records in little memory that the workers of a loader share."""

from __future__ import annotations

import hashlib
import itertools
import pickle
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import torch

_CHUNK = 4096  # records looked at together where all are


class PackedRecords(Sequence):
    """Records, each pickled by itself, one after the other in a tensor of bytes. One is unpickled when it is
    asked for, so what comes out is a copy of what went in.

    A list of ten million mappings takes gigabytes, and again in every worker process, whose mere looking at
    an object writes to its reference count. Two tensors take what the texts take; forked workers see them in
    place, and spawned ones get them through shared memory.

    Bytes are only ever those that the constructor made, so unpickling runs nobody's code; it takes a third of
    the time that JSON does.

    Args:
        records: read once.
    """

    def __init__(self, records: Iterable[Any]) -> None:
        data, ends = bytearray(), array("q", [0])
        for record in records:
            data += pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
            ends.append(len(data))
        self._data = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        self._ends = torch.frombuffer(ends, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        data, ends = self._data.numpy(), self._ends.numpy()  # slices of tensors take four times as long
        return pickle.loads(data[ends[index] : ends[index + 1]].data)

    def digest(self) -> str:
        """See `evlgen.datasets.records.digest`; at the speed of memory."""
        digest = hashlib.blake2b(self._data.numpy().data, digest_size=16)
        digest.update(self._ends.numpy().data)
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self), _CHUNK):
            ends = self._ends[first : first + _CHUNK + 1].tolist()
            data = self._data[ends[0] : ends[-1]].numpy()
            for start, end in itertools.pairwise(ends):
                yield pickle.loads(data[start - ends[0] : end - ends[0]].data)
