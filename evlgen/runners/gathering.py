"""What several processes have found, put together on all of them: as JSON or as tensors, where accelerate's
`gather_object` would pickle it."""

from __future__ import annotations

import json
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from torch import Tensor


def gather_records(records: list[Any]) -> list[Any]:
    """The records of all processes, in the order of their ranks, on every process.

    They are exchanged as JSON where all of them are made of text, numbers, booleans, None, lists and
    dictionaries with text as keys; as pickle where any process has another one, such as a tensor.
    """
    if PartialState().num_processes == 1:
        return records
    data = json.dumps(records).encode() if _is_plain(records) else None
    sizes = _numbers_of_all(-1 if data is None else len(data))
    if min(sizes) < 0:
        return gather_object(records)
    own = torch.frombuffer(bytearray(data or b""), dtype=torch.uint8)
    rows = _padded_of_all(own, max(sizes))
    parts = (bytes(row[:size].numpy()) for row, size in zip(rows, sizes, strict=True))
    return [record for part in parts for record in json.loads(part)]


def gather_rows(rows: Tensor) -> Tensor:
    """The rows [n, ...] of all processes, in the order of their ranks, on every process; n may differ between
    them, what follows it may not. On the CPU."""
    if PartialState().num_processes == 1:
        return rows.cpu()
    sizes = _numbers_of_all(len(rows))
    parts = _padded_of_all(rows, max(sizes))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _numbers_of_all(number: int) -> list[int]:
    return gather(torch.tensor([number], device=PartialState().device)).tolist()


def _padded_of_all(rows: Tensor, length: int) -> Tensor:
    """[n, ...] -> [processes, length, ...], zeros behind the n rows of each."""
    padded = rows.new_zeros(1, length, *rows.shape[1:], device=PartialState().device)
    padded[0, : len(rows)] = rows
    return gather(padded).cpu()


def _is_plain(value: Any) -> bool:
    """Whether JSON gives back exactly this value: no subclasses, no tuples, no keys but text."""
    kind = type(value)
    if kind is dict:
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    if kind is list:
        return all(map(_is_plain, value))
    return value is None or kind in (str, int, float, bool)
