"""The training loop: accelerate moves, casts and distributes; this file says what happens when."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import Tensor
from torch.utils.data import Dataset

from evlgen.common.errors import TrainingError
from evlgen.common.registry import registry
from evlgen.config.run_config import RunConfig
from evlgen.datasets.base_dataset import Skipped
from evlgen.datasets.records import digest
from evlgen.loaders.data import (
    batch_size,
    eval_loader,
    rows_of,
    seeded,
    to_device,
    train_loader,
    workers_named,
)
from evlgen.loaders.interruption import StopNow, StopRequest
from evlgen.loaders.mixed_plan import make_plan, one_by_one, recorded, split_ratios
from evlgen.models.base_model import BaseModel
from evlgen.runners.anomalies import LossWatch
from evlgen.runners.checkpointer import Checkpointer
from evlgen.runners.distribution import Distribution, WeightedMeans, make_accelerator
from evlgen.runners.dtensor import multiply, total_norm
from evlgen.runners.image_use import ImageUseMeter
from evlgen.runners.optimizer import build_optimizer
from evlgen.runners.progress import RunLog, validation_label
from evlgen.runners.skipped import SkippedSamples
from evlgen.runners.task import Task
from evlgen.runners.training_state import TrainingState, kept_random_state, random_state, set_random_state
from evlgen.vision_cache.cache import cached

logger = logging.getLogger(__name__)


@registry.register_runner("runner_base")
class Runner:
    """Trains for ``max_epoch`` epochs, each once through the data; validates, saves and at the end tests.

    An *iteration* is one batch on each process; the optimizer steps after ``accum_grad_iters`` of them and at
    the end of an epoch.

    Args:
        run: the ``run`` section.
        task: what is trained and how it is scored.
        model: the model; moved to the device here.
        datasets: dataset name -> split name -> dataset.
        folder: where this run writes (log, checkpoints, results).
        config: the whole configuration as plain values, saved with checkpoints.
    """

    UNIT = "epochs"  # what the length of training is counted in

    def __init__(
        self,
        run: RunConfig,
        task: Task,
        model: BaseModel,
        datasets: dict[str, dict[str, Dataset]],
        folder: Path,
        config: dict[str, Any] | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.run, self.task, self.folder = run, task, folder
        self.accelerator = accelerator or make_accelerator(run)
        self.datasets = datasets
        set_seed(run.seed + self.accelerator.process_index)
        self.model = model
        self.distribution = Distribution(self.accelerator, model, run)
        self.log = RunLog(folder, run, enabled=self.accelerator.is_main_process)
        self.skipped = SkippedSamples(folder, run.max_skipped_share, self.accelerator.num_processes)
        self.watch = LossWatch(folder, run, self.accelerator)
        self.checkpointer = Checkpointer(
            folder / "checkpoints", run.keep_last, config or {}, self.accelerator
        )
        self.stop = StopRequest(distributed=self.accelerator.num_processes > 1)

    # ---- training ----

    def train(self) -> dict[str, dict[str, float]]:
        """Trains, then tests the best checkpoint (the last one where nothing was validated).

        Returns:
            split name -> metrics, of the test splits.

        Raises:
            TrainingError: a loss that is not finite; too many broken samples; not one step could be made; the
                last checkpoint could not be saved. Interrupted: Ctrl-C or SIGTERM, after saving.
        """
        with workers_named(), self.stop, self.checkpointer:
            self._set_up_training()
            state, batches = self.state, self.stop.heeding(self._loader, self._loader.num_workers > 0)
            while not self.is_done():
                self._train_epoch(batches)
                if self.is_trained():
                    self._check_trained()
                self._save()
                is_best = self._validate()
                state.epoch = self.next_epoch()
                self.checkpointer.end_epoch(state, is_best)
            self.log.end_training()
            self.skipped.report(self.accelerator.is_main_process)
            self.checkpointer.raise_problem()
            if not self.run.test_splits:
                return {}
            self.model.load_checkpoint(self.checkpointer.best_or_latest())
            return self.evaluate(self.run.test_splits)

    def _set_up_training(self) -> None:
        run, accelerator = self.run, self.accelerator
        trained = {
            (name if len(run.train_splits) == 1 else f"{name}/{split}"): (name, dataset)
            for name, splits in self.datasets.items()
            for split, dataset in splits.items()
            if split in run.train_splits
        }
        self._trained = {key: dataset for key, (_, dataset) in trained.items()}
        self.task.before_training(self._trained, self.distribution)
        self.plan = make_plan(
            list(self._trained.values()),
            run.batch_size_train,
            run.seed,
            ratios=split_ratios(run.train_dataset_ratios, list(trained.values())),
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            has_epochs=bool(run.max_epoch),
            group_by_length=run.group_by_length,
        )
        self.iters_per_epoch, self.total_iters = self.length()
        self.schedule = registry.get_lr_scheduler_class(run.lr_sched)(
            total_iters=self.total_iters,
            iters_per_epoch=self.iters_per_epoch,
            init_lr=run.init_lr,
            min_lr=run.min_lr,
            warmup_lr=run.warmup_lr,
            warmup_steps=run.warmup_steps,
            decay_rate=run.lr_decay_rate or 1.0,
        )
        optimizer = build_optimizer(self.model, run.init_lr, run.weight_decay, run.beta2, run.lr_scale)
        self.optimizer = accelerator.prepare(optimizer)
        self.state = TrainingState(
            unit=self.UNIT,
            data={
                "samples": self.plan.lengths,
                "batch_size": run.batch_size_train,
                "processes": accelerator.num_processes,
                **recorded(self._trained.values()),
                **({"grouped": True} if run.group_by_length else {}),
            },
            records={name: digest(getattr(d, "records", ())) for name, d in self._trained.items()},
        )
        self._last_samples: dict[str, Any] | None = None
        if run.resume:
            own = self.checkpointer.resume(run.resume, self.model, self.optimizer, self.state)
            self.skipped.restore((own or {}).get("skipped", {}))
            if self.state.iteration:
                logger.info("resuming after %s", self.where())
        self.plan.start = self.state.iteration
        self._steps, self._left_out = 0, 0
        self._clock = time.perf_counter()
        if run.cache_vision:
            self._trained = cached(self._trained, self.model, run, accelerator, self.stop)
            self._count_time()  # encoding is a part of training that is done beforehand
        self._loader = train_loader(
            self._trained, self.plan, run.num_workers, accelerator.device.type == "cuda"
        )
        self.log.start_training(self._shown_total(), self.state)
        self._find_epoch()

    def _find_epoch(self) -> None:
        """The (inner) epoch that a resumed run is in, where they are of another length than before: it is
        counted in other units, or batches are larger, or a run that had ended goes on for longer."""
        state, reached = self.state, self.reached_epoch()
        is_other = state.unit not in (self.UNIT, "")
        if is_other:
            logger.info("the length of training was counted in %s, and is in %s", state.unit, self.UNIT)
        has_all_epochs = self.is_done() and state.unit == self.UNIT == Runner.UNIT
        is_cut_short = self.is_done() and not self.is_trained()
        if is_other or ((is_cut_short or abs(state.epoch - reached) > 1) and not has_all_epochs):
            state.epoch = reached
        state.unit = self.UNIT
        if self.is_done():
            key = {"iterations": "max_iters", "seconds": "max_seconds"}.get(self.UNIT, "max_epoch")
            logger.info("nothing is left to train: %s. Raise run.%s to train on", self.where(), key)

    def length(self) -> tuple[int, int]:
        """Iterations of an epoch and of the whole run."""
        return self.plan.batches_per_epoch, self.plan.batches_per_epoch * self.run.max_epoch

    def left_in_epoch(self) -> int:
        """How many iterations may follow before the (inner) epoch that ``state`` is in ends."""
        end = min(self.total_iters, (self.state.epoch + 1) * self.iters_per_epoch)
        return max(0, end - self.state.iteration)

    def is_trained(self) -> bool:
        """Whether the last iteration is done; its validation may be to come."""
        return self.state.iteration >= self.total_iters

    def is_done(self) -> bool:
        """Whether the last (inner) epoch is trained and validated."""
        return self.state.epoch * self.iters_per_epoch >= self.total_iters

    def reached_epoch(self) -> int:
        """The (inner) epoch that what is trained falls in, were all of them as long as now."""
        return self.state.iteration // self.iters_per_epoch

    def next_epoch(self) -> int:
        """The (inner) epoch after the one that has just been validated."""
        return max(self.state.epoch + 1, self.reached_epoch())

    def learning_rate(self) -> float:
        """Of the next optimizer step."""
        return self.schedule(self.state.iteration)

    def where(self) -> str:
        """How far training is, for messages."""
        return f"iteration {self.state.iteration} of {self.total_iters}"

    def _shown_total(self) -> int | None:
        return self.total_iters

    def _train_epoch(self, batches: Iterator[dict[str, Any]]) -> None:
        """The rest of the epoch that ``state`` is in."""
        state = self.state
        self.distribution.wrapped.train()
        self.log.resume_clock(state)
        self._clock = time.perf_counter()
        while left := self.left_in_epoch():
            group = min(self.run.accum_grad_iters, left)
            before = (state.iteration, self.skipped.to_json(), random_state()) if group > 1 else None
            try:
                asked_to_stop = self._train_group(batches, group)
            except StopNow:
                asked_to_stop = True
                if before is not None:  # the batches of a step that are read so far come again
                    state.iteration, skipped, drawn = before
                    self.skipped.restore(skipped)
                    set_random_state(*drawn)
            if asked_to_stop:
                self._save_and_stop()
            if self.run.save_every and state.iteration % self.run.save_every < group:
                self._save()

    def _train_group(self, batches: Iterator[dict[str, Any]], group: int) -> bool:
        """One optimizer step over ``group`` batches; true where some process was asked to stop.

        The gradient is that of the mean over all tokens of all these batches on all processes, as if they
        were one batch: each batch's mean loss weighs by its tokens.
        """
        state, processes = self.state, self.accelerator.num_processes
        learning_rate = self.learning_rate()
        for params in self.optimizer.param_groups:
            params["lr"] = learning_rate * params.get("lr_scale", 1.0)
        is_one_batch = group * processes == 1
        means = WeightedMeans()
        seen: list[tuple[Tensor, list[str]]] = []  # each batch's loss and sample ids
        for position in range(group):
            samples = self.skipped.take_out(self._learnable(next(batches)), state.iteration)
            state.iteration += 1
            is_empty = samples is None
            if is_empty:
                if processes == 1:
                    continue
                samples = self._stand_in()  # every process must take part in the step, here with no weight
            self._last_samples = samples
            with self._synchronised(position == group - 1):
                losses = self.task.train_step(
                    self.distribution.wrapped, to_device(samples, self.accelerator.device)
                )
                count = 0 if is_empty else batch_size(samples)
                weight = float(losses.pop("num_tokens", count)) * (count > 0)
                share = 1.0 if is_one_batch else weight / self.run.batch_size_train
                self.accelerator.backward(losses["loss"] * share)
            means.add(losses, weight, count)
            seen.append((losses["loss"].detach(), samples.get("sample_id", []) if count else []))
        losses, weight, count, asked_to_stop = means.over_processes(self.accelerator, self.stop.requested)
        if weight:
            scale = 1.0 if is_one_batch else self.run.batch_size_train * processes / weight
            norm = self._step(scale, losses["loss"])
            state.effort.samples += count
            self._count_time()
            if math.isfinite(norm) and math.isfinite(losses["loss"]):
                self._steps += 1
                self.watch.finite(state, losses["loss"], seen)
                numbers = {"lr": learning_rate, "grad_norm": norm}
                self.log.train_step(state, losses, numbers, count, group)
            else:
                self._left_out += 1
                self.watch.not_finite(state, losses["loss"], norm, seen, self.checkpointer.latest())
        self.optimizer.zero_grad(set_to_none=True)
        self._count_time()
        return asked_to_stop

    def _check_trained(self) -> None:
        """Raises `TrainingError` where there were iterations, and not one of them changed the weights."""
        if self._steps or self.state.iteration == self.plan.start:
            return
        self.skipped.check()
        cause = (
            f"the loss or the gradient of all {self._left_out} steps was not finite (not_finite.jsonl in "
            f"{self.folder} lists their samples). Lower run.init_lr, or start from other weights"
            if self._left_out
            else f"no training sample could be read; see skipped.jsonl in {self.folder}"
        )
        raise TrainingError(
            f"nothing was trained between iterations {self.plan.start} and {self.state.iteration}: {cause}. "
            f"The last checkpoint: {self.checkpointer.latest() or 'none yet'}."
        )

    def _count_time(self) -> None:
        """Adds the time since the last call, or since the epoch was begun, to that of training."""
        now = time.perf_counter()
        self.state.effort.seconds += now - self._clock
        self._clock = now

    def _step(self, scale: float, loss: float) -> float:
        """Scales and clips the gradient and moves the weights, unless a number is not finite. Returns the
        gradient's norm before clipping."""
        self.accelerator.unscale_gradients()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = scale * total_norm(gradients)
        factor = scale
        if self.run.max_grad_norm and norm > self.run.max_grad_norm:
            factor *= self.run.max_grad_norm / (norm + 1e-6)
        if factor != 1.0:
            multiply(gradients, factor)
        self.checkpointer.wait_for_copy()
        # fp16's scaler leaves such a step out itself, and learns from it
        if (math.isfinite(norm) and math.isfinite(loss)) or self.accelerator.scaler is not None:
            self.optimizer.step()
        return norm

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager:
        """Gradients are exchanged after the last batch of a step only."""
        return contextlib.nullcontext() if last else self.distribution.accumulating()

    def _learnable(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch whose samples that leave nothing to learn are among its ``skipped`` ones."""
        samples = {key: value for key, value in batch.items() if key != "skipped"}
        reasons = self.model.not_learnable(self.task.to_learn(samples)) if samples else {}
        if not reasons:
            return batch
        ids = samples.get("sample_id", [""] * batch_size(samples))
        skipped = [Skipped(None, ids[row], why, "nothing to learn") for row, why in reasons.items()]
        rest = rows_of(samples, [row for row in range(batch_size(samples)) if row not in reasons])
        return {**rest, "skipped": [*batch.get("skipped", []), *skipped]}

    def _stand_in(self) -> dict[str, Any]:
        """The batch before, where nothing of one could be read; for a run's first, any readable sample."""
        if self._last_samples is not None:
            return self._last_samples
        self.skipped.check()
        with seeded(self.run.seed):
            for name, dataset in self._trained.items():
                for sample in one_by_one(dataset):
                    batch = self._learnable(dataset.collater([sample]))
                    if not batch.pop("skipped", None):
                        return {**batch, "dataset": [name]}
        raise TrainingError(f"no training sample can be read; see {self.folder / 'skipped.jsonl'}.")

    def _save(self) -> None:
        if self.checkpointer.saved_iteration != self.state.iteration:
            own = {"skipped": self.skipped.to_json()}
            self.checkpointer.save(self.model, self.optimizer, self.state, own)

    def _save_and_stop(self) -> None:
        self.stop.in_time()
        self._save()
        self.checkpointer.wait()
        self.checkpointer.raise_problem()
        raise self.stop.interrupted(f"after {self.where()}; saved in {self.checkpointer.folder}")

    def _validate(self) -> bool:
        """Scores the validation splits where it is their turn; true for the best checkpoint so far."""
        state, run = self.state, self.run
        if not run.valid_splits:
            return True  # the newest is the best known
        if (state.epoch + 1) % run.valid_freq and not self.is_trained():
            return False
        with kept_random_state():
            scores = self.evaluate(run.valid_splits, state)
        # the first split decides; of several datasets that have it, their mean
        deciding = [m for key, m in scores.items() if key.rpartition("/")[2] == run.valid_splits[0]]
        if not all("agg_metrics" in m for m in deciding):
            logger.warning(
                "no best checkpoint is chosen: that takes `agg_metrics` (of captions: cider and bleu)"
            )
            return False
        metric = sum(m["agg_metrics"] for m in deciding) / len(deciding)
        is_best = state.best_metric is None or metric > state.best_metric
        if is_best:
            state.best_metric, state.best_epoch = metric, state.epoch + 1
        return is_best

    # ---- evaluation ----

    @torch.no_grad()
    def evaluate(self, splits: list[str], state: TrainingState | None = None) -> dict[str, dict[str, float]]:
        """Generates for every sample of the splits and scores: split name -> metrics (``dataset/split`` with
        several).

        Args:
            state: of the run that is being validated; None for a test.
        """
        scores = {}
        with workers_named():
            for name, by_split in self.datasets.items():
                for split in splits:
                    if split in by_split:
                        key = split if len(self.datasets) == 1 else f"{name}/{split}"
                        scores[key] = self._evaluate_split(by_split[split], split, key, state)
        return scores

    def _evaluate_split(
        self, dataset: Dataset, split: str, key: str, state: TrainingState | None
    ) -> dict[str, float]:
        accelerator, run = self.accelerator, self.run
        loader = eval_loader(
            dataset,
            run.batch_size_eval,
            run.num_workers,
            accelerator.device.type == "cuda",
            accelerator.process_index,
            accelerator.num_processes,
            run.max_eval_samples,
        )
        self.task.before_evaluation(dataset, split)
        was_training = self.model.training
        self.model.eval()
        results: list[dict[str, Any]] = []
        meter = ImageUseMeter(run.image_use_samples)
        started, broken = time.perf_counter(), self.skipped.anew()
        batches = self.log.progress(loader, f"evaluating {key}")
        with self.distribution.generating(), contextlib.suppress(StopNow):
            for batch in self.stop.heeding(batches, loader.num_workers > 0):
                if self.stop.requested:
                    break
                samples = broken.take_out(batch, None)
                if samples is not None:
                    with accelerator.autocast():
                        samples = to_device(samples, accelerator.device)
                        held_out = partial(self.task.held_out, dataset=dataset)
                        samples = meter.measure(self.model, samples, held_out)
                        results += self.task.valid_step(self.model, samples)
        if self.stop.requested:  # what was trained is saved
            where = f"while evaluating {key}; saved in {self.checkpointer.folder}"
            raise self.stop.interrupted(where)
        broken.add_up()
        broken.check()
        results = gather_object(results)
        use = meter.over_processes()
        self.model.train(was_training)
        metrics: dict[str, float] = {}
        if accelerator.is_main_process:
            label = validation_label(state)
            folder = self.folder / "result" / "_".join(x for x in (key.replace("/", "_"), label) if x)
            metrics = self.task.after_evaluation(results, dataset, split, folder)
            seconds = time.perf_counter() - started
            self.log.evaluation(key, state, metrics, len(results), broken.causes, seconds, use)
        return gather_object([metrics])[0]


@registry.register_runner("runner_iter")
class IterRunner(Runner):
    """Trains for ``max_iters`` iterations, in inner epochs of ``iters_per_inner_epoch``, whatever the data's
    size."""

    UNIT = "iterations"

    def length(self) -> tuple[int, int]:
        """Iterations of an inner epoch and of the whole run."""
        inner = self.run.iters_per_inner_epoch or self.run.max_iters
        return min(inner, self.run.max_iters), self.run.max_iters


@registry.register_runner("runner_timed")
class TimedRunner(Runner):
    """Trains for ``max_seconds``, in inner epochs of ``seconds_per_inner_epoch``, whatever number of
    iterations that is. Validation and start-up are not counted.

    The learning rate warms up by iteration and decays by time, so that it has come to its end when the
    seconds have. Such a run can be interrupted and resumed, but not repeated to the bit.
    """

    UNIT = "seconds"
    TICKS = 1_000_000  # "iterations" of the whole run, for the schedule: fine steps of time

    def length(self) -> tuple[int, int]:
        """Ticks of an inner epoch and of the whole run."""
        whole = self.run.max_seconds
        self.inner_seconds = min(self.run.seconds_per_inner_epoch or whole, whole)
        self.num_epochs = math.ceil(whole / self.inner_seconds - 1e-9)
        return max(1, round(self.TICKS * self.inner_seconds / whole)), self.TICKS

    def left_in_epoch(self) -> int:
        """A step's iterations, until the time is up."""
        end = min(self.run.max_seconds, (self.state.epoch + 1) * self.inner_seconds)
        return self.run.accum_grad_iters if self.state.effort.seconds < end else 0

    def is_trained(self) -> bool:
        return self.state.effort.seconds >= self.run.max_seconds

    def is_done(self) -> bool:
        return self.state.epoch >= self.num_epochs

    def reached_epoch(self) -> int:
        """The one that the time is in: an iteration may outlast a whole inner epoch."""
        return int(self.state.effort.seconds // self.inner_seconds)

    def next_epoch(self) -> int:
        return self.num_epochs if self.is_trained() else super().next_epoch()

    def learning_rate(self) -> float:
        iteration, share = self.state.iteration, self.state.effort.seconds / self.run.max_seconds
        if iteration < self.run.warmup_steps:
            return self.schedule(iteration)
        return self.schedule(max(self.run.warmup_steps, int(share * self.TICKS)))

    def where(self) -> str:
        seconds, all_seconds = self.state.effort.seconds, self.run.max_seconds
        return f"iteration {self.state.iteration}, {seconds:.1f} of {all_seconds:g} s"

    def _shown_total(self) -> None:
        return None

    def _count_time(self) -> None:
        super()._count_time()
        if self.accelerator.num_processes > 1:  # all must end at the same iteration: the first one's clock
            seconds = [self.state.effort.seconds]
            broadcast_object_list(seconds)
            self.state.effort.seconds = seconds[0]
