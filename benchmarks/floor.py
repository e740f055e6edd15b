"""How much of a step is matrix products: what no rearrangement of the rest can get below."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

PRODUCTS = {
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
    torch.ops.mkldnn._linear_pointwise,
}


class Products(TorchDispatchMode):
    """Notes every matrix product: the operation with the shapes and strides of its arguments, and its FLOPs;
    of fused attention on a GPU the FLOPs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter = Counter()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in PRODUCTS:
            x, y = [a for a in args if isinstance(a, torch.Tensor) and a.ndim >= 2][-2:]
            given = tuple(
                (tuple(a.shape), a.stride(), a.dtype) if isinstance(a, torch.Tensor) else None
                for a in args[:3]
            )
            self.calls[packet, given, x.device] += 1
            inner = y.shape[1] if packet is torch.ops.mkldnn._linear_pointwise else y.shape[-2]
            self.flops += 2 * out.numel() * inner
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out

    def seconds(self, rounds: int = 5) -> float:
        """Time of all of them, each repeated alone: the sum of the medians."""
        total = 0.0
        for (packet, given, device), count in self.calls.items():
            args = [None if a is None else _like(*a, device) for a in given]
            if packet is torch.ops.mkldnn._linear_pointwise:
                args += ["none", [], ""]
            taken = []
            for _ in range(rounds + 1):
                _wait(device)
                started = time.perf_counter()
                packet(*args)
                _wait(device)
                taken.append(time.perf_counter() - started)
            total += count * statistics.median(taken[1:])
        return total


def profile(step: Callable[[], object], rounds: int = 5) -> None:
    """Prints a step's time, that of its products alone, and the share of the device's product rate
    reached."""
    step()
    with Products() as products:
        step()
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    seconds, alone = statistics.median(taken), products.seconds()
    devices = {device for _, _, device in products.calls}
    largest = max(products.calls, key=lambda call: _elements(call[1]))[1]
    dtype = next(given[2] for given in largest if given is not None)
    rate = product_rate(next(iter(devices)), dtype)
    print(f"  a step: {seconds:.3f} s, its products alone {alone:.3f} s ({alone / seconds:.0%})")
    print(
        f"  {products.flops / 1e9:.0f} GFLOP, {products.flops / seconds / 1e9:.0f} GFLOP/s: "
        f"{products.flops / seconds / rate:.0%} of the {rate / 1e9:.0f} GFLOP/s of large products in {dtype}",
        flush=True,
    )


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square products, the best of ten."""
    size = 8192 if device.type == "cuda" else 2048
    x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    taken = []
    for _ in range(10):
        _wait(device)
        started = time.perf_counter()
        x @ y
        _wait(device)
        taken.append(time.perf_counter() - started)
    return 2 * size**3 / min(taken)


def _elements(given: tuple) -> int:
    return max((torch.Size(a[0]).numel() for a in given if a is not None), default=0)


def _like(shape: tuple, stride: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
