"""The training loop: accelerate moves, casts and distributes; this file says what happens when."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, set_seed
from torch.utils.data import Dataset

from evlgen.common.errors import ConfigError, TrainingError, did_you_mean
from evlgen.common.precision import resolve_precision
from evlgen.common.registry import registry
from evlgen.models.base_model import BaseModel
from evlgen.runners.data import BatchPlan, eval_loader, seeded, train_loader
from evlgen.runners.optimizer import build_optimizer
from evlgen.runners.progress import RunLog, SkippedSamples
from evlgen.runners.run_config import RunConfig
from evlgen.runners.training_state import Checkpointer, TrainingState
from evlgen.tasks.base_task import BaseTask

logger = logging.getLogger(__name__)

_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


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

    def __init__(
        self,
        run: RunConfig,
        task: BaseTask,
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
        self.model = model.to(self.accelerator.device)
        self.log = RunLog(folder, run, enabled=self.accelerator.is_main_process)
        self.skipped = SkippedSamples(folder, run.max_skipped_share)
        self.checkpointer = Checkpointer(folder / "checkpoints", run.keep_last, config or {})

    # ---- training ----

    def train(self) -> dict[str, dict[str, float]]:
        """Trains, then tests the best checkpoint (the last one where nothing was validated).

        Returns:
            split name -> metrics, of the test splits.

        Raises:
            TrainingError: a loss that is not finite; too many broken samples.
        """
        self._set_up_training()
        state = self.state
        if state.iteration:
            logger.info("resuming after iteration %d of %d", state.iteration, self.total_iters)
        batches = iter(self._loader)
        self.log.start_training(self.total_iters, state.iteration)
        while state.iteration < self.total_iters:
            self._train_epoch(batches)
            state.epoch += 1
            self._validate_and_save()
        self.log.end_training()
        if not self.run.test_splits:
            return {}
        self.model.load_checkpoint(self.checkpointer.best_or_latest())
        return self.evaluate(self.run.test_splits)

    def _set_up_training(self) -> None:
        run, accelerator = self.run, self.accelerator
        named = [
            (name, dataset)
            for name, splits in self.datasets.items()
            for split, dataset in splits.items()
            if split in run.train_splits
        ]
        trained = self._trained = [dataset for _, dataset in named]
        self.plan = BatchPlan(
            [len(d) for d in trained],
            run.batch_size_train,
            run.seed,
            ratios=self._ratios(named),
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
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
        optimizer = build_optimizer(self.model, run.init_lr, run.weight_decay, run.beta2)
        self.wrapped, self.optimizer = accelerator.prepare(self.model, optimizer)
        self.state = TrainingState()
        self._last_samples: dict[str, Any] | None = None
        if run.resume:
            self.checkpointer.resume(run.resume, self.model, self.optimizer, self.state, accelerator)
        self.plan.start = self.state.iteration
        self._loader = train_loader(trained, self.plan, run.num_workers, accelerator.device.type == "cuda")

    def length(self) -> tuple[int, int]:
        """Iterations of an epoch and of the whole run."""
        return self.plan.batches_per_epoch, self.plan.batches_per_epoch * self.run.max_epoch

    def _train_epoch(self, batches: Iterator[dict[str, Any]]) -> None:
        end = min(self.total_iters, (self.state.epoch + 1) * self.iters_per_epoch)
        self.wrapped.train()
        self.log.resume_clock()
        while self.state.iteration < end:
            group = min(self.run.accum_grad_iters, end - self.state.iteration)
            self._train_group(batches, group)

    def _train_group(self, batches: Iterator[dict[str, Any]], group: int) -> None:
        """One optimizer step over ``group`` batches."""
        learning_rate = self.schedule(self.state.iteration)
        for params in self.optimizer.param_groups:
            params["lr"] = learning_rate
        for position in range(group):
            samples = self.skipped.take_out(next(batches), self.state.iteration)
            self.state.iteration += 1
            weight = 1.0
            if samples is None:  # all broken: every process must still take part in the step, with no weight
                samples, weight = self._stand_in(), 0.0
            self._last_samples = samples
            losses = self._backward(samples, weight / group, last=position == group - 1)
            self.log.train_step(self.state, losses, learning_rate, self._global_batch(samples))
        if self.run.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.run.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _stand_in(self) -> dict[str, Any]:
        """The batch before, where nothing of one could be read; for a run's first, any readable sample."""
        if self._last_samples is not None:
            return self._last_samples
        self.skipped.check()
        with seeded(self.run.seed):
            for dataset in self._trained:
                for index in range(len(dataset)):
                    batch = dataset.collater([dataset[index]])
                    if not batch.pop("skipped", None):
                        return batch
        raise TrainingError(f"no training sample can be read; see {self.folder / 'skipped.jsonl'}.")

    def _backward(self, samples: dict[str, Any], weight: float, last: bool) -> dict[str, float]:
        """Adds a batch's gradients times a weight, and returns its losses as numbers."""
        samples = to_device(samples, self.accelerator.device)
        if last:
            losses = self.task.train_step(self.wrapped, samples)
            self.accelerator.backward(losses["loss"] * weight)
        else:
            with self.accelerator.no_sync(self.wrapped):
                losses = self.task.train_step(self.wrapped, samples)
                self.accelerator.backward(losses["loss"] * weight)
        numbers = {name: float(value.detach()) for name, value in losses.items()}
        if not torch.isfinite(torch.tensor(numbers["loss"])):
            raise TrainingError(
                f"the loss became {numbers['loss']} at iteration {self.state.iteration}, with samples "
                f"{samples.get('instance_id', samples.get('image_id', '?'))}. The last good checkpoint is "
                f"{self.checkpointer.latest() or 'none yet'}. Lower run.init_lr, set run.max_grad_norm, or "
                "look at these samples."
            )
        return numbers

    def _validate_and_save(self) -> None:
        state, run = self.state, self.run
        is_best = not run.valid_splits  # where nothing is validated, the newest is the best known
        is_last = state.iteration >= self.total_iters
        if run.valid_splits and (state.epoch % run.valid_freq == 0 or is_last):
            scores = self.evaluate(run.valid_splits, f"epoch{state.epoch}")
            # the first split decides; of several datasets that have it, their mean
            deciding = [m for key, m in scores.items() if key.rpartition("/")[2] == run.valid_splits[0]]
            if not all("agg_metrics" in m for m in deciding):
                logger.warning(
                    "no best checkpoint is chosen: that takes `agg_metrics` (of captions: cider and bleu)"
                )
            else:
                metric = sum(m["agg_metrics"] for m in deciding) / len(deciding)
                is_best = state.best_metric is None or metric > state.best_metric
                if is_best:
                    state.best_metric, state.best_epoch = metric, state.epoch
        self.checkpointer.save(self.accelerator, self.model, self.optimizer, state, is_best)

    def _ratios(self, named: list[tuple[str, Dataset]]) -> list[float] | None:
        """The weight of each training split: its dataset's ratio, shared by size among its splits."""
        given = self.run.train_dataset_ratios
        if not given:
            return None
        sizes: dict[str, int] = {}
        for name, dataset in named:
            sizes[name] = sizes.get(name, 0) + len(dataset)
        for name in given:
            if name not in sizes:
                raise ConfigError(
                    f"run.train_dataset_ratios names '{name}', which is not trained on in this run."
                    f"{did_you_mean(name, sizes)}"
                )
        return [given.get(name, 0.0) * len(dataset) / sizes[name] for name, dataset in named]

    # ---- evaluation ----

    @torch.no_grad()
    def evaluate(self, splits: list[str], label: str = "") -> dict[str, dict[str, float]]:
        """Generates for every sample of the splits and scores: split name -> metrics (``dataset/split`` with
        several)."""
        scores = {}
        for name, by_split in self.datasets.items():
            for split in splits:
                if split in by_split:
                    key = split if len(self.datasets) == 1 else f"{name}/{split}"
                    scores[key] = self._evaluate_split(by_split[split], split, key, label)
        return scores

    def _evaluate_split(self, dataset: Dataset, split: str, key: str, label: str) -> dict[str, float]:
        accelerator, run = self.accelerator, self.run
        loader = eval_loader(
            dataset,
            run.batch_size_eval,
            run.num_workers,
            accelerator.device.type == "cuda",
            accelerator.process_index,
            accelerator.num_processes,
        )
        was_training = self.model.training
        self.model.eval()
        results: list[dict[str, Any]] = []
        started, broken_before = time.perf_counter(), self.skipped.broken
        for batch in self.log.progress(loader, f"evaluating {key}"):
            samples = self.skipped.take_out(batch, None)
            if samples is not None:
                with accelerator.autocast():
                    results += self.task.valid_step(self.model, to_device(samples, accelerator.device))
        self.skipped.check()
        results = gather_object(results)
        skipped = sum(gather_object([self.skipped.broken - broken_before]))
        self.model.train(was_training)
        metrics: dict[str, float] = {}
        if accelerator.is_main_process:
            folder = self.folder / "result" / "_".join(x for x in (key.replace("/", "_"), label) if x)
            metrics = self.task.after_evaluation(results, dataset, split, folder)
            self.log.evaluation(key, label, metrics, len(results), skipped, time.perf_counter() - started)
        return gather_object([metrics])[0]

    # ---- helpers ----

    def _global_batch(self, samples: dict[str, Any]) -> int:
        first = samples.get("image", samples.get("text_input"))
        return len(first) * self.accelerator.num_processes


@registry.register_runner("runner_iter")
class IterRunner(Runner):
    """Trains for ``max_iters`` iterations, in inner epochs of ``iters_per_inner_epoch``, whatever the data's
    size."""

    def length(self) -> tuple[int, int]:
        """Iterations of an inner epoch and of the whole run."""
        inner = self.run.iters_per_inner_epoch or self.run.max_iters
        return min(inner, self.run.max_iters), self.run.max_iters


def make_accelerator(run: RunConfig) -> Accelerator:
    """The accelerator of a run, its precision as the device computes it."""
    cpu = not torch.accelerator.is_available()  # said outright, or accelerate would not distribute on CPUs
    # the others wait while the first process scores, and METEOR and SPICE may take long
    state = PartialState(cpu=cpu, timeout=datetime.timedelta(hours=6))
    if not state.is_main_process:
        logging.getLogger("evlgen").setLevel(logging.WARNING)
    precision = resolve_precision(run.precision, state.device)
    torch.backends.cuda.matmul.allow_tf32 = run.allow_tf32
    torch.backends.cudnn.allow_tf32 = run.allow_tf32
    torch.use_deterministic_algorithms(run.deterministic, warn_only=True)
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    return Accelerator(mixed_precision=_PRECISIONS[precision], cpu=cpu)


def to_device(samples: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Moves the tensors of a batch."""
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in samples.items()
    }
