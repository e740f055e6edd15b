"""Linear layers by the library that multiplies fastest on this processor.

torch gives float32 products on a CPU to MKL, which holds back on AMD processors. oneDNN does not, in the same
full float32 precision: on two cores of a Zen 5 with AVX-512 it reaches 500 GFLOP/s where MKL has 225, and
on a Zen 4 without it, equal for many rows, it is faster for few: 133 against 95 with 80 rows and a
vocabulary of 50,272, 72 against 41 with 16, 35 against 16 with 5, as in generation. Only the products of a
backward pass without AVX-512 are MKL's: 140 to 150 against 85 to 150. On other makers' processors and in
other types torch's own choice is as good.
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


def use_fast_linear(module: nn.Module) -> None:
    """Every plain `nn.Linear` in a module computes by `linear` from now on. Nothing else about it changes: it
    stays an `nn.Linear` with the same weights under the same names."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = Linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: [..., in], [out, in], [out] -> [..., out]."""
    if (
        torch.compiler.is_compiling()  # it has its own choice, and no place for this one
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or x.numel() == 0
        or x.ndim < 2
        or torch.is_autocast_enabled("cpu")
        or not mkl_is_slow()
    ):
        return F.linear(x, weight, bias)
    trained = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and trained:
        return _OneDNNLinear.apply(x, weight, bias)
    return _product(x, weight, bias)


@functools.cache
def mkl_is_slow() -> bool:
    """Whether this is an AMD processor, where MKL would be asked, and oneDNN is there."""
    if not (torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        processor = platform.processor()  # on Windows it names the maker
    return "AuthenticAMD" in processor


@functools.cache
def mkl_is_slow_backward() -> bool:
    """The same of the products of a backward pass."""
    return mkl_is_slow() and torch.backends.cpu.get_cpu_capability() == "AVX512"


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
        product = _product if mkl_is_slow_backward() else F.linear
        if ctx.needs_input_grad[0]:
            grad_x = product(grad, weight.t(), None)
        if ctx.needs_input_grad[1]:
            grad_weight = product(rows.t(), x.flatten(0, -2).t(), None)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias
