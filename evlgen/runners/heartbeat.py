"""A listener for who watches over runs from outside."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from evlgen.batch import Batch
from evlgen.common.registry import registry
from evlgen.config.schema import PositiveFloat
from evlgen.files.io import write_atomically
from evlgen.runners.listener import Evaluation, Listener, Step, TrainingRun


@registry.register_listener("heartbeat")
class Heartbeat(Listener):
    """Keeps ``heartbeat.json`` in the run's folder: ``time`` (seconds since 1970), ``iteration``, ``where``,
    ``loss``. It is written between steps and between an evaluation's batches: a scheduler that finds it old
    knows that the run hangs, or that it scores.

    Args:
        seconds: between two writes, at least.
    """

    def __init__(self, seconds: PositiveFloat = 30.0) -> None:
        self.seconds, self._last = seconds, 0.0

    def after_step(self, runner: TrainingRun, step: Step) -> None:
        loss = step.losses["loss"] if step.is_finite else None
        self._beat(
            runner, lambda: {"iteration": runner.state.iteration, "where": runner.where(), "loss": loss}
        )

    def before_answers(self, runner: TrainingRun, evaluation: Evaluation, samples: Batch) -> None:
        at = None if evaluation.state is None else evaluation.state.iteration
        self._beat(runner, lambda: {"iteration": at, "where": f"evaluating {evaluation.title}", "loss": None})

    def _beat(self, runner: TrainingRun, facts: Callable[[], dict[str, Any]]) -> None:
        now = time.time()
        if runner.accelerator.is_main_process and now - self._last >= self.seconds:
            self._last = now
            write_atomically(runner.folder / "heartbeat.json", json.dumps({"time": now, **facts()}))
