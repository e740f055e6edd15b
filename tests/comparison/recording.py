"""A plugin whose task writes down the samples it is trained on, and fails where it is told to.

``RECORDS``: the folder of the records. ``CRASH_AT``: the learning rate with which the first step fails.
``PAUSE_AT``: the step of a process that waits until the run is asked to stop.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from evlgen import registry
from evlgen.tasks.captioning import CaptioningTask

PATIENCE = 300  # seconds, on however slow a machine


def wait_for_stop() -> None:
    """Returns once the run is asked to stop, which it is after this step."""
    request = signal.getsignal(signal.SIGTERM).__self__
    deadline = time.monotonic() + PATIENCE
    while not request.requested and time.monotonic() < deadline:
        time.sleep(0.05)


@registry.register_task("recording")
class RecordingTask(CaptioningTask):
    steps = 0

    def train_step(self, model, samples):
        self.steps += 1
        record = {"ids": samples["sample_id"], "texts": samples["text_input"], "seed": self.run.seed}
        name = f"{self.run.init_lr:g}.jsonl"
        with open(Path(os.environ["RECORDS"]) / name, "a") as file:
            file.write(json.dumps(record) + "\n")
        if self.steps == 1 and f"{self.run.init_lr:g}" == os.environ.get("CRASH_AT"):
            raise MemoryError("no memory for /some/where/else.bin")
        if self.steps == int(os.environ.get("PAUSE_AT", 0)):
            wait_for_stop()
        return super().train_step(model, samples)

    def _show(self, *args):  # drawing takes longer than all the rest
        pass
