"""LAVIS's three learning-rate schedules as pure functions of the iteration.

LAVIS warms up by step within the first epoch and then moves by epoch; these move by iteration throughout.
"""

from __future__ import annotations

import dataclasses
import math

from evlgen.common.registry import registry


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate at each iteration: linear from ``warmup_lr`` to ``init_lr`` over ``warmup_steps``,
    then `after_warmup`.

    Args:
        total_iters: iterations of the whole run.
        iters_per_epoch: iterations of an (inner) epoch.
        init_lr, min_lr, warmup_lr: learning rates.
        warmup_steps: iterations of warm-up.
        decay_rate: factor per epoch, for the step schedule.
    """

    total_iters: int
    iters_per_epoch: int
    init_lr: float
    min_lr: float = 0.0
    warmup_lr: float = 0.0
    warmup_steps: int = 0
    decay_rate: float = 1.0

    def __call__(self, iteration: int) -> float:
        """The learning rate of iteration ``iteration`` (from 0)."""
        if iteration < self.warmup_steps:
            return self.warmup_lr + (self.init_lr - self.warmup_lr) * iteration / self.warmup_steps
        return self.after_warmup(iteration)

    def after_warmup(self, iteration: int) -> float:
        raise NotImplementedError


@registry.register_lr_scheduler("linear_warmup_cosine_lr")
class CosineSchedule(Schedule):
    """Half a cosine from ``init_lr`` at iteration 0 to ``min_lr`` at the end."""

    def after_warmup(self, iteration: int) -> float:
        share = min(1.0, iteration / max(1, self.total_iters))
        return self.min_lr + (self.init_lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * share))


@registry.register_lr_scheduler("linear_warmup_step_lr")
class StepSchedule(Schedule):
    """``init_lr`` times ``decay_rate`` once for each epoch done, ``min_lr`` at least."""

    def after_warmup(self, iteration: int) -> float:
        return max(self.min_lr, self.init_lr * self.decay_rate ** (iteration // max(1, self.iters_per_epoch)))


@registry.register_lr_scheduler("constant_lr")
class ConstantSchedule(Schedule):
    """``init_lr`` throughout."""

    def after_warmup(self, iteration: int) -> float:
        return self.init_lr
