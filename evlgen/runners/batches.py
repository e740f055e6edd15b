"""The batches that a run learns from: without the samples that cannot be read or teach nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from evlgen.batch import Batch
from evlgen.common.errors import TrainingError
from evlgen.datasets.base_dataset import BaseDataset, Skipped
from evlgen.loaders.data import batch_size, rows_of, seeded
from evlgen.loaders.mixed_plan import one_by_one
from evlgen.models.base_model import BaseModel
from evlgen.runners.encoding_ahead import EncodedAhead
from evlgen.runners.skipped import SkippedSamples
from evlgen.runners.task import Task


def set_aside(batch: Batch, reasons: Callable[[Batch], Mapping[int, str]], cause: str) -> Batch:
    """A batch with some more of its samples among its ``skipped`` ones.

    Args:
        reasons: from the samples to those, by their places, and why.
        cause: see `DataError`.
    """
    samples: Batch = {**batch}
    samples.pop("skipped", None)
    found = reasons(samples) if samples else {}
    if not found:
        return batch
    ids = samples.get("sample_id", samples.get("instance_id", [""] * batch_size(samples)))
    skipped = [Skipped(None, ids[row], why, cause) for row, why in found.items()]
    rest = rows_of(samples, [row for row in range(batch_size(samples)) if row not in found])
    return {**rest, "skipped": [*batch.get("skipped", []), *skipped]}


class TrainingBatches:
    """Takes a process's batches one by one.

    Args:
        batches: of a loader, without an end.
        datasets: that they are of, by name.
        skipped: counts what is taken out of them.
        processes: of several each must take part in every step.
        seed: of the sample that stands in where a run's first batch is empty.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        datasets: Mapping[str, BaseDataset],
        model: BaseModel,
        task: Task,
        skipped: SkippedSamples,
        processes: int,
        seed: int,
    ) -> None:
        self.batches, self.datasets, self.model, self.task = batches, datasets, model, task
        self.skipped, self.processes, self.seed = skipped, processes, seed
        self._last: Batch | None = None

    def next(self, iteration: int) -> tuple[Batch | None, int]:
        """The next batch, and how many samples of it count: 0 of one that only stands in for an empty one.
        None for an empty one where there is one process.

        Raises:
            StopNow: a stop was requested while the batch was awaited.
            TrainingError: too many samples cannot be read.
        """
        samples = self.skipped.pop_skipped(self._learnable(next(self.batches)), iteration)
        count = 0 if samples is None else batch_size(samples)
        if samples is None:
            if self.processes == 1:
                return None, 0
            samples = self._stand_in()
        self._last = samples
        return samples, count

    def begin_next(self) -> None:
        """Called while the gradients of a batch are computed: the next one may be encoded meanwhile."""
        if isinstance(self.batches, EncodedAhead):
            self.batches.begin()

    def _learnable(self, batch: Batch) -> Batch:
        """A batch whose samples that leave nothing to learn are among its ``skipped`` ones."""

        def reasons(samples: Batch) -> Mapping[int, str]:
            return self.model.not_learnable(self.task.to_learn(samples))

        return set_aside(batch, reasons, "nothing to learn")

    def _stand_in(self) -> Batch:
        """The batch before, where nothing of one could be read; for a run's first, any readable sample."""
        if self._last is not None:
            return self._last
        self.skipped.check()
        with seeded(self.seed):
            for name, dataset in self.datasets.items():
                for sample in one_by_one(dataset):
                    batch = self._learnable(dataset.collater([sample]))
                    if not batch.pop("skipped", None):
                        return {**batch, "dataset": [name]}
        raise TrainingError(f"no training sample can be read; see {self.skipped.folder / 'skipped.jsonl'}.")
