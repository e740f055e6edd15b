"""A listener for who watches over runs from outside."""

from __future__ import annotations

import json
import time

from evlgen.common.registry import registry
from evlgen.config.schema import PositiveFloat
from evlgen.files.io import write_atomically
from evlgen.runners.listener import Listener, Step, TrainingRun


@registry.register_listener("heartbeat")
class Heartbeat(Listener):
    """Keeps ``heartbeat.json`` in the run's folder: ``time`` (seconds since 1970), ``iteration``, ``where``,
    ``loss``. A scheduler that finds it old knows that the run hangs.

    Args:
        seconds: between two writes, at least.
    """

    def __init__(self, seconds: PositiveFloat = 30.0) -> None:
        self.seconds, self._last = seconds, 0.0

    def after_step(self, runner: TrainingRun, step: Step) -> None:
        now = time.time()
        if not runner.accelerator.is_main_process or now - self._last < self.seconds:
            return
        self._last = now
        beat = {"time": now, "iteration": runner.state.iteration, "where": runner.where()}
        beat["loss"] = step.losses["loss"] if step.is_finite else None
        write_atomically(runner.folder / "heartbeat.json", json.dumps(beat))
