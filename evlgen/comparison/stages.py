"""The folder of one compared run, stage by stage: what it is told, and what can be read from it."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from evlgen.comparison.plan import Configuration, Settings, Stage
from evlgen.files.io import write_atomically

JOB_FILE, OUTPUT_FILE, ATTEMPTS_FILE = "job.json", "output.txt", "attempts.json"
FACTS_FILE, SHOWN_FILE, DONE_FILE = "facts.json", "shown.json", "done.json"


class StageRun:
    """One training run of a configuration: a stage, with a seed, in a folder of its own.

    Args:
        folder: where everything of it goes.
        before: the stage that it starts from.
    """

    def __init__(
        self, folder: Path, stage: Stage, seed: int, settings: Settings, before: StageRun | None = None
    ) -> None:
        self.folder, self.stage, self.seed, self.settings, self.before = folder, stage, seed, settings, before
        self._read: tuple[Any, list[dict[str, Any]]] = (None, [])

    @property
    def log_path(self) -> Path:
        return self.folder / "run" / "latest" / "log.jsonl"

    def write_job(self) -> Path:
        """Writes what the child process is told."""
        options = [
            *self.stage.options,
            f"run.seed={self.seed}",
            f"run.output_dir={json.dumps(str(self.folder / 'run'))}",
            "run.resume=auto",
        ]
        if self.before is not None:
            checkpoint = self.before.folder / "run" / "latest" / "checkpoints" / "latest"
            options.append(f"model.checkpoint={json.dumps(str(checkpoint))}")
        job = {
            "cfg_path": self.stage.cfg_path,
            "options": options,
            "plugins": list(self.settings.plugins),
        }
        path = self.folder / JOB_FILE
        write_atomically(path, json.dumps(job, indent=1))
        return path

    def is_done(self) -> bool:
        """Whether it has trained to the end."""
        return (self.folder / DONE_FILE).exists()

    def records(self) -> list[dict[str, Any]]:
        """The lines of its log; none before there is one."""
        try:
            stat = self.log_path.stat()
            mark = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if mark != self._read[0]:
                self._read = mark, _json_lines(self.log_path.read_text(encoding="utf-8"))
        except OSError:
            self._read = None, []
        return self._read[1]

    def evaluations(self) -> list[dict[str, Any]]:
        """The log's validations, in their order."""
        return [r for r in self.records() if r.get("type") == "evaluation" and r.get("label")]

    def steps(self) -> list[dict[str, Any]]:
        """The log's lines about training."""
        return [r for r in self.records() if r.get("type") == "train"]

    def effort(self) -> tuple[float, int, int]:
        """Seconds and samples of training, and iterations, as far as is known."""
        done = read(self.folder / DONE_FILE)
        if done:
            return done["seconds"], done["samples"], done["iterations"]
        records = [r for r in self.records() if "trained_seconds" in r]
        if not records:
            return 0.0, 0, 0
        last = max(records, key=lambda r: r["trained_seconds"])
        return last["trained_seconds"], last["trained_samples"], last["iteration"]

    def facts(self) -> dict[str, Any]:
        """See `run_recorder.RunRecorder`."""
        return read(self.folder / FACTS_FILE)

    def shown(self) -> list[dict[str, Any]]:
        """Texts of the latest evaluation."""
        return read(self.folder / SHOWN_FILE) or []

    # ---- attempts ----

    def attempts(self) -> dict[str, Any]:
        """``wall_seconds`` of all its processes together, start-up and evaluation included; ``error``: why
        the last one failed, or None; ``starts``."""
        return {"wall_seconds": 0.0, "error": None, "starts": 0, **read(self.folder / ATTEMPTS_FILE)}

    def note_attempt(self, started: float, error: str | None) -> None:
        """Adds a process that has ended."""
        values = self.attempts()
        values["wall_seconds"] += time.monotonic() - started
        values["starts"] += 1
        values["error"] = error
        write_atomically(self.folder / ATTEMPTS_FILE, json.dumps(values, indent=1))


@dataclasses.dataclass
class Run:
    """All stages of a configuration with one seed."""

    configuration: Configuration
    seed: int
    stages: list[StageRun]
    state: str = "waiting"

    @classmethod
    def of(cls, configuration: Configuration, seed: int, root: Path, settings: Settings) -> Run:
        folder = root / "runs" / configuration.name / f"seed_{seed}"
        stages: list[StageRun] = []
        for number, stage in enumerate(configuration.stages, start=1):
            before = stages[-1] if stages else None
            stages.append(StageRun(folder / f"stage_{number}", stage, seed, settings, before))
        run = cls(configuration, seed, stages)
        run.state = "finished" if run.current() is None else "waiting"
        return run

    def current(self) -> StageRun | None:
        """The first stage that is not done."""
        return next((stage for stage in self.stages if not stage.is_done()), None)

    @property
    def error(self) -> str | None:
        """Why its last process failed."""
        return next((e for s in self.stages if (e := s.attempts()["error"])), None)


def read(path: Path) -> Any:
    """The content of a JSON file; an empty mapping where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _json_lines(text: str) -> list[dict[str, Any]]:
    """The lines that are whole; the last one may be being written."""
    out = []
    for line in text.splitlines():
        try:
            out.append(json.loads(line))
        except ValueError:
            continue
    return out
