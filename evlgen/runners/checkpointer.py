"""Saves a run's checkpoints while it goes on, and finds the newest good one.

The weights and the optimizer's state change in `optimizer.step` only. A save therefore copies them in a
thread of its own while the next batch's gradient is computed, and writes the copies after that; training
waits only where a step comes before the copying is done (`Checkpointer.wait_for_copy`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from evlgen.common.errors import CheckpointError, ConfigError, TrainingError
from evlgen.config.config import changed_keys
from evlgen.config.yaml_io import read_yaml
from evlgen.files.digests import check_digests, replace_file, write_digests
from evlgen.files.io import write_atomically
from evlgen.models.base_model import BaseModel
from evlgen.runners.dtensor import gathered
from evlgen.runners.skipped import SkippedSamples
from evlgen.runners.training_state import (
    EFFORT_FILE,
    OPTIMIZER_FILE,
    PROGRESS_FILE,
    RANDOM_FILE,
    TRAINED_FILE,
    TrainingCost,
    TrainingState,
    data_changes,
    kept_random_state,
    load_optimizer,
    optimizer_tensors,
    random_state,
    read_progress,
    set_random_state,
)
from evlgen.runners.weight_average import WeightAverage, load_trained
from evlgen.weights.checkpoints import (
    CONFIG_FILE,
    STATE_FOLDER,
    WEIGHTS_FILE,
    clear_unfinished,
    found_checkpoints,
    is_checkpoint,
    place_of,
    remove_old,
    remove_symlink,
    update_symlink,
    write_folder,
)
from evlgen.weights.weights import first_not_finite, read_weights

logger = logging.getLogger(__name__)

_OF_THIS_RUN = ("run.resume", "run.output_dir", "model.checkpoint")  # expected to differ; not reported


class Checkpointer:
    """Saves, names and restores the checkpoints of a run. Leaving its block waits for the last write.

    Args:
        folder: the run's ``checkpoints`` folder.
        keep_last: how many are kept besides those ``latest`` and ``best`` point at.
        config: the whole configuration, saved with each.
        accelerator: says which process writes; all of them call `save`.

    Attributes:
        average: of the weights, saved in their place; None: they are saved themselves.
    """

    average: WeightAverage | None = None

    def __init__(
        self, folder: Path, keep_last: int, config: dict[str, Any], accelerator: Accelerator
    ) -> None:
        self.folder, self.keep_last, self.config, self.accelerator = folder, keep_last, config, accelerator
        self.saved_iteration: int | None = None
        self._job: _SaveJob | None = None
        self._problem: str | None = None  # why the last write failed
        self._unreadable: set[Path] = set()

    def __enter__(self) -> Checkpointer:
        if self.accelerator.is_main_process:
            clear_unfinished(self.folder)
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self.wait()
        if kind is None:
            self.raise_problem()

    # ---- saving ----

    def save(
        self,
        model: BaseModel,
        optimizer: torch.optim.Optimizer,
        state: TrainingState,
        process_state: dict[str, Any],
    ) -> None:
        """Begins to write ``step_<iteration>``, to which ``latest`` points once it is whole.

        Args:
            process_state: JSON-able values of this process, returned to it by `resume`.
        """
        self.wait()
        self.saved_iteration = state.iteration
        tensors, plain = random_state()
        processes = gather_object([(tensors, {"random": plain, "own": process_state})])
        is_main = self.accelerator.is_main_process
        weights, moments = model.saved_state_dict(), optimizer_tensors(model, optimizer)
        files = {WEIGHTS_FILE: weights, OPTIMIZER_FILE: moments}
        if self.average is not None:
            files = {
                **files,
                WEIGHTS_FILE: weights | self.average.means,
                TRAINED_FILE: self.average.trained(),
            }
        files = {name: gathered(tensors, keep=is_main) for name, tensors in files.items()}
        if not is_main:
            return
        scaler = self.accelerator.scaler
        progress = {
            **state.to_json(),
            "processes": [own for _, own in processes],
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        effort = json.dumps(dataclasses.asdict(state.effort))
        buffers = dict(model.named_buffers())
        # buffers may change before the next step: they are copied here
        for name, of_file in files.items():
            files[name] = {k: v.clone() if k in buffers else v for k, v in of_file.items()}
        drawn = {f"{rank}.{k}": v for rank, (own, _) in enumerate(processes) for k, v in own.items()}
        config = OmegaConf.to_yaml(OmegaConf.create(self._config_for(model)))

        def write(folder: Path, copies: dict[str, dict[str, Tensor]]) -> None:
            model.save_weights(folder, copies.pop(WEIGHTS_FILE))
            write_atomically(folder / CONFIG_FILE, config)
            (folder / STATE_FOLDER).mkdir()
            write_atomically(folder / STATE_FOLDER / PROGRESS_FILE, json.dumps(progress, indent=1))
            write_atomically(folder / STATE_FOLDER / EFFORT_FILE, effort)
            for name, of_file in {**copies, RANDOM_FILE: drawn}.items():
                save_file(of_file, folder / STATE_FOLDER / name)
            write_digests(folder)

        target = self.folder / f"step_{state.iteration:08d}"
        self._unreadable.discard(target)
        self._job = _SaveJob(target, files, write, self.keep_last)
        self._job.start()

    def wait_for_copy(self) -> None:
        """To be called before weights change: returns once a save that is going on has its copy of them."""
        if self._job is not None:
            self._job.copied.wait()

    def wait(self) -> None:
        """Returns when nothing is being written; says in the log where a write failed."""
        if self._job is None:
            return
        self._job.join()
        target, error, remedy = self._job.target, self._job.error, self._job.remedy
        self._job = None
        self._problem = None
        if error is not None:
            self.saved_iteration = None
            last = self.latest()
            self._problem = (
                f"{target} could not be saved ({error}). The last whole checkpoint is {last or 'none yet'}."
            )
            logger.error("%s %s", self._problem, remedy)

    def raise_problem(self) -> None:
        """Raises `TrainingError` where the last write failed: for when there is no next one."""
        if self._problem:
            raise TrainingError(self._problem)

    def end_epoch(self, state: TrainingState, is_best: bool) -> None:
        """Adds to the checkpoint just saved that its epoch is validated, and with what result."""
        self.wait()
        folder = self.folder / f"step_{state.iteration:08d}"
        if not self.accelerator.is_main_process or not is_checkpoint(folder):
            return
        progress = f"{STATE_FOLDER}/{PROGRESS_FILE}"
        try:
            values = {**read_progress(folder / progress), **state.to_json()}
            replace_file(folder, progress, json.dumps(values, indent=1))
            if is_best:
                update_symlink(self.folder / "best", folder)
        except (OSError, CheckpointError) as error:  # the checkpoint stays as it was saved
            cause = (isinstance(error, OSError) and error.strerror) or error
            self._problem = f"the validation of {folder} could not be noted in it ({cause})."
            logger.error("%s", self._problem)

    # ---- finding and restoring ----

    def latest(self) -> Path | None:
        """The newest whole checkpoint of this run, or None; not one that `resume` could not read."""
        return next((p for p in found_checkpoints(self.folder) if p not in self._unreadable), None)

    def best_or_latest(self) -> Path:
        """The best checkpoint by validation; the newest where none was scored."""
        best = self.folder / "best"
        folder = best.resolve() if is_checkpoint(best) else self.latest()
        if folder is None:
            raise CheckpointError(f"{self.folder} holds no checkpoint.")
        return folder

    def resume(
        self, source: str, model: BaseModel, optimizer: torch.optim.Optimizer, state: TrainingState
    ) -> dict[str, Any] | None:
        """Puts everything back as it was at a checkpoint.

        Args:
            source: a checkpoint's folder, or ``auto``: this run's newest one that can be read, if any.

        Returns:
            What this process gave `save` as its state; None where nothing was resumed.

        Raises:
            CheckpointError: the named checkpoint is damaged or of another model.
        """
        if source != "auto":
            folder = Path(source).expanduser()
            try:
                return self._restore(folder, self._read(folder), model, optimizer, state)
            except CheckpointError as error:
                raise CheckpointError(f"run.resume: {folder} cannot be continued: {error}") from error
        found = found_checkpoints(self.folder)
        for folder in found:
            try:
                content = self._read(folder)
            except CheckpointError as error:
                logger.warning("%s is skipped: %s", folder, error)
                self._unreadable.add(folder)
                continue
            if self._unreadable:
                logger.warning("going on from %s, the newest checkpoint that is whole", folder)
            return self._restore(folder, content, model, optimizer, state)
        if found:
            logger.warning("no checkpoint in %s can be read: starting from the beginning", self.folder)
            self._count_rewind(state)
            self._restore_best(state)
        else:
            logger.info("nothing to resume in %s: starting from the beginning", self.folder)
        return None

    def _read(self, folder: Path) -> _Saved:
        """Reads a checkpoint whole; the first process compares it with its digests. Where one process cannot
        read it, all raise `CheckpointError`."""
        problem = saved = None
        try:
            if self.accelerator.is_main_process:
                check_digests(folder)
            saved = _Saved.read(folder)
        except CheckpointError as error:
            problem = str(error)
        problems = [problem for problem in gather_object([problem]) if problem]
        if saved is None or problems:
            raise CheckpointError(problems[0])
        return saved

    def _restore(
        self,
        folder: Path,
        saved: _Saved,
        model: BaseModel,
        optimizer: torch.optim.Optimizer,
        state: TrainingState,
    ) -> dict[str, Any]:
        for line in changed_keys(saved.config, self._config_for(model), _OF_THIS_RUN):
            logger.warning("changed since %s was saved: %s", folder.name, line)
        now, is_stream = dataclasses.replace(state), "shards" in state.data
        state.restore(saved.progress)
        state.effort = saved.effort
        self._count_rewind(state)
        self._restore_best(state)
        if changes := data_changes(state, now):
            logger.warning(
                "the data is not that of %s (%s): its order differs from here on%s",
                folder.name,
                changes,
                "; of a stream, what was trained on in its pass so far may come again" * is_stream,
            )
        state.data, state.records = now.data, now.records
        model.load_checkpoint(folder)
        if self.average is not None:
            self.average.begin()
        load_trained(model, saved.trained)
        load_optimizer(model, optimizer, saved.moments)
        scaler = self.accelerator.scaler
        if scaler is not None and saved.progress.get("scaler"):
            scaler.load_state_dict(saved.progress["scaler"])
        self.saved_iteration = state.iteration
        rank, processes = self.accelerator.process_index, saved.progress["processes"]
        if rank >= len(processes):
            return {}
        _set_random_state_of(saved.drawn, processes, rank)
        return processes[rank].get("own", {})

    def _count_rewind(self, state: TrainingState) -> None:
        """What is saved from here on is newer than the checkpoints that the run goes back behind."""
        newest = next(iter(found_checkpoints(self.folder)), None)
        if newest is None or place_of(newest) <= (state.rewinds, state.iteration):
            return
        state.rewinds = place_of(newest)[0] + 1
        logger.warning(
            "going back from %s to iteration %d: what is saved from here on counts as newer, and "
            "run.keep_last removes what is older",
            newest.name,
            state.iteration,
        )

    def _restore_best(self, state: TrainingState) -> None:
        """Points ``best`` at the checkpoint that was best where the run goes on from: what was validated
        later may be written over. Where this run's folder lacks it, the next validation finds another."""

        def is_best(folder: Path) -> bool:
            if state.best_iteration is None:  # not known of older checkpoints
                return place_of(folder)[1] <= state.iteration
            try:
                values = read_progress(folder / STATE_FOLDER / PROGRESS_FILE)
            except CheckpointError:
                return False
            names = ("iteration", "best_iteration", "best_metric")
            known = (state.best_iteration, state.best_iteration, state.best_metric)
            return tuple(map(values.get, names)) == known

        link, best = self.folder / "best", None
        if is_checkpoint(link) and is_best(link):
            return
        if state.best_iteration is not None:
            best = next(filter(is_best, found_checkpoints(self.folder)), None)
        if best is None:
            state.best_metric = state.best_epoch = state.best_iteration = None
        if not self.accelerator.is_main_process:
            return
        if best is not None:
            update_symlink(link, best)
        elif os.path.lexists(link):
            remove_symlink(link)

    def _config_for(self, model: BaseModel) -> dict[str, Any]:
        section = {**dataclasses.asdict(model.cfg), "checkpoint": None}
        return {**self.config, "model": section}


@dataclasses.dataclass
class _Saved:
    """What a checkpoint holds besides the weights; read whole before anything of it is used."""

    config: dict[str, Any]
    progress: dict[str, Any]
    moments: dict[str, Tensor]
    drawn: dict[str, Tensor]
    trained: dict[str, Tensor]
    effort: TrainingCost

    @classmethod
    def read(cls, folder: Path) -> _Saved:
        state = folder / STATE_FOLDER
        if not state.is_dir():
            raise CheckpointError(
                f"it has no {STATE_FOLDER}/. Name a folder under a run's checkpoints/, or use "
                "model.checkpoint to start from its weights."
            )
        if not is_checkpoint(folder):
            raise CheckpointError("it is no whole checkpoint. Name another one.")
        progress = read_progress(state / PROGRESS_FILE)
        processes = progress.get("processes")
        if not isinstance(processes, list) or not all(isinstance(own, dict) for own in processes):
            raise CheckpointError(f"its {PROGRESS_FILE} is damaged")
        _check_counters(progress)
        read_weights(folder)  # memory-mapped: this only finds out whether it is whole
        try:
            config = read_yaml(folder / CONFIG_FILE)
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        moments, generators = (read_weights(state / name) for name in (OPTIMIZER_FILE, RANDOM_FILE))
        with kept_random_state():  # whether they can be set, before anything else of it is used
            for rank in range(len(processes)):
                _set_random_state_of(generators, processes, rank)
        trained = read_weights(state / TRAINED_FILE) if (state / TRAINED_FILE).exists() else {}
        return cls(config, progress, moments, generators, trained, TrainingCost.read(state / EFFORT_FILE))


def _set_random_state_of(drawn: dict[str, Tensor], processes: list[dict[str, Any]], rank: int) -> None:
    """Sets the random states that the process of this rank had. Raises `CheckpointError` for damaged ones."""
    own = {k.partition(".")[2]: v for k, v in drawn.items() if k.partition(".")[0] == str(rank)}
    set_random_state(own, processes[rank].get("random", {}))


def _check_counters(progress: dict[str, Any]) -> None:
    """Raises `CheckpointError` for counters that are none, before any of them is taken over."""
    TrainingState().restore(progress)
    for process in progress["processes"]:
        own = process.get("own", {})
        if not isinstance(own, dict) or not isinstance(process.get("random", {}), dict):
            raise CheckpointError(f"its {PROGRESS_FILE} is damaged")
        SkippedSamples(Path(), 1.0).restore(own.get("skipped", {}))
    scaler = progress.get("scaler") or {}
    numbers = list(scaler.values()) if isinstance(scaler, dict) else [None]
    if not all(isinstance(number, int | float) for number in numbers):
        raise CheckpointError(f"its {PROGRESS_FILE} gives scaler as {scaler!r:.100}")


class _SaveJob(threading.Thread):
    """Copies tensors to memory, then writes and names a checkpoint. ``error`` says why that failed, and
    ``remedy`` what helps."""

    def __init__(
        self,
        target: Path,
        files: dict[str, dict[str, Tensor]],
        write: Callable[[Path, dict[str, dict[str, Tensor]]], None],
        keep_last: int,
    ) -> None:
        super().__init__(name=f"save {target.name}")
        self.target, self.keep_last = target, keep_last
        self.copied = threading.Event()
        self.error: str | None = None
        self.remedy = "Free space or rights there; the next save tries again."
        self._files = files
        self._write = write
        self._copying = _copying_stream(files[WEIGHTS_FILE])

    def run(self) -> None:
        try:
            try:
                with self._copying:
                    copies = {name: _copy(tensors) for name, tensors in self._files.items()}
            finally:
                self._files = {}
                self.copied.set()
            for copied in copies.values():
                if (bad := first_not_finite(copied)) is not None:
                    self.remedy = "Lower run.init_lr, or set run.max_grad_norm."
                    raise TrainingError(f"{bad} holds numbers that are not finite")
            write_folder(self.target, lambda folder: self._write(folder, copies))
            update_symlink(self.target.parent / "latest", self.target)
            remove_old(self.target.parent, self.keep_last)
        except (OSError, SafetensorError, TrainingError) as error:
            self.error = (
                os.strerror(error.errno) if isinstance(error, OSError) and error.errno else None
            ) or str(error)
        except BaseException as error:  # report any failure to the training thread
            self.error = repr(error)


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        k: v.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for k, v in tensors.items()
    }


def _copying_stream(tensors: dict[str, Tensor]) -> contextlib.AbstractContextManager:
    """On a GPU a stream of its own, which starts after what is queued now and does not wait for what comes
    later."""
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    if device.type != "cuda":
        return contextlib.nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)
