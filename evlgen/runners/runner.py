"""The training loop: accelerate moves, casts and distributes; this file says what happens when."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from evlgen.common.lr_schedules import Schedule
from evlgen.common.registry import registry
from evlgen.config.run_config import MAX_SEED, RunConfig
from evlgen.datasets.base_dataset import BaseDataset
from evlgen.loaders.data import BatchPlan, to_device, workers_named
from evlgen.loaders.interruption import StopNow, StopRequest
from evlgen.loaders.mixed_plan import MixedPlan
from evlgen.models.base_model import BaseModel
from evlgen.runners.anomalies import LossWatch
from evlgen.runners.batches import TrainingBatches
from evlgen.runners.checkpointer import Checkpointer
from evlgen.runners.checkpointing import Checkpointing
from evlgen.runners.distribution import Distribution, WeightedMeans, make_accelerator
from evlgen.runners.evaluation import deciding_metric, evaluate_split
from evlgen.runners.facts import RunFacts
from evlgen.runners.image_use_watch import ImageUseWatch
from evlgen.runners.lengths import Epochs
from evlgen.runners.listener import Evaluation, Listener, Step, ending_noted
from evlgen.runners.optimizer import set_learning_rate, update_weights
from evlgen.runners.progress import RunLog
from evlgen.runners.sample_captions import SampleCaptions
from evlgen.runners.set_up import set_up_training
from evlgen.runners.skipped import SkippedSamples
from evlgen.runners.task import Task
from evlgen.runners.trackers import Trackers
from evlgen.runners.training_state import TrainingState, kept_random_state
from evlgen.runners.weight_average import WeightAverage, averaged
from evlgen.runners.within_a_step import training_buffers, way_back


@registry.register_runner("runner_base")
@registry.register_runner("runner_iter")
@registry.register_runner("runner_timed")
class Runner:
    """Trains for so many epochs, iterations or seconds (`length_of`); validates, saves and at the end tests.
    LAVIS's names of runners, one for each kind of length, are all this one.

    An *iteration* is one batch on each process; the optimizer steps after ``accum_grad_iters`` of them and at
    the end of an epoch. Everything that only watches is a `Listener`: the log, checkpoints, trackers.

    Args:
        run: the ``run`` section.
        task: what is trained and how it is scored.
        model: the model; moved to the device here.
        datasets: dataset name -> split name -> dataset.
        folder: where this run writes (log, checkpoints, results).
        config: the whole configuration as plain values, saved with checkpoints.
        listeners: called besides the runner's own, such as those of ``run.listeners`` (`make_listeners`).
    """

    # what `set_up_training` gives it
    length: Epochs
    plan: BatchPlan | MixedPlan
    batches: TrainingBatches
    schedule: Schedule
    optimizer: torch.optim.Optimizer
    state: TrainingState
    average: WeightAverage | None = None  # see `RunConfig.ema_decay`
    # what each (inner) epoch finds
    trained: list[nn.Parameter]

    def __init__(
        self,
        run: RunConfig,
        task: Task,
        model: BaseModel,
        datasets: dict[str, dict[str, BaseDataset]],
        folder: Path,
        config: dict[str, Any] | None = None,
        accelerator: Accelerator | None = None,
        listeners: Sequence[Listener] = (),
    ) -> None:
        self.run, self.task, self.folder, self.config = run, task, folder, config or {}
        self.accelerator = accelerator or make_accelerator(run)
        self.datasets = datasets
        self.kept_tokens: dict[tuple[str, int], BaseDataset] = {}  # see `evaluate_split`
        set_seed((run.seed + self.accelerator.process_index) % (MAX_SEED + 1))
        self.model = model
        self.distribution = Distribution(self.accelerator, model, run)
        self.skipped = SkippedSamples(folder, run.max_skipped_share, self.accelerator.num_processes)
        self.checkpointer = Checkpointer(folder / "checkpoints", run.keep_last, self.config, self.accelerator)
        self.stop = StopRequest(distributed=self.accelerator.num_processes > 1)
        self.log = RunLog(folder, run, enabled=self.accelerator.is_main_process)
        self.listeners: list[Listener] = [
            *(LossWatch(folder, run, self.accelerator), ImageUseWatch(), self.log, SampleCaptions()),
            *(RunFacts(), Trackers(run.trackers), Checkpointing(), *listeners),
        ]

    def notify(self, event: str, *arguments: Any) -> None:
        """Calls a method of all listeners."""
        for listener in self.listeners:
            getattr(listener, event)(self, *arguments)

    # ---- training ----

    def train(self) -> dict[str, dict[str, float]]:
        """Trains, then tests the best checkpoint (the last one where nothing was validated).

        Returns:
            split name -> metrics, of the test splits.

        Raises:
            TrainingError: a loss that is not finite; too many broken samples; not one step could be made; the
                last checkpoint could not be saved. Interrupted: Ctrl-C or SIGTERM, after saving.
        """
        with workers_named(), self.stop, self.checkpointer, ending_noted(self):
            set_up_training(self)
            self.notify("before_training")
            self.length.find_epoch(self.state)
            while not self.length.is_done(self.state):
                self._train_epoch()
                self.notify("after_epoch")
                is_best = self._validate()
                self.state.epoch = self.length.next_epoch(self.state)
                self.notify("after_validation", is_best)
            self.notify("after_training")
            self.skipped.report(self.accelerator.is_main_process)
            if self.average is not None:
                self.average.exchange()  # the model that is left is the one that was saved
            if not self.run.test_splits:
                return {}
            self.model.load_checkpoint(self.checkpointer.best_or_latest())
            return self.evaluate(self.run.test_splits)

    def where(self) -> str:
        """How far training is, for messages."""
        return self.length.where(self.state)

    def _train_epoch(self) -> None:
        """The rest of the epoch that ``state`` is in."""
        state = self.state
        self.distribution.wrapped.train()
        self.notify("before_epoch")
        self.trained = [p for p in self.model.parameters() if p.requires_grad]  # thousands to look at
        buffers = training_buffers(self.model)
        self.clock = time.perf_counter()
        while left := self.length.left_in_epoch(state):
            num_batches = min(self.run.accum_grad_iters, left)
            go_back = way_back(state, self.skipped, buffers) if num_batches > 1 else None
            try:
                asked_to_stop = self._train_step(num_batches)
            except StopNow:
                asked_to_stop = True
                if go_back is not None:  # the batches of a step that are read so far come again
                    go_back()
            if asked_to_stop:
                self.stop.in_time()
                self.notify("before_stop")
                raise self.stop.interrupted(f"after {self.where()}; saved in {self.checkpointer.folder}")

    def _train_step(self, num_batches: int) -> bool:
        """One optimizer step; true where some process was asked to stop.

        The gradient is that of the mean over all tokens of all these batches on all processes, as if they
        were one batch: each batch's mean loss weighs by its tokens.
        """
        state, accelerator, batch_size = self.state, self.accelerator, self.run.batch_size_train
        learning_rate = self.length.learning_rate(self.schedule, state)
        set_learning_rate(self.optimizer, learning_rate)
        is_one_batch = num_batches * accelerator.num_processes == 1
        means = WeightedMeans()
        seen: list[tuple[Tensor, list[str]]] = []  # each batch's loss and sample ids
        for left in reversed(range(num_batches)):
            samples, count = self.batches.next(state.iteration)
            state.iteration += 1
            if samples is None:
                continue
            # gradients are exchanged after the last batch only
            with self.distribution.accumulating() if left else contextlib.nullcontext():
                samples = to_device(samples, accelerator.device)
                losses = self.task.train_step(self.distribution.wrapped, samples)
                weight = float(losses.pop("num_tokens", count)) * (count > 0)
                accelerator.backward(losses["loss"] * (1.0 if is_one_batch else weight / batch_size))
            self.batches.begin_next()
            means.add(losses, weight, count)
            seen.append((losses["loss"].detach(), samples.get("sample_id", []) if count else []))
        mean_losses, weight, count, asked_to_stop = means.over_processes(accelerator, self.stop.requested)
        step = Step(num_batches, learning_rate=learning_rate, seen=seen)
        if weight:
            scale = 1.0 if is_one_batch else batch_size * accelerator.num_processes / weight
            step.samples, step.losses = count, mean_losses
            step.grad_norm = update_weights(self, scale, mean_losses["loss"])
            step.is_finite = math.isfinite(step.grad_norm) and math.isfinite(mean_losses["loss"])
            state.effort.samples += count
        self.optimizer.zero_grad(set_to_none=True)
        self.count_time()
        self.notify("after_step", step)
        return asked_to_stop

    def count_time(self) -> None:
        """Adds the time since the last call, or since the epoch was begun, to that of training."""
        now = time.perf_counter()
        self.state.effort.seconds += now - self.clock
        self.clock = now
        self.length.agree(self.state, self.accelerator)

    def _validate(self) -> bool:
        """Scores the validation splits where it is their turn; true for the best checkpoint so far."""
        state, run = self.state, self.run
        if not run.valid_splits:
            state.best_iteration = state.iteration
            return True  # the newest is the best known
        if (state.epoch + 1) % run.valid_freq and not self.length.is_trained(state):
            return False
        with kept_random_state(), averaged(self):
            scores = self.evaluate(run.valid_splits, state)
        metric = deciding_metric(scores, run.valid_splits[0])  # the first split decides
        is_best = metric is not None and (state.best_metric is None or metric > state.best_metric)
        if is_best:
            state.best_metric, state.best_epoch = metric, state.epoch + 1
            state.best_iteration = state.iteration
        return is_best

    # ---- evaluation ----

    @torch.no_grad()
    def evaluate(self, splits: list[str], state: TrainingState | None = None) -> dict[str, dict[str, float]]:
        """Scores the splits: split name -> metrics (``dataset/split`` where there are several datasets).

        Args:
            state: of the run that is being validated; None for a test.
        """
        scores = {}
        with workers_named():
            for name, by_split in self.datasets.items():
                for split in splits:
                    if split in by_split:
                        key = split if len(self.datasets) == 1 else f"{name}/{split}"
                        evaluation = Evaluation(key, split, by_split[split], state)
                        evaluate_split(self, evaluation)
                        scores[key] = evaluation.metrics
        return scores
