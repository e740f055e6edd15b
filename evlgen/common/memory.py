"""Whether what a configuration describes fits into this machine, asked before it is built."""

from __future__ import annotations

import os

from evlgen.common.errors import ConfigError

_BYTES = 4  # a weight is made in float32


def check_fits(num_weights: int, what: str) -> None:
    """Raises `ConfigError` where so many weights in float32 are more than the machine's whole memory."""
    memory = physical_memory()
    if memory is not None and num_weights * _BYTES > memory:
        raise ConfigError(
            f"{what}: as configured it has {num_weights:.3g} weights, {num_weights * _BYTES / 1e9:,.0f} GB "
            f"in float32, and this machine has {memory / 1e9:,.0f} GB of memory."
        )


def physical_memory() -> int | None:
    """Bytes of the machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
