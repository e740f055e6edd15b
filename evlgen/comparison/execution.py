"""Runs what a plan says, each run in a child process of its own.

What goes wrong in one is noted and does not touch the others. With ``interleave`` the runs take turns, from
one evaluation to the next: a run is stopped after it (which saves) and later resumed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from evlgen.common.errors import Interrupted, TrainingError
from evlgen.common.safe_text import message, message_lines
from evlgen.comparison.live_table import LiveTable
from evlgen.comparison.plan import Settings
from evlgen.comparison.stages import OUTPUT_FILE, Run, StageRun
from evlgen.files.locks import try_lock_file
from evlgen.loaders.interruption import StopRequest

_POLL = 0.2  # seconds between two looks at a child and its log
_REDRAW = 1.0


class Execution:
    """Runs everything that is not done.

    Args:
        root: the comparison's folder.
        runs: in the order in which they are begun.
        interleave: whether they take turns.
    """

    def __init__(self, root: Path, runs: Sequence[Run], settings: Settings, interleave: bool = False) -> None:
        self.root, self.runs, self.settings, self.interleave = root, list(runs), settings, interleave
        self.table = LiveTable(runs, settings)
        self.stop = StopRequest()

    def run(self) -> None:
        """Returns when every run is finished or has failed.

        Raises:
            Interrupted: Ctrl-C or SIGTERM, after the run that was going on is saved.
            TrainingError: another process works in the same folder.
        """
        with _alone(self.root) as lock, self.stop:
            open_runs = [run for run in self.runs if run.current() is not None]
            self.table.show()
            while open_runs:
                for run in list(open_runs):
                    self._take_turn(run, lock)
                    if run.state in ("finished", "failed"):
                        open_runs.remove(run)

    def _take_turn(self, run: Run, lock: int | None) -> None:
        """One evaluation further, or, where they do not take turns, to the end."""
        while (stage := run.current()) is not None:
            run.state = "training"
            self.table.show()
            error, turn_is_over = self._run_child(stage, lock)
            if (number := self.stop.received) is not None:
                run.state = "stopped"
                self.table.show()
                raise Interrupted(
                    f"stopped by {number.name}; the same command with --output {_shown(self.root)} --resume "
                    "goes on from there",
                    128 + number,
                )
            if error is not None:
                run.state = "failed"
                self.table.show()
                return
            if turn_is_over or (self.interleave and run.current() is not None):
                run.state = "paused"
                return
        run.state = "finished"
        self.table.show()

    def _run_child(self, stage: StageRun, lock: int | None) -> tuple[str | None, bool]:
        """Runs a stage's process.

        Returns:
            why it failed, or None; whether it was stopped because its turn is over.
        """
        job = stage.write_job()
        before, begun = len(stage.evaluations()), stage.effort()
        started, drawn, told = time.monotonic(), 0.0, False
        with open(stage.folder / OUTPUT_FILE, "ab") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", "evlgen.comparison.worker", str(job)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C reaches it through us
                pass_fds=() if lock is None else (lock,),
            )
            size = output.tell()
            try:
                while child.poll() is None:
                    time.sleep(_POLL)
                    if time.monotonic() - drawn > _REDRAW:
                        drawn = time.monotonic()
                        self.table.show()
                    is_turn_over = self.interleave and self._is_turn_over(stage, before, begun)
                    if not told and (self.stop.requested or is_turn_over):
                        child.send_signal(signal.SIGTERM)
                        told = True
            except BaseException:
                child.terminate()
                raise
        was_stopped = told and child.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)
        error = None
        if not was_stopped and not stage.is_done():
            error = _reason(stage.folder / OUTPUT_FILE, size, child.returncode)
        stage.note_attempt(started, error)
        return error, was_stopped

    def _is_turn_over(self, stage: StageRun, before: int, begun: tuple[float, int, int]) -> bool:
        """Whether it has been evaluated once more, and has something left to train.

        Args:
            before: evaluations it had when its turn began.
            begun: its effort then.
        """
        run, every = stage.stage.config["run"], self.settings.evaluate_every
        if run["valid_splits"]:
            records = stage.evaluations()[before:]
        else:  # a stage that is not evaluated has turns as long as those of the others
            records = stage.steps()
            at = 0 if every is None or every.unit == "s" else 2
            if every is None or not records or stage.effort()[at] < begun[at] + every.value:
                return False
        if not records:
            return False
        last = records[-1]
        if run["max_seconds"]:
            return last["trained_seconds"] < run["max_seconds"]
        return not run["max_iters"] or last["iteration"] < run["max_iters"]


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[int | None]:
    """Holds the folder's lock, which child processes inherit: one that outlives a killed parent holds it
    too."""
    with open(root / ".lock", "w") as file:
        if not try_lock_file(file):
            raise TrainingError(
                f"another process works in {_shown(root)}: wait for it, or name another --output."
            )
        yield file.fileno() if os.name == "posix" else None  # Windows's child processes inherit no lock


def _reason(output: Path, start: int, code: int) -> str:
    """Why a process failed: its own error message, or the end of its traceback."""
    with open(output, "rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("error: ")), None)
    if first is not None:
        return message_lines([lines[first].removeprefix("error: "), *lines[first + 1 :]])
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    said = [line for line in lines if line.strip()]
    return message(said[-1].strip()) if said else f"ended with exit code {code}"


def _shown(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
