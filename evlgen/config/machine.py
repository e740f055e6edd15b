"""The machine and the command, as a report tells them: nothing that names a host or a folder."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

#: In the folder of a run.
MACHINE_FILE = "machine.json"

# an absolute path of two parts at least, that begins where a word does and is no address; a plus joins stages
_PART = r"(?:[^\s/:'\"()\[\],=+]|\+(?![/~]))+"
_FOLDERS = re.compile(rf"(?<![\w:/.~-])(?:~|[A-Za-z]:)?(?:/{_PART})+/({_PART})")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, and the versions that matter."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    from evlgen.common.memory import physical_memory

    memory = physical_memory()
    return {
        "cpu": cpu_model(),
        "cores": cores,
        "memory_bytes": memory,
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "system": platform.system(),
    }


def machine_of_run(device: Any, processes: int) -> dict[str, Any]:
    """What a run notes of its machine: `machine`, the device's name, and how many processes train.

    Args:
        device: a ``torch.device``.
    """
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {**machine(), "device": name, "processes": processes}


def cpu_model() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def without_folders(text: str) -> str:
    """Absolute paths cut down to their last part."""
    return _FOLDERS.sub(r"…/\1", text)
