"""Runs of the real ``train.py`` by torchrun on two processes, and what is left of them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from forks import Forks

from evlgen.assemble import run
from evlgen.config.config import Config

ROOT = Path(__file__).resolve().parents[2]
RANKS = Path(__file__).with_name("ranks.py")
QUICK = {"OMP_NUM_THREADS": "1", "PATH": "", "JAVA_HOME": ""}  # scoring without Java: it starts slowly
TIMES = ("time", "seconds", "trained_seconds", "samples_per_s")  # of a log's lines
TIMEOUT = 900  # seconds, after which a run hangs: on free cores it takes some ten


@dataclass
class Ended:
    """A run that has ended: exit code, what it showed, when it ended, and the lines of `ranks.note`."""

    code: int
    shown: str
    at: float
    records: Path

    def notes(self, kind: str, rank: int) -> list[dict]:
        return read_lines(self.records / f"{kind}{rank}.jsonl")


def torchrun(
    forks: Forks, project: Path, *options: str, launcher: tuple[str, ...] = (), failures: str = ""
) -> Ended:
    """Two processes on this machine.

    Args:
        options: of ``train.py``.
        launcher: options of torchrun.
        failures: see ``ranks.py``.
    """
    records = project.parent / f"records{len(list(project.parent.glob('records*')))}"
    records.mkdir()
    command = [
        forks.python,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *launcher,
    ]
    command += [str(ROOT / "train.py"), "--cfg-path", str(project), "--plugins", str(RANKS)]
    process = subprocess.Popen(
        [*command, *(["--options", *options] if options else [])],
        env={**os.environ, **QUICK, "RECORDS": str(records), "FAILURES": failures},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        shown, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes before it ends
        shown, _ = process.communicate()
        raise AssertionError(f"no end within {TIMEOUT} s:\n{shown}") from None
    return Ended(process.returncode, shown, time.time(), records)


def alone(project: Path, *options: str) -> None:
    """One process: this one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other longer than such a small model computes
    try:
        run(Config.load(project, options, [str(RANKS)]))
    finally:
        torch.set_num_threads(threads)


def read_lines(path: Path) -> list[dict]:
    """A file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def logged(folder: Path, kind: str) -> list[dict]:
    """The ``train`` or ``evaluation`` lines of a run's log, but for times."""
    return [
        {k: v for k, v in line.items() if k not in ("type", *TIMES)}
        for line in read_lines(folder / "log.jsonl")
        if line["type"] == kind
    ]
