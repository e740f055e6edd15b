"""Evaluating a split: every sample to the task, whose results are scored."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Mapping
from functools import partial

from evlgen.datasets.base_dataset import BaseDataset
from evlgen.loaders.data import eval_loader, evenly_spread, to_device
from evlgen.loaders.interruption import StopNow
from evlgen.runners.batches import set_aside
from evlgen.runners.gathering import gather_records
from evlgen.runners.listener import Evaluation, TrainingRun
from evlgen.vision_cache.cache import cached

logger = logging.getLogger(__name__)


def evaluate_split(runner: TrainingRun, evaluation: Evaluation) -> None:
    """Generates for every sample of a split and scores: fills in ``evaluation``, on all processes.

    Raises:
        Interrupted: a stop was requested.
        TrainingError: too many samples cannot be read.
    """
    run, accelerator, task = runner.run, runner.accelerator, runner.task
    dataset = evaluation.dataset
    on_gpu = accelerator.device.type == "cuda"
    rank, processes = accelerator.process_index, accelerator.num_processes
    was_training = runner.model.training
    limit = run.max_eval_samples
    if evaluation.state is not None:  # a validation
        limit = run.max_valid_samples or limit
    shown = _with_kept_tokens(runner, evaluation, limit) if run.cache_vision_eval else dataset
    loader = eval_loader(shown, run.batch_size_eval, run.num_workers, on_gpu, rank, processes, limit)
    task.before_evaluation(dataset, evaluation.split)
    runner.model.eval()
    started, skipped = time.perf_counter(), runner.skipped.fresh_counter()
    runner.notify("before_evaluation", evaluation)
    batches = runner.log.progress(loader, f"evaluating {evaluation.key}")
    with runner.distribution.generating(), contextlib.suppress(StopNow):
        for batch in runner.stop.heeding(batches, loader.num_workers > 0):
            if runner.stop.requested:
                break
            batch = set_aside(batch, partial(task.not_answerable, runner.model), "cannot be answered")
            samples = skipped.pop_skipped(batch, None)
            if samples is None:
                continue
            with accelerator.autocast():
                samples = to_device(samples, accelerator.device)
                for listener in runner.listeners:
                    samples = listener.before_answers(runner, evaluation, samples) or samples
                evaluation.results += task.valid_step(runner.model, samples)
    if runner.stop.requested:  # what was trained is saved
        where = f"while evaluating {evaluation.key}; saved in {runner.checkpointer.folder}"
        raise runner.stop.interrupted(where)
    skipped.add_up()
    skipped.check()
    evaluation.skipped = skipped.causes
    with runner.distribution.generating(), accelerator.autocast():
        evaluation.results = task.finish_evaluation(runner.model, evaluation.results, dataset)
    evaluation.results = gather_records(evaluation.results)
    runner.model.train(was_training)
    if accelerator.is_main_process:
        folder = runner.folder / "result" / evaluation.name
        evaluation.metrics = task.after_evaluation(evaluation.results, dataset, evaluation.split, folder)
    evaluation.metrics = gather_records([evaluation.metrics])[0]
    evaluation.seconds = time.perf_counter() - started
    runner.notify("after_evaluation", evaluation)


def _with_kept_tokens(runner: TrainingRun, evaluation: Evaluation, limit: int | None) -> BaseDataset:
    """The dataset of an evaluation with visual tokens in place of images, computed the first time: those of
    the samples that are evaluated."""
    kept, key = runner.kept_tokens, evaluation.key
    samples = evenly_spread(len(evaluation.dataset), limit)
    place = (key, len(samples))
    if place not in kept:
        runner.model.eval()
        with runner.distribution.generating():
            found = cached(
                {key: evaluation.dataset},
                runner.model,
                runner.run,
                runner.accelerator,
                runner.stop,
                "run.cache_vision_eval",
                samples,
            )
        kept[place] = found[key]
    return kept[place]


def deciding_metric(scores: Mapping[str, Mapping[str, float]], split: str) -> float | None:
    """What the best checkpoint is chosen by: ``agg_metrics`` of a split, of several datasets that have it
    their mean; None where it was not computed."""
    deciding = [metrics for key, metrics in scores.items() if key.rpartition("/")[2] == split]
    if not all("agg_metrics" in metrics for metrics in deciding):
        logger.warning("no best checkpoint is chosen: that takes `agg_metrics` (of captions: cider and bleu)")
        return None
    mean = sum(metrics["agg_metrics"] for metrics in deciding) / len(deciding)
    if not math.isfinite(mean):  # no later one would be above it
        logger.warning("no best checkpoint is chosen: `agg_metrics` of '%s' is %s", split, mean)
        return None
    return mean
