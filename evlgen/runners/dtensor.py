"""Tensors of which each process holds a part (torch's `DTensor`), side by side with whole ones.

Only a language model that is trained and sharded has such weights, gradients and moments. Nothing here
imports `torch.distributed.tensor` before it meets one: that takes most of a second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def is_spread(tensor: Tensor) -> bool:
    """Whether each process holds a part of it."""
    return hasattr(tensor, "full_tensor")


def gathered(tensors: Mapping[str, Any], keep: bool) -> dict[str, Tensor]:
    """The same with whole tensors, the spread ones on the CPU. All processes call it together.

    Args:
        keep: false where a process only gives its parts and needs no tensors.
    """
    out = {}
    for name, tensor in tensors.items():
        if is_spread(tensor):
            tensor = tensor.full_tensor()
            tensor = tensor.cpu() if keep else tensor
        if keep:
            out[name] = tensor
    return out


def part_of(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor, spread as ``like`` is: each process takes its part and nothing is sent."""
    if not is_spread(like) or is_spread(tensor) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def by_kind(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """Whole tensors and spread ones apart: no operation takes them together."""
    kinds = [[t for t in tensors if is_spread(t) == spread] for spread in (False, True)]
    return [kind for kind in kinds if kind]


def total_norm(tensors: Sequence[Tensor]) -> float:
    """The norm of all tensors as one vector."""
    norms: list[Any] = [torch.nn.utils.get_total_norm(kind) for kind in by_kind(tensors)]
    return math.hypot(*((n.full_tensor() if is_spread(n) else n).item() for n in norms))


def multiply(tensors: list[Tensor], factor: float) -> None:
    """Multiplies all tensors in place."""
    for kind in by_kind(tensors):
        torch._foreach_mul_(kind, factor)
