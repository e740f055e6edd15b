"""Runs that go on with another table or for another length than before."""

from __future__ import annotations

import json
import logging

import pytest
from omegaconf import OmegaConf
from PIL import Image

from evlgen.assemble import run
from evlgen.config.config import Config
from evlgen.datasets.compact_records import PackedRecords
from evlgen.datasets.records import digest

SHORT = {"valid_splits": [], "precision": "fp32", "max_epoch": 1}


def train(path, *options):
    run(Config.load(path, ["run.resume=auto", *options]))
    lines = (path.parent / "output" / "latest" / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def iterations(records):
    return [r["iteration"] for r in records if r["type"] == "train"]


def progress_file(path):
    return path.parent / "output" / "latest" / "checkpoints" / "latest" / "training_state" / "progress.json"


@pytest.fixture
def table(tiny_project, tmp_path):
    """A project that trains on a table, and a function that writes the table's rows."""

    def write(rows):
        lines = [f"{name}.png,a {name} thing\n" for name in rows]
        (tmp_path / "my.csv").write_text("".join(["path,caption\n", *lines]))

    for name in "abcdefgh":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    path = tiny_project(run=SHORT)
    content = OmegaConf.load(path)
    content.datasets = {"image_text": {"annotations": {"train": str(tmp_path / "my.csv")}}}
    OmegaConf.save(content, path)
    return path, write


def test_a_table_whose_rows_changed_order_is_reported_on_resuming(table, caplog):
    path, write = table
    write("abcdefgh")
    train(path)
    with caplog.at_level(logging.WARNING):
        train(path, "run.max_epoch=2")
    assert "the data is not that of" not in caplog.text
    write("bacdefgh")
    with caplog.at_level(logging.WARNING):
        train(path, "run.max_epoch=3")
    expected = (
        "the data is not that of step_00000004 (the records of 'image_text' are in another order, or changed)"
    )
    assert expected in caplog.text

    # a checkpoint of before the digest was kept says nothing about the records
    caplog.clear()
    content = json.loads(progress_file(path).read_text())
    assert content.pop("records") and content.pop("unit")
    older = progress_file(path)
    older.write_text(json.dumps(content))
    (older.parent.parent / "checkpoint.sha256").unlink()  # older ones have none
    with caplog.at_level(logging.WARNING):
        assert iterations(train(path, "run.max_epoch=4"))[-1] == 8
    assert "the data is not that of" not in caplog.text


def test_the_digest_of_records_is_of_what_they_say_in_their_order():
    rows = [{"visual": "a.png", "caption": "a"}, {"visual": "b.png", "caption": "b"}]
    for kind in (list, PackedRecords):
        found = digest(kind(rows))
        assert found == digest(kind([dict(row) for row in rows]))
        changed = [rows[::-1], rows[:1], [rows[0], {**rows[1], "caption": "c"}]]
        assert len({found, *(digest(kind(other)) for other in changed)}) == 4
    assert digest(range(5)) != digest(range(6))
    assert digest(["/here/0.tar"]) == digest(["/there/0.tar"]) != digest(["/here/1.tar"])
    assert digest([lambda: 0]) is None


LENGTHS = {  # of a run of two epochs, 12 iterations, that goes on
    "iterations": (["max_epoch=null", "max_iters=15"], 15),
    "short inner epochs": (["max_epoch=null", "max_iters=15", "iters_per_inner_epoch=4"], 15),
    "a larger batch": (["max_epoch=5", "batch_size_train=8"], 15),
    "seconds": (["max_epoch=null", "max_seconds={seconds}"], None),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_run_that_ended_goes_on_for_longer_in_whatever_units(tiny_project, name):
    path = tiny_project(run={**SHORT, "max_epoch": 2, "valid_splits": ["val"], "image_use_samples": 0})
    seconds = train(path)[-1]["trained_seconds"]
    options, last = LENGTHS[name]
    records = train(path, *(f"run.{o.format(seconds=seconds + 0.5)}" for o in options))
    trained = iterations(records)
    assert trained == list(range(1, len(trained) + 1))
    assert trained[-1] == last if last else trained[-1] > 12
    evaluated = [r["iteration"] for r in records if r["type"] == "evaluation"]
    assert evaluated == sorted(set(evaluated)) and evaluated[-1] == trained[-1], "each once, the last too"
    assert evaluated[:2] == [6, 12]


def test_a_run_that_ended_goes_on_for_longer_in_the_same_units(tiny_project):
    """Inner epochs are as long as the run where nothing is said: the longer run's first one is not over."""
    path = tiny_project(run={**SHORT, "max_epoch": None, "max_iters": 3})
    train(path)
    assert iterations(train(path, "run.max_iters=5")) == [1, 2, 3, 4, 5]


def test_a_run_that_ended_says_that_nothing_is_left_to_train(tiny_project, caplog):
    path = tiny_project(run=SHORT)
    train(path)
    with caplog.at_level(logging.INFO):
        assert len(iterations(train(path))) == 6
    assert "nothing is left to train: iteration 6 of 6. Raise run.max_epoch" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert len(iterations(train(path, "run.max_epoch=null", "run.max_iters=5"))) == 6
    assert "nothing is left to train: iteration 6 of 5. Raise run.max_iters" in caplog.text
