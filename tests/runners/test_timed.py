"""Runs whose length is a time, what a run says of the time and samples it took, and evaluation on a part."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from evlgen.assemble import run
from evlgen.common.errors import CheckpointError, ConfigError
from evlgen.config.config import Config
from evlgen.loaders.data import evenly_spread
from evlgen.models.vlm import VLM
from evlgen.runners.training_state import TrainingCost
from evlgen.tasks.captioning import CaptioningTask

TIMED = {"max_epoch": None, "max_seconds": 1.0, "seconds_per_inner_epoch": 0.4, "valid_splits": ["val"]}


@pytest.fixture(autouse=True)
def no_sheets(monkeypatch):
    """Drawing images of results takes longer than these runs."""
    monkeypatch.setattr(CaptioningTask, "_show", lambda *args: None)


@pytest.fixture
def clock(monkeypatch):
    """The time of a run whose steps and validations take what they take here, on however busy a machine."""
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr("evlgen.runners.runner.time", clock)
    for name, seconds in (("train_step", 0.15), ("valid_step", 7.0)):
        original = getattr(CaptioningTask, name)

        def lasting(*args, original=original, seconds=seconds):
            clock.now += seconds
            return original(*args)

        monkeypatch.setattr(CaptioningTask, name, lasting)
    return clock


def train(path, *options):
    """Runs a project; returns its folder, and the log's records of training and of evaluation."""
    run(Config.load(path, options))
    folder = (path.parent / "output" / "latest").resolve()
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return folder, *([r for r in records if r["type"] == kind] for kind in ("train", "evaluation"))


def test_a_timed_run_ends_when_its_seconds_do_and_validates_after_each_part_of_them(tiny_project, clock):
    _, steps, scores = train(tiny_project(run=TIMED))
    assert [r["label"] for r in scores] == ["epoch1", "epoch2", "epoch3"]
    assert [r["iteration"] for r in scores] == [3, 6, 7]  # the step in which the time is up is the last
    assert [r["trained_seconds"] for r in scores] == pytest.approx([0.45, 0.9, 1.05])  # no validation
    assert [r["trained_samples"] for r in scores] == [12, 24, 28]
    assert clock.now == pytest.approx(100 + 7 * 0.15 + 3 * 2 * 7.0)  # which took its time


def test_the_learning_rate_of_a_timed_run_follows_the_time_to_its_end(tiny_project, clock):
    run_keys = {**TIMED, "warmup_steps": 3, "warmup_lr": 0.0, "init_lr": 1e-3, "min_lr": 1e-5}
    _, steps, _ = train(tiny_project(run=run_keys))
    rates = [r["lr"] for r in steps]
    assert rates[:3] == pytest.approx([0.0, 1e-3 / 3, 2e-3 / 3])

    def decayed(share):
        return 1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    ends = [r["trained_seconds"] for r in steps]  # where the next step begins
    assert len(rates) == 7
    assert rates[3:] == pytest.approx([decayed(seconds) for seconds in ends[2:-1]], rel=1e-4)


def test_a_step_longer_than_an_inner_epoch_is_validated_once(tiny_project):
    _, steps, scores = train(tiny_project(run={**TIMED, "max_seconds": 0.3, "seconds_per_inner_epoch": 1e-4}))
    assert len({r["iteration"] for r in scores}) == len(scores) <= len(steps)
    assert scores[-1]["trained_seconds"] >= 0.3


def test_a_resumed_run_goes_on_counting_seconds_and_samples(tiny_project, clock):
    path = tiny_project(run={**TIMED, "keep_last": 9})
    folder, _, scores = train(path)
    first = sorted((folder / "checkpoints").glob("step_*"))[0]
    effort = json.loads((first / "training_state" / "effort.json").read_text())
    assert effort["samples"] == 4 * scores[0]["iteration"] == 12
    assert effort["seconds"] == pytest.approx(0.45)
    again, steps, resumed = train(path, f"run.resume={first}")
    assert again == folder
    assert resumed[0] == scores[0]  # that was not done again
    assert resumed[-1]["trained_samples"] == 4 * resumed[-1]["iteration"] == 28
    assert [r["label"] for r in resumed] == ["epoch1", "epoch2", "epoch3"]
    assert [r["trained_seconds"] for r in steps] == pytest.approx([0.15 * n for n in range(1, 8)], abs=1e-3)


def test_encoding_images_beforehand_takes_nothing_of_the_seconds(tiny_project, clock, monkeypatch):
    encode = VLM.encode

    def lasting(self, image):
        clock.now += 9.0
        return encode(self, image)

    monkeypatch.setattr(VLM, "encode", lasting)
    _, steps, _ = train(tiny_project(run={**TIMED, "cache_vision": True, "valid_splits": []}))
    assert clock.now > 100 + 9.0
    assert [r["trained_seconds"] for r in steps] == pytest.approx([0.15 * n for n in range(1, 8)], abs=1e-3)


def test_a_run_of_epochs_counts_too_and_leaves_validation_out(tiny_project, monkeypatch):
    original = CaptioningTask.valid_step

    def slow(self, model, samples):
        import time

        time.sleep(0.5)
        return original(self, model, samples)

    monkeypatch.setattr(CaptioningTask, "valid_step", slow)
    _, steps, scores = train(tiny_project())
    assert [r["trained_samples"] for r in scores] == [24, 48]
    assert scores[1]["seconds"] > 0.9  # two batches
    between = scores[1]["time"] - scores[0]["time"]
    assert scores[1]["trained_seconds"] - scores[0]["trained_seconds"] < between - 0.9


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"max_seconds": 3}, "max_seconds.*max_epoch is set too"),
        (
            {"max_epoch": None, "max_iters": 3, "seconds_per_inner_epoch": 1},
            "seconds_per_inner_epoch.*max_sec",
        ),
        ({"runner": "runner_timed"}, "runner_timed counts seconds"),
        ({"max_epoch": None, "max_seconds": 0}, "max_seconds.*more than 0"),
    ],
)
def test_lengths_that_contradict_each_other_are_named(tiny_project, values, problem):
    with pytest.raises(ConfigError, match=problem):
        Config.load(tiny_project(run=values))


def test_a_damaged_effort_is_named(tmp_path):
    path = tmp_path / "effort.json"
    assert TrainingCost.read(path) == TrainingCost()
    for text in ("[]", '{"seconds": 1}', '{"seconds": NaN, "samples": 1}', '{"seconds": -1, "samples": 1}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="effort.json"):
            TrainingCost.read(path)


def test_evaluation_on_a_part_takes_samples_evenly_from_the_whole(tiny_project):
    assert list(evenly_spread(10, 3)) == [0, 3, 6]
    assert list(evenly_spread(3, 5)) == list(evenly_spread(3, None)) == [0, 1, 2]
    path = tiny_project(run={"max_eval_samples": 3, "max_epoch": 1})
    folder, _, scores = train(path)
    captions = json.loads((folder / "result" / "val_epoch1" / "captions.json").read_text())
    assert [c["image_id"] for c in captions] == [0, 2, 4]
    assert scores[0]["samples"] == 3


def test_validations_alone_can_take_fewer_samples(tiny_project):
    settings = {"max_valid_samples": 2, "max_eval_samples": 4, "max_epoch": 1, "test_splits": ["val"]}
    folder, _, _ = train(tiny_project(run=settings))
    counts = [len(json.loads(p.read_text())) for p in sorted((folder / "result").glob("*/captions.json"))]
    assert sorted(counts) == [2, 4]
