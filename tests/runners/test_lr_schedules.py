"""LAVIS's schedules, by hand."""

from __future__ import annotations

import pytest

from evlgen.common.registry import registry

SETTING = {"total_iters": 100, "iters_per_epoch": 10, "init_lr": 1.0, "min_lr": 0.2}


def schedule(name, **changes):
    return registry.get_lr_scheduler_class(name)(**{**SETTING, **changes})


def test_warmup_is_linear_from_its_start():
    lr = schedule("constant_lr", warmup_lr=0.1, warmup_steps=9)
    assert [lr(i) for i in (0, 3, 9, 50)] == pytest.approx([0.1, 0.4, 1.0, 1.0])


def test_cosine_goes_from_highest_to_lowest():
    lr = schedule("linear_warmup_cosine_lr")
    assert [lr(0), lr(50), lr(100)] == pytest.approx([1.0, 0.6, 0.2])
    assert lr(25) == pytest.approx(0.2 + 0.8 * 0.8535533905932737)


def test_steps_decay_once_for_each_epoch_down_to_the_lowest():
    lr = schedule("linear_warmup_step_lr", decay_rate=0.5)
    assert [lr(9), lr(10), lr(20), lr(90)] == pytest.approx([1.0, 0.5, 0.25, 0.2])
