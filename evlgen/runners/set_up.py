"""What a run trains with, made before its first step."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from evlgen.common.registry import registry
from evlgen.datasets.records import digest
from evlgen.loaders.data import train_loader
from evlgen.loaders.mixed_plan import make_plan, recorded, split_ratios
from evlgen.runners.batches import TrainingBatches
from evlgen.runners.encoding_ahead import EncodedAhead
from evlgen.runners.lengths import length_of
from evlgen.runners.optimizer import build_optimizer
from evlgen.runners.training_state import TrainingState
from evlgen.runners.weight_average import WeightAverage
from evlgen.vision_cache.cache import cached

if TYPE_CHECKING:
    from evlgen.runners.listener import TrainingRun

logger = logging.getLogger(__name__)


def set_up_training(runner: TrainingRun) -> None:
    """Gives a runner its plan, length, schedule, optimizer, state and batches; a resumed run stands where it
    stopped."""
    run, accelerator = runner.run, runner.accelerator
    trained = {
        (name if len(run.train_splits) == 1 else f"{name}/{split}"): (name, dataset)
        for name, splits in runner.datasets.items()
        for split, dataset in splits.items()
        if split in run.train_splits
    }
    datasets = {key: dataset for key, (_, dataset) in trained.items()}
    for splits in runner.datasets.values():
        for split in dict.fromkeys([*run.valid_splits, *run.test_splits]):
            if split in splits:
                runner.task.check_split(runner.model, splits[split], split)
    runner.task.before_training(datasets, runner.distribution)
    ratios = split_ratios(run.train_dataset_ratios, list(trained.values()))
    rank, processes = accelerator.process_index, accelerator.num_processes
    runner.plan = make_plan(
        list(datasets.values()),
        run.batch_size_train,
        run.seed,
        ratios,
        rank,
        processes,
        has_epochs=bool(run.max_epoch),
        group_by_length=run.group_by_length,
    )
    runner.length = length_of(run, runner.plan.batches_per_epoch)
    runner.schedule = registry.get_lr_scheduler_class(run.lr_sched)(
        total_iters=runner.length.total_iters,
        iters_per_epoch=runner.length.iters_per_epoch,
        init_lr=run.init_lr,
        min_lr=run.min_lr,
        warmup_lr=run.warmup_lr,
        warmup_steps=run.warmup_steps,
        decay_rate=run.lr_decay_rate or 1.0,
    )
    optimizer = build_optimizer(runner.model, run.init_lr, run.weight_decay, run.beta2, run.lr_scale)
    runner.optimizer = accelerator.prepare(optimizer)
    sizes = {"samples": runner.plan.lengths, "batch_size": run.batch_size_train, "processes": processes}
    runner.state = TrainingState(
        unit=runner.length.UNIT,
        data={**sizes, **recorded(datasets.values()), **({"grouped": True} if run.group_by_length else {})},
        records={name: digest(getattr(d, "records", ())) for name, d in datasets.items()},
    )
    if run.ema_decay is not None:
        runner.average = runner.checkpointer.average = WeightAverage(runner.model, run.ema_decay)
    if run.resume:
        own = runner.checkpointer.resume(run.resume, runner.model, runner.optimizer, runner.state)
        runner.skipped.restore((own or {}).get("skipped", {}))
        if runner.state.iteration:
            logger.info("resuming after %s", runner.where())
    runner.plan.start = runner.state.iteration
    if run.cache_vision:
        datasets = cached(datasets, runner.model, run, accelerator, runner.stop)
    loader = train_loader(datasets, runner.plan, run.num_workers, accelerator.device.type == "cuda")
    batches = runner.stop.heeding(loader, loader.num_workers > 0)
    if run.encode_ahead:
        batches = EncodedAhead(batches, runner.model)
    runner.batches = TrainingBatches(
        batches, datasets, runner.model, runner.task, runner.skipped, processes, run.seed
    )
