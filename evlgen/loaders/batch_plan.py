"""The order of training data that is read by index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

_GROUPED = 50  # batches whose samples are sorted by size together


def mix_seed(*parts: int) -> int:
    """One seed of 63 bits out of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1


class BatchPlan:
    """The endless sequence of training batches of one rank.

    An epoch is a permutation of all samples; with ratios, each of its samples is drawn from a dataset with
    that dataset's share. Consecutive ranks take consecutive slices of a global batch, so that two ranks with
    batch size b see what one sees with 2b. An epoch's last incomplete batch is left out; an epoch smaller
    than one batch is repeated.

    Args:
        lengths: samples of each dataset.
        ratios: weight of each dataset, or None for all samples once.
        batch_size: samples per rank.
        start: batches to leave out, of those already trained on.
        sizes: of each sample, so that a global batch has samples of similar sizes; None: any samples.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        ratios: Sequence[float] | None = None,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        sizes: Sequence[int] | None = None,
    ) -> None:
        self.sizes = sizes
        self.lengths, self.ratios, self.seed = list(lengths), ratios, seed
        self.batch_size, self.rank, self.world_size, self.start = batch_size, rank, world_size, start
        self.batches_per_epoch = max(1, sum(self.lengths) // (batch_size * world_size))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Batches of (index, seed) pairs, from batch ``start`` on, for ever."""
        epoch, skip = divmod(self.start, self.batches_per_epoch)
        while True:
            order = self.order(epoch)
            for batch in range(skip, self.batches_per_epoch):
                first = (batch * self.world_size + self.rank) * self.batch_size
                indices = order[first : first + self.batch_size]
                yield [(i, mix_seed(self.seed, epoch, i)) for i in indices]
            epoch, skip = epoch + 1, 0

    def order(self, epoch: int) -> list[int]:
        """The samples of an epoch in their order."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        total = sum(self.lengths)
        if self.ratios is None:
            order = torch.randperm(total, generator=generator)
        else:
            order = self._drawn_by_ratio(total, generator)
        shortage = self.batch_size * self.world_size - total
        if shortage > 0:
            order = order.repeat(1 + shortage // total + 1)[: self.batch_size * self.world_size]
        if self.sizes is None:
            return order.tolist()
        return group_by_size(order.tolist(), self.sizes, self.batch_size * self.world_size, generator)

    def _drawn_by_ratio(self, total: int, generator: torch.Generator) -> torch.Tensor:
        weights = torch.tensor(self.ratios, dtype=torch.float64)
        choice = torch.multinomial(weights, total, replacement=True, generator=generator)
        order = torch.empty(total, dtype=torch.long)
        first = 0
        for dataset, length in enumerate(self.lengths):
            places = choice == dataset
            wanted = int(places.sum())
            rounds = [torch.randperm(length, generator=generator) for _ in range(-(-wanted // length))]
            if rounds:
                order[places] = first + torch.cat(rounds)[:wanted]
            first += length
        return order


def group_by_size(
    order: Sequence[int], sizes: Sequence[int], batch_size: int, generator: torch.Generator
) -> list[int]:
    """An order whose batches have samples of similar sizes: each `_GROUPED` batches of the given order are
    sorted by size, and all batches shuffled. The last incomplete batch stays the last."""
    end = len(order) // batch_size * batch_size
    batches = []
    for first in range(0, end, _GROUPED * batch_size):
        group = sorted(order[first : min(first + _GROUPED * batch_size, end)], key=lambda i: sizes[i])
        batches += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [index for batch in shuffled for index in batches[batch]] + list(order[end:])
