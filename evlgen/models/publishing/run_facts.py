"""What a run left behind about a checkpoint, for its card."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from evlgen.common.errors import CheckpointError
from evlgen.config.machine import MACHINE_FILE
from evlgen.files.io import read_bytes
from evlgen.files.json_io import read_json
from evlgen.weights.checkpoints import PROGRESS_FILE, STATE_FOLDER

LOG_FILE = "log.jsonl"
_MAX_LOG_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What is known of the training of a checkpoint.

    Attributes:
        iteration: trained so far; None where it is not known.
        samples, seconds: seen, and trained, so far.
        evaluations: of this checkpoint, as `log.jsonl` has them: validation at its iteration, and tests.
        machine: as `evlgen.config.machine.machine` gives it, with ``device`` and ``processes``.
    """

    #: Numbers of an evaluation that are no scores.
    NOT_METRICS: ClassVar[tuple[str, ...]] = (
        *("time", "type", "label", "split", "iteration", "samples", "skipped", "skipped_by_cause", "seconds"),
        *("trained_seconds", "trained_samples", "common_fraction", "exchanged_loss", "epoch"),
    )

    iteration: int | None = None
    samples: int = 0
    seconds: float = 0.0
    evaluations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    machine: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def skipped(self) -> int:
        """Samples that the evaluations could not read."""
        return sum(int(record.get("skipped") or 0) for record in self.evaluations)


def read_run_facts(checkpoint: Path) -> RunFacts | None:
    """The facts of a checkpoint in the ``checkpoints`` folder of a run; None for another folder. A damaged
    or missing file leaves out what it would have said."""
    run = checkpoint.parent.parent
    progress = _json(checkpoint / STATE_FOLDER / PROGRESS_FILE)
    if not progress and not (run / LOG_FILE).is_file():
        return None
    iteration = progress.get("iteration")
    iteration = iteration if type(iteration) is int else None
    effort = _json(checkpoint / STATE_FOLDER / "effort.json")
    latest: dict[str, dict[str, Any]] = {}
    for record in _records(run / LOG_FILE):
        if record.get("type") == "evaluation" and record.get("iteration") in (iteration, None):
            latest[str(record.get("split"))] = record
    return RunFacts(
        iteration=iteration,
        samples=int(_number(effort.get("samples"))),
        seconds=_number(effort.get("seconds")),
        evaluations=list(latest.values()),
        machine=_json(run / MACHINE_FILE),
    )


def _number(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else 0.0


def _json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, CheckpointError, "fact")
    except (CheckpointError, OSError):
        return {}
    return content if isinstance(content, dict) else {}


def _records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = read_bytes(path, _MAX_LOG_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed
        if isinstance(record, dict):
            yield record
