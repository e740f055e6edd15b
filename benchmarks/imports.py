"""Start-up: CPU seconds of ``import evlgen``, of ``python train.py --help`` and until the published project
file names the data that is missing, and seconds from the command of a Shapes run to its first training step;
each in a process of its own, after one run to fill caches.

    python benchmarks/imports.py
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def cpu_seconds(command: list[str]) -> float:
    """User and system time of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "EVLGEN_CACHE": str(ROOT / "no_such_data"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode and "is not on this machine" not in done.stderr:
        raise SystemExit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def seconds_to_first_step() -> float:
    """From the command to the log line of the first step."""
    with tempfile.TemporaryDirectory() as folder:
        options = [f"run.output_dir={folder}", "run.log_freq=1"]
        command = [sys.executable, "train.py", "--cfg-path", "projects/shapes/caption.yaml", "--options"]
        started = time.perf_counter()
        process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, cwd=ROOT)
        for line in process.stderr:
            if "iteration 1/" in line:
                break
        taken = time.perf_counter() - started
        process.kill()
        process.wait()
        return taken


def main() -> None:
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import evlgen": [sys.executable, "-c", "import evlgen"],
        "train.py --help": [sys.executable, "train.py", "--help"],
        "no data": [sys.executable, "train.py", "--cfg-path", "projects/evlgen/coco_ft.yaml"],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    for name, command in commands.items():
        cpu_seconds(command)
        taken = [cpu_seconds(command) for _ in range(5)]
        print(f"{name:<16} median {statistics.median(taken):.3f} s CPU   slowest {max(taken):.3f}")
    seconds_to_first_step()
    taken = [seconds_to_first_step() for _ in range(5)]
    print(f"first step of a Shapes run: median {statistics.median(taken):.2f} s   slowest {max(taken):.2f}")


if __name__ == "__main__":
    main()
