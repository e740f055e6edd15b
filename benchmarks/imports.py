"""CPU seconds of ``import evlgen`` and ``python train.py --help``, each in a process of its own, after one
run to fill caches.

python benchmarks/imports.py
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def cpu_seconds(command: list[str]) -> float:
    """User and system time of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import evlgen": [sys.executable, "-c", "import evlgen"],
        "train.py --help": [sys.executable, "train.py", "--help"],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    for name, command in commands.items():
        cpu_seconds(command)
        taken = [cpu_seconds(command) for _ in range(7)]
        print(f"{name:<16} median {statistics.median(taken):.3f} s CPU   slowest {max(taken):.3f}")


if __name__ == "__main__":
    main()
