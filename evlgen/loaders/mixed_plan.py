"""The order of training data where some of it is a stream (`evlgen.datasets.stream`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from evlgen.common.errors import ConfigError, did_you_mean
from evlgen.config.run_config import RunConfig
from evlgen.datasets.base_dataset import BaseDataset
from evlgen.datasets.stream import Partition, StreamDataset
from evlgen.loaders.batch_plan import BatchPlan, mix_seed

#: Partitions of each process. Batches take them in turn, and workers take batches in turn, so with 1, 2, 4 or
#: 8 workers each partition is read by one of them; with other numbers several workers follow a partition,
#: each passing over what the others read.
PARTITIONS = 8
_BLOCK = 1 << 16  # draws that are made at once


class StreamSlot(NamedTuple):
    """The place of a sample of a stream: which dataset, and where in it."""

    dataset: int
    partition: Partition
    ordinal: int


class MixedPlan:
    """The endless sequence of training batches of one rank, of map-style datasets and streams.

    Each sample is drawn from a dataset with that dataset's share. A map-style dataset gives all its samples,
    in a new order, before any a second time; the ranks share them. A stream gives the next sample of the
    batch's partition; no two ranks have a partition in common. Everything follows from seed, rank, number of
    ranks and place in the sequence: not from the number of workers, nor from where a run was interrupted.
    What one rank sees of a stream is not what two see with half the batch each.

    Args:
        lengths: samples of each dataset; of a stream None where unknown.
        streams: which of them are streams.
        batch_size: samples per rank.
        ratios: weight of each dataset; None for weights by length. Needed where a length is None.
        start: batches to leave out, of those already trained on.
    """

    def __init__(
        self,
        lengths: Sequence[int | None],
        streams: Sequence[bool],
        batch_size: int,
        seed: int,
        ratios: Sequence[float] | None = None,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        self.lengths, self.streams, self.seed = list(lengths), list(streams), seed
        self.batch_size, self.rank, self.world_size, self.start = batch_size, rank, world_size, start
        weights = [1.0] if len(self.lengths) == 1 else self.lengths if ratios is None else ratios
        self._cumulated = np.cumsum(np.asarray(weights, dtype=np.float64))
        self._first = np.cumsum(
            [0] + [0 if s else n for n, s in zip(self.lengths, self.streams, strict=True)]
        )
        self._drawn: tuple[int, np.ndarray] = (-1, np.empty(0))
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    @property
    def batches_per_epoch(self) -> int | None:
        """So many batches as hold as many samples as there are; None where the number is unknown."""
        lengths = [length for length in self.lengths if length is not None]
        if len(lengths) < len(self.lengths):
            return None
        return max(1, sum(lengths) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[tuple[int | StreamSlot, int]]]:
        """Batches of (place, seed) pairs, from batch ``start`` on, for ever. A place is the index in all
        map-style datasets one after the other, or a `StreamSlot`."""
        batch, counts = self.start, self._counts_before(self.start)
        while True:
            yield self._batch(batch, counts)
            batch += 1

    def _batch(self, batch: int, counts: np.ndarray) -> list[tuple[int | StreamSlot, int]]:
        """The batch of a number. ``counts`` [datasets, PARTITIONS] of draws before it are brought up to date;
        of a map-style dataset the first one counts for all."""
        of_all = self.batch_size * self.world_size
        drawn = self._draws(batch * of_all, of_all)
        first, partition = self.rank * self.batch_size, batch % PARTITIONS
        places: dict[int, tuple[int | StreamSlot, int]] = {}
        for dataset, is_stream in enumerate(self.streams):
            positions = np.flatnonzero(drawn == dataset) - first
            if is_stream:
                positions = positions[(positions >= 0) & (positions < self.batch_size)]
            counted = (dataset, partition if is_stream else 0)
            for ordinal, position in enumerate(positions.tolist(), int(counts[counted])):
                if is_stream:
                    places[position] = self._in_stream(dataset, partition, ordinal)
                elif 0 <= position < self.batch_size:
                    places[position] = self._in_map(dataset, ordinal)
            counts[counted] += len(positions)
        return [places[position] for position in range(self.batch_size)]

    def _in_stream(self, dataset: int, partition: int, ordinal: int) -> tuple[StreamSlot, int]:
        index = self.rank * PARTITIONS + partition
        of_all = Partition(mix_seed(self.seed, dataset), index, self.world_size * PARTITIONS)
        return StreamSlot(dataset, of_all, ordinal), mix_seed(self.seed, dataset, index, ordinal)

    def _in_map(self, dataset: int, ordinal: int) -> tuple[int, int]:
        length = self.lengths[dataset]
        assert length is not None  # that of a stream alone is not known
        turn, position = divmod(ordinal, length)
        if self._orders.get(dataset, (-1,))[0] != turn:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, dataset, turn))
            self._orders[dataset] = turn, torch.randperm(length, generator=generator).numpy()
        index = int(self._first[dataset] + self._orders[dataset][1][position])
        return index, mix_seed(self.seed, dataset, turn, index)

    def _draws(self, first: int, count: int) -> np.ndarray:
        """Which dataset each of ``count`` samples of all ranks is of, from the ``first`` on: [count]."""
        parts = []
        for block in range(first // _BLOCK, (first + count - 1) // _BLOCK + 1):
            begin = block * _BLOCK
            parts.append(self._block(block)[max(0, first - begin) : first + count - begin])
        return np.concatenate(parts)

    def _block(self, block: int) -> np.ndarray:
        if self._drawn[0] != block:
            draws = np.random.default_rng(mix_seed(self.seed, block)).random(_BLOCK) * self._cumulated[-1]
            self._drawn = block, np.searchsorted(self._cumulated, draws, side="right")
        return self._drawn[1]

    def _counts_before(self, batch: int) -> np.ndarray:
        """What `_batch` has counted when it comes to a batch: [datasets, PARTITIONS]."""
        counts = np.zeros((len(self.lengths), PARTITIONS), dtype=np.int64)
        of_all = self.batch_size * self.world_size
        for first in range(0, batch * of_all, _BLOCK):
            slots = np.arange(first, min(first + _BLOCK, batch * of_all))
            drawn = self._draws(first, len(slots))
            is_own = slots % of_all // self.batch_size == self.rank
            partitions = slots // of_all % PARTITIONS
            for dataset, is_stream in enumerate(self.streams):
                if is_stream:
                    counts[dataset] += np.bincount(
                        partitions[is_own & (drawn == dataset)], minlength=PARTITIONS
                    )
                else:
                    counts[dataset, 0] += np.count_nonzero(drawn == dataset)
        return counts


def make_plan(
    datasets: Sequence[BaseDataset],
    batch_size: int,
    seed: int,
    ratios: Sequence[float] | None = None,
    rank: int = 0,
    world_size: int = 1,
    has_epochs: bool = True,
    group_by_length: bool = False,
) -> BatchPlan | MixedPlan:
    """The plan that training on these datasets takes. Where it needs no epochs (``has_epochs``), and ratios
    say how to mix, the samples of streams are not counted. ``group_by_length``: batches have samples of
    similar sizes, by the datasets' ``size(index)``.

    Raises:
        ConfigError: samples cannot be grouped by their length: a stream, or a dataset without `size`.
    """
    streams = [isinstance(dataset, StreamDataset) for dataset in datasets]
    if any(streams) and group_by_length:
        _sized(datasets)
    if any(streams):
        is_counted = has_epochs or (len(streams) > 1 and not ratios)
        lengths = [
            known_length(dataset) if is_counted or not is_stream else None
            for dataset, is_stream in zip(datasets, streams, strict=True)
        ]
        return MixedPlan(lengths, streams, batch_size, seed, ratios, rank, world_size)
    counts = [len(d) for d in datasets]
    sizes = None
    if group_by_length:
        sizes = [d.size(i) for d, count in zip(_sized(datasets), counts, strict=True) for i in range(count)]
    return BatchPlan(counts, batch_size, seed, ratios, rank, world_size, sizes=sizes)


@runtime_checkable
class HasSizes(Protocol):
    """A dataset that tells about how many positions a sample takes."""

    def size(self, index: int) -> int: ...


def _sized(datasets: Iterable[BaseDataset]) -> list[HasSizes]:
    """The datasets, which tell how long their samples are. Raises `ConfigError` where one does not."""
    found: list[HasSizes] = []
    for dataset in datasets:
        if isinstance(dataset, StreamDataset):
            raise ConfigError(
                f"run.group_by_length: {type(dataset).__name__} is a stream, whose samples are read in their "
                "order. Set it to false."
            )
        if not isinstance(dataset, HasSizes):
            raise ConfigError(
                f"run.group_by_length: {type(dataset).__name__} does not say how long its samples are. Give "
                "it a method size(index), see evlgen.datasets.base_dataset.MediaDataset.size, or set it to "
                "false."
            )
        found.append(dataset)
    return found


def format_length(dataset: BaseDataset) -> str:
    """The size of a dataset for people, as far as it is known without counting."""
    if isinstance(dataset, StreamDataset):
        return f"{len(dataset.records)} shards"
    return f"{len(dataset)} samples"


def known_length(dataset: BaseDataset) -> int | None:
    """The number of samples; None for a stream of unknown length."""
    return dataset.num_samples if isinstance(dataset, StreamDataset) else len(dataset)


def split_ratios(
    ratios: Mapping[str, float] | None, named: Sequence[tuple[str, BaseDataset]]
) -> list[float] | None:
    """The weight of each training split: its dataset's ratio, shared by size among its splits.

    Args:
        ratios: ``run.train_dataset_ratios``.
        named: the splits that are trained on, each with its dataset's name.

    Raises:
        ConfigError: a dataset has no ratio, or a ratio no dataset.
    """
    if not ratios:
        return None
    sizes: dict[str, int] = {}
    lengths = [1 if isinstance(d, StreamDataset) else len(d) for _, d in named]  # a stream has one split
    for (name, _), length in zip(named, lengths, strict=True):
        sizes[name] = sizes.get(name, 0) + length
    for name in ratios:
        if name not in sizes:
            raise ConfigError(
                f"run.train_dataset_ratios names '{name}', which is not trained on in this run."
                f"{did_you_mean(name, sizes)}"
            )
    for name in sizes:
        if name not in ratios:
            raise ConfigError(
                f"run.train_dataset_ratios has no '{name}', which would not be trained on. Give it a weight, "
                "or take it out of datasets."
            )
    return [ratios[name] * length / sizes[name] for (name, _), length in zip(named, lengths, strict=True)]


def recorded(datasets: Iterable[BaseDataset]) -> dict[str, Any]:
    """What a checkpoint notes of streams besides their lengths, as the order depends on it."""
    shards = [len(d.records) for d in datasets if isinstance(d, StreamDataset)]
    return {"shards": shards, "lanes": PARTITIONS} if shards else {}


def one_by_one(dataset: BaseDataset) -> Iterator[Any]:
    """The samples of a dataset as they lie, each once."""
    if isinstance(dataset, StreamDataset):
        return map(dataset.read_place, dataset.places(None))
    return (dataset[index] for index in range(len(dataset)))


def check_training_data(run: RunConfig, datasets: Mapping[str, Mapping[str, BaseDataset]]) -> None:
    """Whether a run's training data can be mixed as it says, and give what it asks, of streams too.

    Args:
        datasets: name -> split -> dataset.

    Raises:
        ConfigError: names the dataset, the keys, and what to set.
    """
    for key in ("valid_splits", "test_splits"):
        for name, splits in datasets.items():
            for split in getattr(run, key):
                if isinstance(splits.get(split), StreamDataset):
                    raise ConfigError(
                        f"run.{key}: dataset '{name}' is a stream, which is for training only. Name a split "
                        f"of another dataset instead of '{split}'."
                    )
    if run.evaluate:
        return
    named = [(n, d) for n, splits in datasets.items() for s, d in splits.items() if s in run.train_splits]
    split_ratios(run.train_dataset_ratios, named)
    trained = dict(named)
    streams = [name for name, dataset in trained.items() if isinstance(dataset, StreamDataset)]
    if streams and run.cache_vision:
        raise ConfigError(
            f"run.cache_vision: dataset '{streams[0]}' is a stream of shards, whose images are not kept. "
            "Set it to false."
        )
    for name in streams:
        is_mixed_by_size = len(trained) > 1 and not run.train_dataset_ratios
        if not (run.max_epoch or is_mixed_by_size) or known_length(trained[name]) is not None:
            continue
        unknown = f"the number of samples of dataset '{name}' is unknown. Set datasets.{name}.num_samples, or"
        if run.max_epoch:
            raise ConfigError(f"run.max_epoch: {unknown} give the length of training by run.max_iters.")
        raise ConfigError(f"run.train_dataset_ratios: {unknown} say here how to mix the datasets.")
