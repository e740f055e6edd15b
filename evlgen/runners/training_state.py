"""Where a run stands, and how that is saved and found again."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from omegaconf import OmegaConf

from evlgen.common.checkpoints import (
    CONFIG_FILE,
    STATE_FOLDER,
    is_checkpoint,
    point,
    remove_old,
    write_folder,
)
from evlgen.common.errors import CheckpointError
from evlgen.common.io import write_atomically
from evlgen.common.weights import read_pickle
from evlgen.models.base_model import BaseModel

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class TrainingState:
    """How far a run is: batches and (inner) epochs done, and the best validation so far."""

    iteration: int = 0
    epoch: int = 0
    best_metric: float | None = None
    best_epoch: int | None = None


class Checkpointer:
    """Saves and finds the checkpoints of a run.

    Args:
        folder: the run's ``checkpoints`` folder.
        keep_last: how many are kept besides those ``latest`` and ``best`` point at.
        config: the whole configuration, saved with each.
    """

    def __init__(self, folder: Path, keep_last: int, config: dict[str, Any]) -> None:
        self.folder, self.keep_last, self.config = folder, keep_last, config

    def save(
        self,
        accelerator: Accelerator,
        model: BaseModel,
        optimizer: torch.optim.Optimizer,
        state: TrainingState,
        is_best: bool,
    ) -> None:
        """Writes ``step_<iteration>`` and points ``latest`` (and ``best``) at it."""
        accelerator.wait_for_everyone()
        random_states = _gather_random_states(accelerator)
        if accelerator.is_main_process:

            def write(folder: Path) -> None:
                model.save_weights(folder)
                write_atomically(
                    folder / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(self._config_for(model)))
                )
                (folder / STATE_FOLDER).mkdir()
                write_atomically(
                    folder / STATE_FOLDER / "progress.json", json.dumps(dataclasses.asdict(state), indent=1)
                )
                torch.save(optimizer.state_dict(), folder / STATE_FOLDER / "optimizer.pt")
                torch.save(random_states, folder / STATE_FOLDER / "random.pt")
                if accelerator.scaler is not None:
                    torch.save(accelerator.scaler.state_dict(), folder / STATE_FOLDER / "scaler.pt")

            target = write_folder(self.folder / f"step_{state.iteration:08d}", write)
            point(self.folder / "latest", target)
            if is_best:
                point(self.folder / "best", target)
            remove_old(self.folder, self.keep_last)
        accelerator.wait_for_everyone()

    def resume(
        self,
        source: str,
        model: BaseModel,
        optimizer: torch.optim.Optimizer,
        state: TrainingState,
        accelerator: Accelerator,
    ) -> None:
        """Puts everything back as it was at a checkpoint: ``auto`` for this run's newest, or a checkpoint's
        folder."""
        if source == "auto":
            folder = self.latest()
            if folder is None:
                logger.info("nothing to resume in %s: starting from the beginning", self.folder)
                return
        else:
            folder = Path(source).expanduser()
        progress = folder / STATE_FOLDER / "progress.json"
        if not progress.is_file():
            raise CheckpointError(
                f"run.resume: {folder} has no {STATE_FOLDER}/progress.json, so a run cannot go on from it. "
                "Name a folder under a run's checkpoints/, or use model.checkpoint to start from its weights."
            )
        model.load_checkpoint(folder)
        for key, value in json.loads(progress.read_text(encoding="utf-8")).items():
            setattr(state, key, value)
        try:
            optimizer.load_state_dict(read_pickle(folder / STATE_FOLDER / "optimizer.pt"))
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"run.resume: the optimizer state in {folder} belongs to another model ({error}). Use the "
                "run's own "
                "config.yaml, or model.checkpoint to start from its weights."
            ) from error
        if accelerator.scaler is not None and (folder / STATE_FOLDER / "scaler.pt").is_file():
            accelerator.scaler.load_state_dict(read_pickle(folder / STATE_FOLDER / "scaler.pt"))
        states = read_pickle(folder / STATE_FOLDER / "random.pt")
        if accelerator.process_index < len(states):
            _set_random_state(states[accelerator.process_index])

    def latest(self) -> Path | None:
        """The newest whole checkpoint of this run, or None."""
        link = self.folder / "latest"
        if is_checkpoint(link):
            return link.resolve()
        found = (
            sorted(p for p in self.folder.glob("step_*") if is_checkpoint(p)) if self.folder.is_dir() else []
        )
        return found[-1] if found else None

    def best_or_latest(self) -> Path:
        """The best checkpoint by validation; the newest where none was scored."""
        best = self.folder / "best"
        folder = best.resolve() if is_checkpoint(best) else self.latest()
        if folder is None:
            raise CheckpointError(f"{self.folder} holds no checkpoint.")
        return folder

    def _config_for(self, model: BaseModel) -> dict[str, Any]:
        section = {**dataclasses.asdict(model.cfg), "checkpoint": None}
        return {**self.config, "model": section}


def _gather_random_states(accelerator: Accelerator) -> list[dict[str, Any]]:
    from accelerate.utils import gather_object

    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    own = {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    return gather_object([own])


def _set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
