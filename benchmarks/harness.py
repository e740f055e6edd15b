"""Times two callables interleaved in one process and prints medians, spread and their ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def compare(
    ours: Callable[[], object], other: Callable[[], object], rounds: int = 15, warm_up: int = 2
) -> float:
    """Runs both in turn and prints a line for each and the ratio.

    Returns:
        median time of ``other`` / median time of ``ours``: above 1, ours is faster.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for round_number in range(warm_up + rounds):
        for call, taken in zip((ours, other), times, strict=True):
            start = time.perf_counter()
            call()
            if round_number >= warm_up:
                taken.append(time.perf_counter() - start)
    for name, taken in zip(("ours", "other"), times, strict=True):
        median = statistics.median(taken)
        print(
            f"  {name:<6} median {1e3 * median:8.2f} ms   fastest {1e3 * min(taken):8.2f}   slowest "
            f"{1e3 * max(taken):8.2f}"
        )
    ratio = statistics.median(times[1]) / statistics.median(times[0])
    print(f"  ratio  {ratio:.2f} times faster")
    return ratio
