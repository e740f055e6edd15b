"""Linear layers by the library that multiplies fastest on this processor.

torch gives float32 products on a CPU to MKL, which on AMD processors leaves AVX-512 unused: two cores of a
Zen 5 reach 225 GFLOP/s with it and 500 with oneDNN, both in full float32 precision. Where there is no
AVX-512 (Zen 4 without it: 140 to 150 GFLOP/s with either, and less in oneDNN's backward products), on other
makers' processors and in other types, torch's own choice is as good.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def quicken(module: nn.Module) -> None:
    """Every plain `nn.Linear` in a module computes by `linear` from now on. Nothing else about it changes: it
    stays an `nn.Linear` with the same weights under the same names."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = Linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: [..., in], [out, in], [out] -> [..., out]."""
    if (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or x.numel() == 0
        or torch.is_autocast_enabled("cpu")
        or not mkl_is_slow()
    ):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _OneDNNLinear.apply(x, weight, bias)
    return _product(x, weight, bias)


@functools.cache
def mkl_is_slow() -> bool:
    """Whether this is an AMD processor with AVX-512, where MKL would be asked, and oneDNN is there."""
    if not (torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        processor = platform.processor()  # on Windows it names the maker
    return "AuthenticAMD" in processor


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # the product that torch.compile puts in the place of a linear layer on a CPU
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[1], ctx.needs_input_grad[0]
        ctx.save_for_backward(x if needs_x else None, weight if needs_weight else None)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)  # [all positions, out]
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad, weight.t(), None)
        if ctx.needs_input_grad[1]:
            grad_weight = _product(rows.t(), x.flatten(0, -2).t(), None)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias
