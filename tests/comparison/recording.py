"""A plugin whose task writes down the samples it is trained on, and fails where it is told to.

``RECORDS``: the folder of the records. ``CRASH_AT``: the learning rate with which the second step fails.
``STEP_SECONDS``: how long each step waits.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from evlgen import registry
from evlgen.tasks.captioning import CaptioningTask


@registry.register_task("recording")
class RecordingTask(CaptioningTask):
    steps = 0

    def train_step(self, model, samples):
        self.steps += 1
        record = {"ids": samples["sample_id"], "texts": samples["text_input"], "seed": self.run.seed}
        name = f"{self.run.init_lr:g}.jsonl"
        with open(Path(os.environ["RECORDS"]) / name, "a") as file:
            file.write(json.dumps(record) + "\n")
        if self.steps == 2 and f"{self.run.init_lr:g}" == os.environ.get("CRASH_AT"):
            raise MemoryError("no memory for /some/where/else.bin")
        time.sleep(float(os.environ.get("STEP_SECONDS", 0)))
        return super().train_step(model, samples)

    def _show(self, *args):  # drawing takes longer than all the rest
        pass
