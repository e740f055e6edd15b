"""Where a run stands: what a checkpoint's ``training_state/`` folder holds, as plain values and tensors.

``progress.json`` has the counters, ``optimizer.safetensors`` the optimizer's tensors by weight,
``random.safetensors`` every process's random states, ``trained.safetensors`` the weights as they are trained
where ``model.safetensors`` is their average, and ``effort.json`` what all that took, which differs
between runs that are equal to the bit. Nothing in it is a pickle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evlgen.common.errors import CheckpointError
from evlgen.runners.dtensor import part_of
from evlgen.weights.checkpoints import PROGRESS_FILE

OPTIMIZER_FILE = "optimizer.safetensors"
TRAINED_FILE = "trained.safetensors"
RANDOM_FILE = "random.safetensors"
EFFORT_FILE = "effort.json"
# what checkpoints have that were saved before these were kept
_IN_OLDER = {"rewinds": 0, "unit": "", "records": {}}


@dataclasses.dataclass
class TrainingCost:
    """What training has taken so far.

    Attributes:
        seconds: of training, with the saving that it waits for; without validation and start-up, which the
            encoding of images beforehand (``cache_vision``) is a part of.
        samples: trained on, on all processes; one that is seen again counts again.
    """

    seconds: float = 0.0
    samples: int = 0

    @classmethod
    def read(cls, path: Path) -> TrainingCost:
        """The content of an ``effort.json``; nothing where there is none, as in older checkpoints.

        Raises:
            CheckpointError: it is damaged.
        """
        if not path.exists():
            return cls()
        values = read_progress(path)
        for name in ("seconds", "samples"):
            value = values.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise CheckpointError(f"its {path.name} gives {name} as {value!r}")
        return cls(float(values["seconds"]), int(values["samples"]))


@dataclasses.dataclass
class TrainingState:
    """How far a run is, and what its log and its watch over the loss remember."""

    #: Batches trained on, of one process.
    iteration: int = 0
    #: (Inner) epochs trained and validated.
    epoch: int = 0
    #: How often the run went back to an earlier checkpoint than its newest one; 0 in older checkpoints.
    rewinds: int = 0
    #: What the length of training is counted in; empty in older checkpoints.
    unit: str = ""
    best_metric: float | None = None
    best_epoch: int | None = None
    #: That of the checkpoint that is best; None in older checkpoints.
    best_iteration: int | None = None
    #: Optimizer steps left out because a number was not finite: in all, and just before now.
    nonfinite_steps: int = 0
    nonfinite_in_row: int = 0
    #: Running mean and variance of the loss, over so many optimizer steps.
    loss_mean: float = 0.0
    loss_variance: float = 0.0
    loss_steps: int = 0
    #: Sum and number of the losses since the last log line.
    logged_sum: float = 0.0
    logged_steps: int = 0
    #: What the order of the data depends on: samples of each dataset, processes, batch size.
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: Each dataset's name and the digest of its records; empty in older checkpoints.
    records: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: Kept in a file of its own.
    effort: TrainingCost = dataclasses.field(default_factory=TrainingCost)

    def to_json(self) -> dict[str, Any]:
        """Plain values, but for the effort."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "effort"}

    def restore(self, values: dict[str, Any]) -> None:
        """Takes over what `to_json` gave. Raises `CheckpointError` for a value of another type."""
        for field in dataclasses.fields(self):
            if field.name == "effort":
                continue
            value = values.get(field.name, _IN_OLDER.get(field.name))
            own = getattr(self, field.name)
            kind = float if own is None else type(own)
            if own is None and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
                raise CheckpointError(f"its {PROGRESS_FILE} gives {field.name} as {value!r}")
            if kind is int and value < 0:
                raise CheckpointError(f"its {PROGRESS_FILE} gives {field.name} as {value!r}")
            setattr(self, field.name, value)


def data_changes(then: TrainingState, now: TrainingState) -> str:
    """What differs between a checkpoint's data and a run's, for people; empty where nothing does."""
    changes = [
        f"{key}: {then.data.get(key)} there, {now.data.get(key)} here"
        for key in dict.fromkeys([*then.data, *now.data])
        if then.data.get(key) != now.data.get(key)
    ]
    if then.records and list(then.records) != list(now.records):
        changes.append(f"datasets: {', '.join(then.records)} there, {', '.join(now.records)} here")
    for name, digest in now.records.items():
        known = then.records.get(name)
        if known is not None and digest is not None and known != digest:
            changes.append(f"the records of '{name}' are in another order, or changed")
    return "; ".join(changes)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``<weight>:<entry>``; the tensors themselves, not copies."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}:{entry}": torch.as_tensor(value)
        for p, entries in optimizer.state.items()
        for entry, value in entries.items()
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Gives the optimizer the state of `optimizer_tensors`; its settings stay those of the configuration.

    Raises:
        CheckpointError: a weight the model does not train, one that is missing, or another shape.
    """
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition(":")
        if name not in weights:
            raise CheckpointError(f"its optimizer state is of another model: this one does not train {name}")
        if value.ndim and value.shape != weights[name].shape:
            raise CheckpointError(
                f"its optimizer state is of another model: {name} has shape {tuple(value.shape)} there and "
                f"{tuple(weights[name].shape)} here"
            )
        entries.setdefault(name, {})[entry] = part_of(value, weights[name])
    missing = sorted(set(weights) - set(entries)) if entries else []
    if missing:
        raise CheckpointError(f"its optimizer state is of another model: it lacks {missing[0]}")
    settings = optimizer.state_dict()["param_groups"]
    names = {id(p): name for name, p in weights.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state = {index: entries[name] for index, name in enumerate(order) if name in entries}
    optimizer.load_state_dict({"state": state, "param_groups": settings})


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This process's random states: tensors, and what is no tensor."""
    version, internal, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    tensors = {
        "python": torch.tensor(internal, dtype=torch.int64),
        "numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    of_numpy = [int(numpy["state"]["pos"]), int(numpy["has_gauss"]), float(numpy["gauss"])]
    return tensors, {"python": [version, gauss], "numpy": of_numpy}


def set_random_state(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Puts back what `random_state` gave. Raises `CheckpointError` where that is damaged."""
    try:
        version, gauss = plain["python"]
        random.setstate((version, tuple(tensors["python"].tolist()), gauss))
        keys = tensors["numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, *plain["numpy"]))
        torch.set_rng_state(tensors["torch"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"its {RANDOM_FILE} is damaged ({error})") from error


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Puts this process's random states back after the block."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(*state)


def read_progress(path: Path) -> dict[str, Any]:
    """The content of a ``progress.json``. Raises `CheckpointError` where it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"its {path.name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"its {path.name} holds no counters")
    return content
