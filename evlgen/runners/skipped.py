"""Samples that cannot be read: taken out of their batches, counted by cause, listed, and limited."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from accelerate.utils import gather_object

from evlgen.batch import Batch
from evlgen.common.errors import CheckpointError, TrainingError
from evlgen.common.safe_text import shown_name
from evlgen.datasets.base_dataset import Skipped
from evlgen.loaders.data import batch_size

logger = logging.getLogger(__name__)

FILE = "skipped.jsonl"


class SkippedSamples:
    """Takes broken samples out of batches, counts and lists them, and stops a run with too many. Every
    process lists its own in the same file.

    Args:
        folder: where ``skipped.jsonl`` lists them.
        max_share: share of the samples read that may be broken, and of a dataset's shards.
        processes: how many there are: each meets about as large a part of a dataset's shards.

    Attributes:
        seen: how many samples were read or skipped.
        causes: how many were skipped, by `Skipped.cause`.
        lost: the shards, or parts of them, that could not be read, each with its share of its dataset
            (`Skipped.lost_share`): dataset -> id -> share.
    """

    _EMPTY: ClassVar[dict[str, Any]] = {"seen": 0, "causes": {}, "lost": {}}
    MIN_SEEN: float = 100  # a share of fewer samples says little: judged at the end of an evaluation only

    def __init__(self, folder: Path, max_share: float, processes: int = 1) -> None:
        self.folder, self.max_share, self.processes = folder, max_share, processes
        self.seen = 0
        self.causes: Counter[str] = Counter()
        self.lost: dict[str, dict[str, float]] = {}
        self._named: set[str] = set()

    def fresh_counter(self) -> SkippedSamples:
        """A counter from zero, that does not list again what this one did, and judges when `check` is
        called."""
        other = SkippedSamples(self.folder, self.max_share)
        other._named = self._named
        other.MIN_SEEN = math.inf
        return other

    def add_up(self) -> None:
        """Makes the counts those of all processes together; all of them call it."""
        counts = gather_object([(self.seen, self.causes, self.lost)])
        self.seen = sum(seen for seen, _, _ in counts)
        self.causes = sum((causes for _, causes, _ in counts), Counter())
        self.lost = {
            dataset: {key: share for _, _, lost in counts for key, share in lost.get(dataset, {}).items()}
            for dataset in sorted({dataset for _, _, lost in counts for dataset in lost})
        }

    def pop_skipped(self, batch: Batch, iteration: int | None) -> Batch | None:
        """The batch without its list of skipped samples; None where nothing is left."""
        skipped = batch.pop("skipped", [])
        self.seen += len(skipped) + batch_size(batch)
        for sample in skipped:
            self.causes[sample.cause] += 1
            if sample.lost_share:
                self.lost.setdefault(sample.dataset, {})[sample.id] = sample.lost_share
            self._note(sample, iteration)
        if any(sample.lost_share for sample in skipped):
            self._check_lost()
        if skipped and self.seen >= self.MIN_SEEN:
            self.check()
        return batch or None

    def check(self) -> None:
        """Raises `TrainingError` when more than the allowed share was broken."""
        if self.causes.total() > self.max_share * self.seen:
            raise TrainingError(
                f"{self.causes.total()} of {self.seen} samples could not be read "
                f"({format_counts(self.causes)}), more than run.max_skipped_share ({self.max_share:g}) "
                f"allows. They are listed in {self.folder / FILE}; fix them or raise run.max_skipped_share."
            )

    def _check_lost(self) -> None:
        """Raises `TrainingError` when more than the allowed share of a dataset's shards could not be read,
        whose samples nobody has counted."""
        for dataset, lost in self.lost.items():
            share = sum(lost.values()) * self.processes
            if share > self.max_share:
                raise TrainingError(
                    f"{share:.1%} of the shards of dataset '{dataset}' could not be read, or not to their "
                    f"end, so far: more than run.max_skipped_share ({self.max_share:g}) allows. They are "
                    f"listed in {self.folder / FILE}; fix them, leave them out of build_info.storage, or "
                    "raise run.max_skipped_share."
                )

    def report(self, speaks: bool = True) -> None:
        """One line on what training skipped, where it skipped anything. All processes call it, one
        ``speaks``. Raises `TrainingError` where it skipped everything."""
        total = self.fresh_counter()
        total.seen, total.causes, total.lost = self.seen, self.causes, self.lost
        total.add_up()
        if total.seen and total.seen == total.causes.total():
            raise TrainingError(
                f"nothing was learned: none of {total.seen} training samples could be used "
                f"({format_counts(total.causes)}). They are listed in {self.folder / FILE}."
            )
        if speaks and total.causes:
            logger.warning(
                "%d of %d training samples were skipped: %s. They are listed in %s",
                total.causes.total(),
                total.seen,
                format_counts(total.causes),
                self.folder / FILE,
            )
            for dataset, lost in total.lost.items():
                share = sum(lost.values())
                logger.warning(
                    "%.1f%% of the shards of '%s' could not be read to their end", 100 * share, dataset
                )

    def to_json(self) -> dict[str, Any]:
        """What a resumed run needs to go on counting."""
        lost = {dataset: dict(shares) for dataset, shares in self.lost.items()}
        return {"seen": self.seen, "causes": dict(self.causes), "lost": lost}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Takes over what `to_json` gave. Raises `CheckpointError` where that is damaged."""
        if not isinstance(values, Mapping):
            raise CheckpointError("its counts of skipped samples are damaged")
        seen, causes, lost = (values.get(name, empty) for name, empty in self._EMPTY.items())
        by_dataset = lost.values() if isinstance(lost, Mapping) else [None]
        if not (_is_number(seen, int) and _are_numbers(causes, int)) or not all(
            _are_numbers(shares, int | float) for shares in by_dataset
        ):
            raise CheckpointError(f"its counts of skipped samples are damaged ({str(values):.100})")
        self.seen, self.causes = seen, Counter(causes)
        self.lost = {dataset: dict(shares) for dataset, shares in lost.items()}

    def _note(self, sample: Skipped, iteration: int | None) -> None:
        key = f"{sample.id}: {sample.reason}"
        if key in self._named:
            return
        self._named.add(key)
        if len(self._named) <= 5:
            logger.warning("skipped a broken sample: %s: %s", shown_name(str(sample.id)), sample.reason)
        record = {
            "index": sample.index,
            "id": sample.id,
            "cause": sample.cause,
            "reason": sample.reason,
            "iteration": iteration,
        }
        with open(self.folder / FILE, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(record, default=str) + "\n")


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 <= value < math.inf


def _are_numbers(values: Any, kind: Any) -> bool:
    return isinstance(values, Mapping) and all(_is_number(value, kind) for value in values.values())


def format_counts(causes: Mapping[str, int]) -> str:
    """``3 missing file, 1 empty caption``, the commonest first."""
    return ", ".join(f"{count} {cause}" for cause, count in Counter(causes).most_common())
