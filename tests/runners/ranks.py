"""A plugin for runs of several processes: splits of several sizes, broken samples, weights that differ
between processes, and errors on one of them, as the environment says. But for sheets of images, which take
long to draw, everything else is the real thing."""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import json
import os
import signal
import time
from pathlib import Path

import torch

from evlgen import registry
from evlgen.common.errors import DataError, TrainingError
from evlgen.datasets.shapes_dataset import ShapesCaptionBuilder, ShapesCaptionDataset
from evlgen.models.architectures import EvlgenOPT
from evlgen.tasks.captioning import CaptioningTask

RANK = int(os.environ.get("RANK", "0"))
ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
SIZES = {"one": 1, "two": 2, "five": 5, "seven": 7, "damaged": 6}
# "<attempt>:<rank>:<place>:<n>:<what>", several apart by blanks: at the n-th time a process comes to a place
FAILURES = [entry.split(":") for entry in os.environ.get("FAILURES", "").split()]
times: dict[str, int] = {}


def note(kind: str, **content) -> None:
    """Adds to what this process tells the test: a line of ``$RECORDS/<kind><rank>.jsonl``."""
    if "RECORDS" in os.environ:
        with open(Path(os.environ["RECORDS"], f"{kind}{RANK}.jsonl"), "a") as file:
            file.write(json.dumps({"attempt": ATTEMPT, **content}) + "\n")


atexit.register(lambda: note("end", time=time.time()))


def here(place: str) -> None:
    times[place] = times.get(place, 0) + 1
    for attempt, rank, where, number, what in FAILURES:
        if (int(attempt), int(rank), where, int(number)) != (ATTEMPT, RANK, place, times[place]):
            continue
        note("failure", time=time.time())
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "train":
            raise TrainingError("this run cannot go on")
        raise ValueError("a mistake in somebody's task")


class PartlyBroken(ShapesCaptionDataset):
    broken: tuple[int, ...] = ()

    def load_sample(self, index):
        if index in self.broken:
            raise DataError("broken on purpose")
        return super().load_sample(index)


@registry.register_builder("sized_shapes")
class SizedShapes(ShapesCaptionBuilder):
    DEFAULT_CONFIG = None

    def __init__(self, broken: str = "", **options) -> None:
        super().__init__(**options)
        self.broken = tuple(int(index) for index in broken.split())

    @property
    def splits(self):
        return ["train", *SIZES]

    def build_split(self, split):
        if split == "train":
            processors = self.vis_processor(split), self.text_processor(split)
            dataset = PartlyBroken(split, self.sizes[split], self.seed, *processors)
            dataset.broken = self.broken
        else:
            dataset = PartlyBroken("val", SIZES[split], self.seed, self.vis_processor(split))
            dataset.broken = (3,) if split == "damaged" else ()
        return dataset


@registry.register_model("uneven_opt")
class UnevenOPT(EvlgenOPT):
    """Starts with other weights on the second process: all that is trained, and a frozen one that no text is
    long enough to need."""

    @classmethod
    def from_config(cls, *args, **kwargs):
        model = super().from_config(*args, **kwargs)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(RANK)
            model.unused_weight().add_(RANK)
        return model

    def unused_weight(self):
        decoder = self.language.model.get_decoder()
        # T5's has none
        return decoder.embed_positions.weight[-1] if hasattr(decoder, "embed_positions") else torch.zeros(1)


def digest(model) -> str:
    """Of all that is trained, bit for bit."""
    trained = [p.detach().numpy().tobytes() for p in model.parameters() if p.requires_grad]
    return hashlib.sha256(b"".join(trained)).hexdigest()


@registry.register_task("ranked")
class RankedTask(CaptioningTask):
    def __init__(self, run):
        # a process that writes less than another is at its next batch while that one still writes
        super().__init__(
            dataclasses.replace(run, max_len=(run.max_len or self.MAX_LEN) - 2 * RANK * run.shard_language)
        )

    def train_step(self, model, samples):
        here("train")
        losses = super().train_step(model, samples)
        own = getattr(model, "module", model)
        note(
            "step",
            num_tokens=int(losses["num_tokens"]),
            random=torch.rand(()).item(),
            trained=None if self.run.shard_language else digest(own),
            frozen=own.unused_weight().sum().item(),
        )
        return losses

    def valid_step(self, model, samples):
        here("valid")
        return super().valid_step(model, samples)

    def after_evaluation(self, results, *args):
        here("scoring")
        numbers = [int(r["instance_id"]) for r in results]
        assert numbers == sorted(numbers), "results of several processes come in the dataset's order"
        return super().after_evaluation(results, *args)

    def _show(self, *args):
        pass
