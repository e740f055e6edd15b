"""Measures callables against each other: in turn, in one process or in processes of their own.

A figure always has its counterpart from the same run, and what does not do the same work gets none: each
callable returns what shows its work (a loss, a tensor, texts), and `compare` and `compare_processes` refuse
to report when those differ.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


@dataclasses.dataclass
class Side:
    """What was measured of one callable.

    Attributes:
        seconds: of each round, warm-up left out.
        results: what the calls returned, warm-up included.
        peak: most bytes of memory its process ever had resident, or allocated on the GPU where there is one;
            None where it had no process of its own.
        base: of these, what it had resident before anything was built: the interpreter and its libraries.
    """

    name: str
    seconds: list[float] = dataclasses.field(default_factory=list)
    results: list[Any] = dataclasses.field(default_factory=list)
    peak: int | None = None
    base: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclasses.dataclass
class Comparison:
    """Ours and its counterpart, measured in the same run."""

    ours: Side
    other: Side

    @property
    def ratio(self) -> float:
        """Our median time as a share of the other's: below 1, ours is faster."""
        return self.ours.median / self.other.median

    @property
    def memory_ratio(self) -> float:
        """Our peak memory as a share of the other's, libraries included."""
        return self.ours.peak / self.other.peak

    @property
    def own_memory_ratio(self) -> float:
        """The same without the libraries."""
        ours, other = (side.peak - side.base for side in (self.ours, self.other))
        return ours / other

    def show(self) -> Comparison:
        """Prints medians, spread and the ratio."""
        width = max(len(self.ours.name), len(self.other.name))
        for side in (self.ours, self.other):
            peak = "" if side.peak is None else f"   peak {side.peak / 1e9:.2f} GB"
            peak += "" if not side.base else f", {side.base / 1e9:.2f} of it libraries"
            print(f"  {side.name:<{width}}  {spread(side.seconds)}{peak}")
        pairs = sorted(a / b for a, b in zip(self.ours.seconds, self.other.seconds, strict=True))
        memory = ""
        if self.ours.peak is not None:
            memory = f"; memory {self.memory_ratio:.2f}, without the libraries {self.own_memory_ratio:.2f}"
        print(
            f"  ratio {self.ratio:.3f} (rounds: {pairs[0]:.3f} to {pairs[-1]:.3f}), "
            f"{1 / self.ratio:.2f} times as fast{memory}",
            flush=True,
        )
        return self


def spread(seconds: Sequence[float]) -> str:
    """``median 12.3 ms (11.9 to 14.0)``."""
    unit, scale = ("s", 1.0) if min(seconds) >= 1 else ("ms", 1e3)
    median, low, high = (scale * x for x in (statistics.median(seconds), min(seconds), max(seconds)))
    return f"median {median:8.2f} {unit} ({low:.2f} to {high:.2f})"


def compare(
    ours: Callable[[], Any],
    other: Callable[[], Any],
    rounds: int = 15,
    warm_up: int = 2,
    tolerance: float | None = 1e-5,
    names: tuple[str, str] = ("ours", "other"),
) -> Comparison:
    """Runs both in turn in this process.

    Args:
        tolerance: how far the results of the first calls may differ (`check_equal`); None where the caller
            has shown already that the work is the same.

    Raises:
        SystemExit: the two do not do the same.
    """
    sides = Comparison(Side(names[0]), Side(names[1]))
    calls = ((sides.ours, ours), (sides.other, other))
    for number in range(warm_up + rounds):
        for side, call in calls if number % 2 == 0 else reversed(calls):
            started = time.perf_counter()
            result = call()
            taken = time.perf_counter() - started
            side.results = side.results or [result]
            if number >= warm_up:
                side.seconds.append(taken)
    if tolerance is not None:
        check_equal(sides.ours.results[0], sides.other.results[0], tolerance)
    return sides


@dataclasses.dataclass(frozen=True)
class InProcess:
    """A callable that a process of its own builds: ``factory(**arguments)``, importable by name."""

    name: str
    factory: Callable[..., Callable[[], Any]]
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


def compare_processes(
    ours: InProcess, other: InProcess, rounds: int = 5, warm_up: int = 2, tolerance: float | None = 1e-5
) -> Comparison:
    """Builds each in a process of its own, and runs them in turn; one rests while the other runs.

    Args:
        tolerance: how far the results of each pair of calls may differ; None as in `compare`.

    Raises:
        SystemExit: the two do not do the same.
    """
    first, second = run_processes([ours, other], rounds, warm_up)
    if tolerance is not None:
        for one, two in zip(first.results, second.results, strict=True):
            check_equal(one, two, tolerance)
    return Comparison(first, second)


def run_processes(wanted: Sequence[InProcess], rounds: int, warm_up: int) -> list[Side]:
    """What `compare_processes` does, for any number of callables."""
    workers = [_Worker(one) for one in wanted]
    try:
        for number in range(warm_up + rounds):
            for worker in workers if number % 2 == 0 else reversed(workers):
                worker.run(keep=number >= warm_up)
        return [worker.finish() for worker in workers]
    finally:
        for worker in workers:
            worker.process.kill()


def check_equal(one: Any, two: Any, tolerance: float) -> None:
    """Raises `SystemExit` where results differ: numbers and tensors by more than ``tolerance`` of their size,
    tensors in shape, anything else at all."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        equal = one.shape == two.shape and torch.allclose(one.double(), two.double(), tolerance, tolerance)
    elif isinstance(one, float) and isinstance(two, float):
        equal = abs(one - two) <= tolerance * max(1.0, abs(two))
    else:
        equal = one == two
    if not equal:
        raise SystemExit(
            f"the two do not do the same work, so there is no figure: {one!r:.200} and {two!r:.200}"
        )


class _Worker:
    def __init__(self, wanted: InProcess) -> None:
        self.side = Side(wanted.name)
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, wanted), daemon=True)
        self.process.start()
        self.side.base = self._receive()

    def run(self, keep: bool) -> None:
        self.pipe.send("run")
        seconds, result = self._receive()
        self.side.results.append(result)
        if keep:
            self.side.seconds.append(seconds)

    def finish(self) -> Side:
        self.pipe.send("peak")
        self.side.peak = self._receive()
        return self.side

    def _receive(self) -> Any:
        while not self.pipe.poll(1.0):
            if not self.process.is_alive():
                raise SystemExit(f"the process of {self.side.name} ended with {self.process.exitcode}")
        return self.pipe.recv()


def _serve(pipe: Any, wanted: InProcess) -> None:
    base = 0 if torch.cuda.is_available() else peak_memory()
    call = wanted.factory(**wanted.arguments)
    pipe.send(base)
    while True:
        if pipe.recv() == "run":
            started = time.perf_counter()
            result = call()
            pipe.send((time.perf_counter() - started, result))
        else:
            pipe.send(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory())


def peak_memory() -> int:
    """Most bytes this process has had resident (Linux; `getrusage` would give those of the parent as
    well)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise SystemExit("/proc/self/status has no VmHWM: peak memory is measured on Linux only")
