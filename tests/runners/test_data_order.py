"""The order of training data and its randomness are functions of (seed, epoch, index) alone."""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import torch

from evlgen.datasets.base_dataset import BaseDataset
from evlgen.loaders import data
from evlgen.loaders.data import BatchPlan, eval_loader, seeded, train_loader


def batches(count, **options):
    return [[i for i, _ in b] for b in islice(BatchPlan(**{"seed": 1, "batch_size": 4, **options}), count)]


def test_an_epoch_sees_each_sample_once_and_epochs_differ():
    plan = batches(10, lengths=[20])
    first, second = sum(plan[:5], []), sum(plan[5:], [])
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def test_starting_later_gives_the_rest_of_the_same_sequence():
    whole = list(islice(BatchPlan([22], 4, seed=3), 17))
    assert list(islice(BatchPlan([22], 4, seed=3, start=7), 10)) == whole[7:]


def test_two_ranks_with_half_the_batch_see_what_one_sees():
    one = batches(12, lengths=[40], batch_size=8)
    ranks = [batches(12, lengths=[40], batch_size=4, rank=r, world_size=2) for r in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == one


def test_a_dataset_smaller_than_a_batch_is_repeated():
    plan = batches(3, lengths=[3], batch_size=8)
    assert all(len(b) == 8 and set(b) == {0, 1, 2} for b in plan)


def test_ratios_draw_from_each_dataset_by_its_share():
    indices = sum(batches(500, lengths=[100, 900], ratios=[3.0, 1.0]), [])
    share = sum(i < 100 for i in indices) / len(indices)
    assert 0.70 < share < 0.80


class _Noise(BaseDataset):
    def __init__(self):
        super().__init__(range(12))

    def load_sample(self, index):
        return {
            "image": torch.tensor([torch.rand(()).item(), random.random(), np.random.rand(), float(index)])
        }


def test_random_choices_do_not_depend_on_workers_or_on_where_the_run_began():
    def read(num_workers, start, count):
        loader = train_loader(
            {"noise": _Noise()}, BatchPlan([12], 3, seed=5, start=start), num_workers, pin_memory=False
        )
        return torch.stack([b["image"] for b in islice(loader, count)])

    whole = read(0, 0, 9)
    assert torch.equal(whole, read(2, 0, 9))
    assert torch.equal(whole[4:], read(1, 4, 5))
    assert not torch.equal(whole[0], whole[4])


def test_reading_leaves_the_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state(), random.getstate()
    with seeded(7):
        torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


def test_evaluation_covers_each_sample_once_whatever_the_split():
    seen = []
    for rank in range(3):
        for batch in eval_loader(_Noise(), 2, 0, False, rank, 3):
            seen += batch["image"][:, 3].int().tolist()
    assert sorted(seen) == list(range(12))


def test_that_fewer_workers_read_than_were_asked_for_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(data.os, "sched_getaffinity", lambda process: range(2), raising=False)
    data._tell_of_cores.cache_clear()
    with caplog.at_level("INFO"):
        assert [data._workers(count) for count in (2, 64, 64)] == [2, 2, 2]
    assert caplog.messages == ["run.num_workers: 2 workers of 64, as this process may use so many cores"]
