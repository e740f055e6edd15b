"""What a run was, besides its numbers: size of the model, memory and time. For `evlgen report`."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evlgen.files.io import write_atomically
from evlgen.runners.listener import Listener, TrainingRun

FACTS_FILE = "facts.json"


class RunFacts(Listener):
    """Keeps ``facts.json``: ``trainable_parameters``, ``total_parameters``, ``peak_rss_bytes``,
    ``peak_gpu_bytes`` (of the first process), ``wall_seconds`` and ``starts`` (of all its processes one after
    the other), ``state``."""

    def before_training(self, runner: TrainingRun) -> None:
        self._path, self._started = runner.folder / FACTS_FILE, time.monotonic()
        self._before = read_facts(self._path) if runner.run.resume else {}
        self._facts = {
            **model_size(runner.model),
        }
        self._write(runner, "training")

    def after_validation(self, runner: TrainingRun, is_best: bool) -> None:
        self._write(runner, "training")

    def end(self, runner: TrainingRun, is_complete: bool) -> None:
        if hasattr(self, "_path"):
            self._write(runner, "finished" if is_complete else "stopped")

    def _write(self, runner: TrainingRun, state: str) -> None:
        if not runner.accelerator.is_main_process:
            return
        facts = {
            **self._facts,
            **peak_memory(self._before),
            "wall_seconds": self._before.get("wall_seconds", 0.0) + time.monotonic() - self._started,
            "starts": self._before.get("starts", 0) + 1,
            "state": state,
        }
        with contextlib.suppress(OSError):  # a full disk: why the run ends is said elsewhere
            write_atomically(self._path, json.dumps(facts, indent=1))


def read_facts(path: Path) -> dict[str, Any]:
    """The content of a ``facts.json``; nothing where it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def model_size(model: nn.Module) -> dict[str, int]:
    """How many weights are trained, and how many there are."""
    weights = list(model.parameters())
    return {
        "trainable_parameters": sum(p.numel() for p in weights if p.requires_grad),
        "total_parameters": sum(p.numel() for p in weights),
    }


def peak_memory(before: Mapping[str, Any]) -> dict[str, int | None]:
    """The most this process ever had resident and on the GPU, or what an earlier process of the same run had,
    where that is more."""
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    found = {"peak_rss_bytes": peak_resident(), "peak_gpu_bytes": gpu}
    return {key: max((v for v in (now, before.get(key)) if v), default=None) for key, now in found.items()}


def peak_resident() -> int:
    """Most bytes this process has had resident; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage gives those of the parent at its fork, where they are more
        line = next((x for x in status.read_text().splitlines() if x.startswith("VmHWM:")), None)
        if line is not None:
            return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def device_name(device: torch.device) -> str:
    """``cpu``, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
