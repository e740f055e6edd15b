"""A plugin whose data-loading processes never answer, at the sample ``STUCK_AT``, or are killed, in the
method ``KILL_IN``. The file ``REACHED`` appears shortly before, at the third batch of training."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import active_children
from pathlib import Path

from evlgen import registry
from evlgen.datasets.shapes_dataset import ShapesCaptionBuilder, ShapesCaptionDataset
from evlgen.tasks.captioning import CaptioningTask


class Stuck(ShapesCaptionDataset):
    def load_sample(self, index):
        if os.environ.get("STUCK_AT") == f"{self.split} {index}":
            if self.split == "val":
                Path(os.environ["REACHED"]).touch()
            time.sleep(600)
        return super().load_sample(index)


@registry.register_builder("stuck_shapes")
class StuckShapes(ShapesCaptionBuilder):
    DEFAULT_CONFIG = None
    dataset_class = Stuck


def kill_a_worker() -> None:
    os.kill(active_children()[0].pid, signal.SIGKILL)
    for _ in range(1000):  # the signal of its death is handled in between
        time.sleep(0.01)


@registry.register_task("killing")
class Killing(CaptioningTask):
    steps = 0

    def train_step(self, model, samples):
        self.steps += 1
        if os.environ.get("KILL_IN") == "train_step" and self.steps == 8:
            kill_a_worker()
        if os.environ.get("STUCK_AT", "").startswith("train") and self.steps == 3:
            Path(os.environ["REACHED"]).touch()
        return super().train_step(model, samples)

    def valid_step(self, model, samples):
        if os.environ.get("KILL_IN") == "valid_step":
            kill_a_worker()
        return super().valid_step(model, samples)

    def _show(self, *args):
        pass
