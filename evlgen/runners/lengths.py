"""How long a run trains: in epochs, iterations or seconds, and which (inner) epoch it is in."""

from __future__ import annotations

import logging
import math

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from evlgen.common.lr_schedules import Schedule
from evlgen.config.run_config import RunConfig
from evlgen.runners.training_state import TrainingState

logger = logging.getLogger(__name__)


def length_of(run: RunConfig, batches_per_epoch: int | None) -> Epochs:
    """The length that a run's settings give it.

    Args:
        batches_per_epoch: of this process; None where the data has no end, whose length is not in epochs.
    """
    if run.max_seconds:
        inner = min(run.seconds_per_inner_epoch or run.max_seconds, run.max_seconds)
        return Seconds(run.max_seconds, inner, run.warmup_steps, run.accum_grad_iters)
    if run.max_iters:
        return Iterations(min(run.iters_per_inner_epoch or run.max_iters, run.max_iters), run.max_iters)
    iters_per_epoch = batches_per_epoch or 0
    return Epochs(iters_per_epoch, iters_per_epoch * (run.max_epoch or 0))


class Epochs:
    """``run.max_epoch``: passes through the data.

    Args:
        iters_per_epoch: iterations (ticks, of seconds) of an (inner) epoch.
        total_iters: of the whole run.

    Attributes:
        shown_total: iterations of the whole run, None where unknown.
    """

    UNIT, KEY = "epochs", "max_epoch"

    def __init__(self, iters_per_epoch: int, total_iters: int) -> None:
        self.iters_per_epoch, self.total_iters = iters_per_epoch, total_iters
        self.shown_total: int | None = total_iters

    def left_in_epoch(self, state: TrainingState) -> int:
        """How many iterations may follow before the (inner) epoch that ``state`` is in ends."""
        end = min(self.total_iters, (state.epoch + 1) * self.iters_per_epoch)
        return max(0, end - state.iteration)

    def is_trained(self, state: TrainingState) -> bool:
        """Whether the last iteration is done; its validation may be to come."""
        return state.iteration >= self.total_iters

    def is_done(self, state: TrainingState) -> bool:
        """Whether the last (inner) epoch is trained and validated."""
        return state.epoch * self.iters_per_epoch >= self.total_iters

    def reached_epoch(self, state: TrainingState) -> int:
        """The (inner) epoch that what is trained falls in, were all of them as long as now."""
        return state.iteration // self.iters_per_epoch

    def next_epoch(self, state: TrainingState) -> int:
        """The (inner) epoch after the one that has just been validated."""
        return max(state.epoch + 1, self.reached_epoch(state))

    def learning_rate(self, schedule: Schedule, state: TrainingState) -> float:
        """Of the next optimizer step."""
        return schedule(state.iteration)

    def where(self, state: TrainingState) -> str:
        """How far training is, for messages."""
        return f"iteration {state.iteration} of {self.total_iters}"

    def agree(self, state: TrainingState, accelerator: Accelerator) -> None:
        """Makes what the length is counted in the same on all processes."""

    def find_epoch(self, state: TrainingState) -> None:
        """Sets the (inner) epoch that a resumed run is in, where they are of another length than before: it
        is counted in other units, or batches are larger, or a run that had ended goes on for longer."""
        reached = self.reached_epoch(state)
        is_other = state.unit not in (self.UNIT, "")
        if is_other:
            logger.info("the length of training was counted in %s, and is in %s", state.unit, self.UNIT)
        has_all_epochs = self.is_done(state) and state.unit == self.UNIT == Epochs.UNIT
        is_cut_short = self.is_done(state) and not self.is_trained(state)
        if is_other or ((is_cut_short or abs(state.epoch - reached) > 1) and not has_all_epochs):
            state.epoch = reached
        state.unit = self.UNIT
        if self.is_done(state):
            where = self.where(state)
            logger.info("nothing is left to train: %s. Raise run.%s to train on", where, self.KEY)


class Iterations(Epochs):
    """``run.max_iters``, in inner epochs of ``iters_per_inner_epoch``, whatever the data's size."""

    UNIT, KEY = "iterations", "max_iters"


class Seconds(Epochs):
    """``run.max_seconds``, in inner epochs of ``seconds_per_inner_epoch``, whatever number of iterations that
    is. Validation and start-up are not counted.

    The learning rate warms up by iteration and decays by time, so that it has come to its end when the
    seconds have. Such a run can be interrupted and resumed, but not repeated to the bit.

    Args:
        seconds: of the whole run.
        inner_seconds: of an inner epoch.
        warmup_steps: iterations of the learning rate's warm-up.
        step_iters: iterations of an optimizer step.
    """

    UNIT, KEY = "seconds", "max_seconds"
    TICKS = 1_000_000  # "iterations" of the whole run, for the schedule: fine steps of time

    def __init__(self, seconds: float, inner_seconds: float, warmup_steps: int, step_iters: int) -> None:
        super().__init__(max(1, round(self.TICKS * inner_seconds / seconds)), self.TICKS)
        self.seconds, self.inner_seconds, self.shown_total = seconds, inner_seconds, None
        self.num_epochs = math.ceil(seconds / inner_seconds - 1e-9)
        self.warmup_steps, self.step_iters = warmup_steps, step_iters

    def left_in_epoch(self, state: TrainingState) -> int:
        """A step's iterations, until the time is up."""
        end = min(self.seconds, (state.epoch + 1) * self.inner_seconds)
        return self.step_iters if state.effort.seconds < end else 0

    def is_trained(self, state: TrainingState) -> bool:
        return state.effort.seconds >= self.seconds

    def is_done(self, state: TrainingState) -> bool:
        return state.epoch >= self.num_epochs

    def reached_epoch(self, state: TrainingState) -> int:
        """The epoch the elapsed time falls in: an iteration may outlast a whole inner epoch."""
        return int(state.effort.seconds // self.inner_seconds)

    def next_epoch(self, state: TrainingState) -> int:
        return self.num_epochs if self.is_trained(state) else super().next_epoch(state)

    def learning_rate(self, schedule: Schedule, state: TrainingState) -> float:
        if state.iteration < self.warmup_steps:
            return schedule(state.iteration)
        fraction = state.effort.seconds / self.seconds
        return schedule(max(self.warmup_steps, int(fraction * self.TICKS)))

    def where(self, state: TrainingState) -> str:
        seconds, all_seconds = state.effort.seconds, self.seconds
        return f"iteration {state.iteration}, {seconds:.1f} of {all_seconds:g} s"

    def agree(self, state: TrainingState, accelerator: Accelerator) -> None:
        """All processes must end at the same iteration: by the first one's clock."""
        if accelerator.num_processes > 1:
            seconds = [state.effort.seconds]
            broadcast_object_list(seconds)
            state.effort.seconds = seconds[0]
