"""What a run tells: a progress bar on a terminal, plain lines elsewhere, TensorBoard and ``log.jsonl``."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evlgen.common.safe_text import printable
from evlgen.config.run_config import RunConfig
from evlgen.files.io import write_atomically
from evlgen.runners.listener import Evaluation, Listener, Step, TrainingRun
from evlgen.runners.sample_captions import SAMPLES_FILE
from evlgen.runners.skipped import format_counts
from evlgen.runners.training_state import TrainingState

logger = logging.getLogger(__name__)


class RunLog(Listener):
    """Writes a run's numbers; does nothing on processes other than the first.

    Args:
        folder: where ``log.jsonl`` and ``tensorboard/`` go.
        run: the ``run`` section (``log_freq``, ``tensorboard``).
        enabled: false on other processes.
    """

    def __init__(self, folder: Path, run: RunConfig, enabled: bool) -> None:
        self.folder, self.run, self.enabled = folder, run, enabled
        self.terminal = enabled and sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._board: Any = None
        self._step = 0  # the last iteration on the board: a test is of no iteration
        if enabled:
            folder.mkdir(parents=True, exist_ok=True)

    def before_training(self, runner: TrainingRun) -> None:
        """Begins the bar and the clock. What the log says of later than now is taken out of it: that is
        trained again."""
        if not self.enabled:
            return
        state, self._total = runner.state, runner.length.shown_total
        if self.run.resume:
            for name in (*("log.jsonl", "skipped.jsonl", "spikes.jsonl", "not_finite.jsonl"), SAMPLES_FILE):
                _forget_later(self.folder / name, state)
        self._open_board(state.iteration + 1)
        self._resume_clock(state)
        if self.terminal:
            self._bar = tqdm(
                total=self._total, initial=state.iteration, desc="training", unit="it", dynamic_ncols=True
            )

    def before_epoch(self, runner: TrainingRun) -> None:
        self._resume_clock(runner.state)

    def _resume_clock(self, state: TrainingState) -> None:
        """Leaves what happened since the last line (a validation) out of the next one's speed."""
        self._last, self._samples, self._from = time.perf_counter(), 0, state.iteration

    def after_step(self, runner: TrainingRun, step: Step) -> None:
        """Every ``log_freq`` iterations writes the mean loss since the last line."""
        if not self.enabled or not step.is_finite:
            return
        state = runner.state
        state.logged_sum += step.losses["loss"]
        state.logged_steps += 1
        self._samples += step.samples
        if self._bar is not None:
            self._bar.update(state.iteration - self._bar.n)
        if state.iteration % self.run.log_freq >= step.iterations and state.iteration != self._total:
            return
        seconds = time.perf_counter() - self._last
        others = {name: value for name, value in step.losses.items() if name != "loss"}
        record = {
            "type": "train",
            "iteration": state.iteration,
            "epoch": state.epoch,
            "loss": state.logged_sum / state.logged_steps,
            **others,
            "lr": step.learning_rate,
            "grad_norm": step.grad_norm,
            "samples_per_s": self._samples / seconds,
            **_effort(state),
        }
        self._write(record)
        self._show_step(record, list(others), seconds)
        state.logged_sum, state.logged_steps = 0.0, 0
        self._resume_clock(state)
        runner.notify("after_record", record)

    def after_training(self, runner: TrainingRun) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._board is not None:
            self._board.flush()

    def after_evaluation(self, runner: TrainingRun, evaluation: Evaluation) -> None:
        """Notes the metrics of an evaluated split, the samples scored and those that could not be read, and
        how much the images are used; warns where they are not."""
        if not self.enabled:
            return
        state, use = evaluation.state, evaluation.image_use
        train_loss = state.loss_mean if state is not None and state.loss_steps else None
        record = {
            "type": "evaluation",
            "split": evaluation.key,
            "label": evaluation.label,
            "iteration": None if state is None else state.iteration,
            "samples": len(evaluation.results),
            "skipped": evaluation.skipped.total(),
            "skipped_by_cause": dict(evaluation.skipped),
            "seconds": evaluation.seconds,
            **({} if state is None else _effort(state)),
            **({} if use is None else use.fields(train_loss)),
            **evaluation.metrics,
        }
        self._write(record)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in evaluation.metrics.items())
        left_out = f", {format_counts(evaluation.skipped)} skipped," if evaluation.skipped else ""
        counts = f"{len(evaluation.results)} samples{left_out} in {evaluation.seconds:.1f} s"
        self._say(f"{evaluation.title}: {counts}  {shown}")
        if use is not None:
            self._say(f"{evaluation.title}: {use.line(train_loss)}")
            is_warming_up = state is not None and state.iteration <= self.run.warmup_steps
            if (warning := use.warning()) and not is_warming_up:
                logger.warning("%s", warning)
        runner.notify("after_record", record)

    def progress(self, batches: Iterable[Any], label: str) -> Iterable[Any]:
        """A bar over an evaluation's batches, on a terminal."""
        hidden = not self.terminal
        return tqdm(batches, desc=printable(label), leave=False, dynamic_ncols=True, disable=hidden)

    def _show_step(self, record: dict[str, Any], also: list[str], seconds: float) -> None:
        """A line of a record's loss, of what else the task gives (``also``), rate and speed."""
        losses = "  ".join(f"{name} {record[name]:.4f}" for name in ["loss", *also])
        numbers = f"{losses}  lr {record['lr']:.2e}  {record['samples_per_s']:.0f} samples/s"
        if self._bar is not None:
            self._bar.set_postfix_str(numbers)
            return
        if self._total is None:
            logger.info(
                "iteration %d  %s  %.0f s trained", record["iteration"], numbers, record["trained_seconds"]
            )
            return
        done = max(1, record["iteration"] - self._from)
        left = (self._total - record["iteration"]) * seconds / done
        minutes, rest = divmod(int(left), 60)
        logger.info(
            "iteration %d/%d  %s  %d:%02d left", record["iteration"], self._total, numbers, minutes, rest
        )

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        logger.info(line)

    def _open_board(self, first_step: int) -> None:
        if self.run.tensorboard and "tensorboard" not in self.run.trackers:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first_step)

    def _write(self, record: dict[str, Any]) -> None:
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")
        if self._board is not None:
            self._step = record["iteration"] or self._step
            prefix = record["type"] if record["type"] == "train" else record["split"]
            for name, value in record.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{prefix}/{name}", value, self._step)


def _effort(state: TrainingState) -> dict[str, float]:
    return {"trained_seconds": state.effort.seconds, "trained_samples": state.effort.samples}


def _forget_later(path: Path, state: TrainingState) -> None:
    """Takes the lines after a state out of a file of JSON lines, and a last one that was not written out."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("type") == "evaluation":
            epoch = record["label"].removeprefix("epoch")
            is_past = epoch.isdigit() and int(epoch) <= state.epoch
        else:
            is_past = (record.get("iteration") or 0) <= state.iteration
        if is_past:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))
