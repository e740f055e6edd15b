"""Losses that go wrong: jumps are noted, and numbers that are not finite stop a run before they reach the
weights."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from evlgen.common.errors import TrainingError
from evlgen.config.run_config import RunConfig
from evlgen.runners.listener import Listener, Step, TrainingRun
from evlgen.runners.training_state import TrainingState

logger = logging.getLogger(__name__)

_MEMORY = 0.98  # weight of the past in the running mean and variance of the loss
_LEARNING = 100  # optimizer steps before jumps are judged
_SHOWN = 16  # sample ids in a message; the files list all


class LossWatch(Listener):
    """Compares every optimizer step's loss with the recent ones. All processes call it with the same numbers.

    Args:
        folder: where ``spikes.jsonl`` and ``not_finite.jsonl`` list the samples; every process writes its
            own.
        run: ``spike_sigmas``, ``max_nonfinite_steps``.
    """

    def __init__(self, folder: Path, run: RunConfig, accelerator: Accelerator) -> None:
        self.folder, self.run, self.accelerator = folder, run, accelerator
        # without the short range or resolution of half precision there is no innocent way to such a number
        self.tolerant = accelerator.mixed_precision != "no"
        self._trained, self._left_out = 0, 0  # steps of this process's life

    def after_step(self, runner: TrainingRun, step: Step) -> None:
        if step.is_finite:
            self._trained += 1
            self.finite(runner.state, step.losses["loss"], step.seen)
        elif step.losses:
            self._left_out += 1
            last_good = runner.checkpointer.latest()
            self.not_finite(runner.state, step.losses["loss"], step.grad_norm, step.seen, last_good)

    def after_epoch(self, runner: TrainingRun) -> None:
        """Raises `TrainingError` where the run ends, there were iterations, and not one of them changed the
        weights."""
        state, start = runner.state, runner.plan.start
        if self._trained or state.iteration == start or not runner.length.is_trained(state):
            return
        runner.skipped.check()
        cause = (
            f"the loss or the gradient of all {self._left_out} steps was not finite (not_finite.jsonl in "
            f"{self.folder} lists their samples). Lower run.init_lr, or start from other weights"
            if self._left_out
            else f"no training sample could be read; see skipped.jsonl in {self.folder}"
        )
        raise TrainingError(
            f"nothing was trained between iterations {start} and {state.iteration}: {cause}. "
            f"The last checkpoint: {runner.checkpointer.latest() or 'none yet'}."
        )

    def finite(self, state: TrainingState, loss: float, seen: list[tuple[Tensor, list[str]]]) -> None:
        """Remembers a step's loss, and notes one far above the recent ones.

        Args:
            state: holds the running mean and variance.
            loss: of the whole step, on all processes.
            seen: of this process: each batch's loss and sample ids.
        """
        state.nonfinite_in_row = 0
        deviation = math.sqrt(state.loss_variance)
        limit = state.loss_mean + (self.run.spike_sigmas or math.inf) * deviation
        if state.loss_steps < _LEARNING or loss <= limit:
            _remember(state, loss)
            return
        logger.warning(
            "the loss jumped to %.4f at iteration %d (of late %.4f ± %.4f); its samples are in %s",
            loss,
            state.iteration,
            state.loss_mean,
            deviation,
            self.folder / "spikes.jsonl",
        )
        numbers = {"loss": loss, "mean": state.loss_mean, "deviation": deviation}
        self._list("spikes.jsonl", state, numbers, seen)
        _remember(state, limit)

    def not_finite(
        self,
        state: TrainingState,
        loss: float,
        norm: float,
        seen: list[tuple[Tensor, list[str]]],
        last_good: Path | None,
    ) -> None:
        """Counts a step whose loss or gradient is not finite, which the caller leaves out.

        Raises:
            TrainingError: in fp32, or when too many came in a row in half precision; names the samples.
        """
        self._list("not_finite.jsonl", state, {"loss": str(loss), "grad_norm": str(norm)}, seen)
        state.nonfinite_in_row += 1
        state.nonfinite_steps += 1
        guilty = gather_object([n for value, names in seen if not value.isfinite() for n in names])
        guilty = guilty or gather_object([n for _, names in seen for n in names])
        shown = f"{guilty[:_SHOWN]}{' and others' if len(guilty) > _SHOWN else ''}"
        what = f"the loss became {loss}" if not math.isfinite(loss) else f"the gradient's norm became {norm}"
        what = f"{what} at iteration {state.iteration}"
        if self.tolerant and state.nonfinite_in_row < self.run.max_nonfinite_steps:
            logger.warning("%s, with samples %s: the step is left out", what, shown)
            return
        row = f" ({state.nonfinite_in_row} such steps in a row)" if self.tolerant else ""
        raise TrainingError(
            f"{what}{row}, with samples {shown}. The last good checkpoint is {last_good or 'none yet'}. "
            "Lower run.init_lr, set run.max_grad_norm, or look at these samples."
        )

    def _list(
        self, name: str, state: TrainingState, numbers: dict[str, Any], seen: list[tuple[Tensor, list[str]]]
    ) -> None:
        own = [{"loss": str(value.item()), "samples": names} for value, names in seen]
        record = {"iteration": state.iteration, **numbers, "process": self.accelerator.process_index}
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps({**record, "batches": own}) + "\n")


def _remember(state: TrainingState, loss: float) -> None:
    """Exponential mean and variance; the first steps weigh as in a plain mean."""
    state.loss_steps += 1
    share = max(1 - _MEMORY, 1 / state.loss_steps)
    difference = loss - state.loss_mean
    state.loss_mean += share * difference
    state.loss_variance = (1 - share) * (state.loss_variance + share * difference * difference)
