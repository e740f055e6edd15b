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

from evlgen.common.errors import TrainingError
from evlgen.runners.run_config import RunConfig
from evlgen.runners.training_state import TrainingState

logger = logging.getLogger(__name__)


class RunLog:
    """Writes a run's numbers; does nothing on processes other than the first.

    Args:
        folder: where ``log.jsonl`` and ``tensorboard/`` go.
        run: the ``run`` section (``log_freq``, ``tensorboard``).
        enabled: false on other processes.
    """

    def __init__(self, folder: Path, run: RunConfig, enabled: bool) -> None:
        self.folder, self.enabled, self.log_freq = folder, enabled, run.log_freq
        self.terminal = enabled and sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._board = None
        if enabled:
            folder.mkdir(parents=True, exist_ok=True)
            if run.tensorboard and not run.evaluate:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(folder / "tensorboard"))

    def start_training(self, total_iters: int, done: int) -> None:
        """Begins the bar and the clock."""
        if not self.enabled:
            return
        self._total, self._last = total_iters, time.perf_counter()
        self._samples, self._losses = 0, []
        self._iterations_since = 0
        if self.terminal:
            self._bar = tqdm(total=total_iters, initial=done, desc="training", unit="it", dynamic_ncols=True)

    def resume_clock(self) -> None:
        """Leaves what happened since the last line (a validation) out of the next one's speed."""
        if self.enabled:
            self._last, self._samples, self._iterations_since, self._losses = time.perf_counter(), 0, 0, []

    def train_step(self, state: TrainingState, losses: dict[str, float], lr: float, samples: int) -> None:
        """Notes an iteration; every ``log_freq`` iterations writes the mean loss since the last line."""
        if not self.enabled:
            return
        self._samples += samples
        self._losses.append(losses["loss"])
        self._iterations_since += 1
        if self._bar is not None:
            self._bar.update(state.iteration - self._bar.n)
        if state.iteration % self.log_freq and state.iteration != self._total:
            return
        now = time.perf_counter()
        seconds = now - self._last
        record = {
            "type": "train",
            "iteration": state.iteration,
            "epoch": state.epoch,
            "loss": sum(self._losses) / len(self._losses),
            **{name: value for name, value in losses.items() if name != "loss"},
            "lr": lr,
            "samples_per_s": self._samples / seconds,
        }
        self._write(record)
        self._show_step(record, seconds)
        self._last, self._samples, self._losses, self._iterations_since = now, 0, [], 0

    def end_training(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._board is not None:
            self._board.flush()

    def evaluation(
        self, key: str, label: str, metrics: dict[str, float], count: int, skipped: int, seconds: float
    ) -> None:
        """Notes the metrics of an evaluated split, the samples scored and those that could not be read."""
        if not self.enabled:
            return
        self._write(
            {
                "type": "evaluation",
                "split": key,
                "label": label,
                "samples": count,
                "skipped": skipped,
                "seconds": seconds,
                **metrics,
            }
        )
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        left_out = f", {skipped} skipped," if skipped else ""
        self._say(
            f"{' '.join(x for x in (key, label) if x)}: {count} samples{left_out} in {seconds:.1f} s  {shown}"
        )

    def progress(self, batches: Iterable[Any], label: str) -> Iterable[Any]:
        """A bar over an evaluation's batches, on a terminal."""
        return tqdm(batches, desc=label, leave=False, dynamic_ncols=True, disable=not self.terminal)

    def _show_step(self, record: dict[str, Any], seconds: float) -> None:
        numbers = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['samples_per_s']:.0f} samples/s"
        if self._bar is not None:
            self._bar.set_postfix_str(numbers)
            return
        left = (self._total - record["iteration"]) * seconds / max(1, self._iterations_since)
        minutes, rest = divmod(int(left), 60)
        logger.info(
            "iteration %d/%d  %s  %d:%02d left", record["iteration"], self._total, numbers, minutes, rest
        )

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        logger.info(line)

    def _write(self, record: dict[str, Any]) -> None:
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")
        if self._board is not None:
            step = record.get("iteration", self._step)
            self._step = step
            prefix = record["type"] if record["type"] == "train" else record["split"]
            for name, value in record.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{prefix}/{name}", value, step)

    _step = 0


class SkippedSamples:
    """Takes broken samples out of batches, counts and lists them, and stops a run with too many. Every
    process lists its own in the same file.

    Args:
        folder: where ``skipped.jsonl`` lists them.
        max_share: share of the samples read that may be broken.
    """

    MIN_SEEN = 100  # a share of fewer samples says little: judged at the end of an evaluation only

    def __init__(self, folder: Path, max_share: float) -> None:
        self.folder, self.max_share = folder, max_share
        self.seen = self.broken = 0
        self._named: set[str] = set()

    def take_out(self, batch: dict[str, Any], iteration: int | None) -> dict[str, Any] | None:
        """The batch without its list of skipped samples; None where nothing is left."""
        skipped = batch.pop("skipped", [])
        self.seen += len(skipped) + _size(batch)
        self.broken += len(skipped)
        for sample in skipped:
            self._note(sample, iteration)
        if skipped and self.seen >= self.MIN_SEEN:
            self.check()
        return batch or None

    def check(self) -> None:
        """Raises `TrainingError` when more than the allowed share was broken."""
        if self.broken > self.max_share * self.seen:
            raise TrainingError(
                f"{self.broken} of {self.seen} samples could not be read, more than run.max_skipped_share "
                f"({self.max_share:g}) allows. They are listed in {self.folder / 'skipped.jsonl'}; mend "
                "them or raise the share."
            )

    def _note(self, sample: Any, iteration: int | None) -> None:
        key = f"{sample.id}: {sample.reason}"
        if key in self._named:
            return
        self._named.add(key)
        if len(self._named) <= 5:
            logger.warning("skipped a broken sample: %s", key)
        record = {"index": sample.index, "id": sample.id, "reason": sample.reason, "iteration": iteration}
        with open(self.folder / "skipped.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str) + "\n")


def _size(batch: dict[str, Any]) -> int:
    return max((len(v) for v in batch.values() if hasattr(v, "__len__")), default=0)
