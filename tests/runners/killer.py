"""A plugin that ends its own process with SIGKILL where ``KILL_AT`` says: ``<place>:<n>``, at the n-th time
the process comes there. Everything before that is the real thing, but for sheets of images, which take long
to draw."""

from __future__ import annotations

import os
import signal
import threading

from evlgen import assemble, registry
from evlgen.runners import checkpointer, training_state
from evlgen.tasks.captioning import CaptioningTask
from evlgen.weights import checkpoints

PLACE, _, NUMBER = os.environ.get("KILL_AT", "nowhere:0").partition(":")
times = 0


def here(place: str) -> None:
    global times
    if place == PLACE:
        times += 1
        if times >= float(NUMBER):
            os.kill(os.getpid(), signal.SIGKILL)


@registry.register_task("killable")
class KillableTask(CaptioningTask):
    def train_step(self, model, samples):
        if PLACE == "seconds":
            threading.Timer(float(NUMBER), os.kill, [os.getpid(), signal.SIGKILL]).start()
        here("before a batch")
        losses = super().train_step(model, samples)
        here("before a backward pass")
        return losses

    def valid_step(self, model, samples):
        here("validation")
        return super().valid_step(model, samples)

    def after_evaluation(self, *args):
        here("scoring")
        metrics = super().after_evaluation(*args)
        here("scored")
        return metrics

    def _show(self, *args):
        pass


def killed_before(module, name: str, place: str) -> None:
    original = getattr(module, name)

    def wrapped(*args, **kwargs):
        here(place)
        return original(*args, **kwargs)

    setattr(module, name, wrapped)


def half_written(tensors, path, *args, **kwargs):
    original_save(tensors, path, *args, **kwargs)
    if PLACE == "half a file":
        os.truncate(path, os.path.getsize(path) // 2)
    here("half a file")


original_save = checkpointer.save_file
checkpointer.save_file = half_written
killed_before(checkpointer, "_copy", "copying")
killed_before(checkpointer, "write_folder", "before writing")
killed_before(checkpoints, "_flush", "before renaming")
killed_before(checkpointer, "update_symlink", "before latest")
killed_before(checkpointer, "remove_old", "before removing old ones")
killed_before(checkpointer, "clear_unfinished", "clearing")
killed_before(training_state, "set_random_state", "after validation")
killed_before(assemble, "_trained_checkpoint", "between stages")
