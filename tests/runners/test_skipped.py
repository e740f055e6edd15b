"""What is skipped is judged: samples by their number, shards by their share of a dataset."""

from __future__ import annotations

import json
import logging

import pytest

from evlgen.common.errors import CheckpointError, TrainingError
from evlgen.datasets.base_dataset import Skipped
from evlgen.runners.skipped import FILE, SkippedSamples


def lost(name: str, share: float, dataset: str = "web") -> Skipped:
    return Skipped(None, name, "it is garbage.", "damaged shard", share, dataset)


def batch(*skipped: Skipped, read: int = 1) -> dict:
    return {"text_input": ["a"] * read, "skipped": list(skipped)}


def test_one_of_a_thousand_shards_stops_no_run_however_often_it_comes(tmp_path):
    skipped = SkippedSamples(tmp_path, 0.05)
    for iteration in range(200):
        skipped.take_out(batch(lost("3.tar", 0.001), read=30), iteration)
    assert skipped.lost == {"web": {"3.tar": 0.001}} and skipped.causes.total() == 200
    (line,) = (tmp_path / FILE).read_text().splitlines()
    assert json.loads(line)["index"] is None and json.loads(line)["id"] == "3.tar"


def test_more_than_the_allowed_share_of_shards_stops_the_run_at_once(tmp_path):
    skipped = SkippedSamples(tmp_path, 0.05)
    skipped.take_out(batch(lost("1.tar", 0.04), lost("1.tar", 0.04, "other")), 0)
    with pytest.raises(TrainingError, match=r"6\.0% of the shards of dataset 'web' could not be read.*0\.05"):
        skipped.take_out(batch(lost("2.tar", 0.02)), 1)


def test_each_of_several_processes_meets_its_part_of_the_shards(tmp_path):
    SkippedSamples(tmp_path, 0.05, processes=2).take_out(batch(lost("1.tar", 0.02)), 0)
    with pytest.raises(TrainingError, match=r"6\.0% of the shards"):
        SkippedSamples(tmp_path, 0.05, processes=2).take_out(batch(lost("1.tar", 0.03)), 0)


def test_a_resumed_run_goes_on_counting_lost_shards(tmp_path):
    before = SkippedSamples(tmp_path, 0.05)
    before.take_out(batch(lost("1.tar", 0.04)), 0)
    after = SkippedSamples(tmp_path, 0.05)
    after.restore(json.loads(json.dumps(before.to_json())))
    with pytest.raises(TrainingError, match=r"8\.0% of the shards"):
        after.take_out(batch(lost("2.tar", 0.04)), 1)


@pytest.mark.parametrize(
    "values",
    [
        *([], {"seen": "many"}, {"seen": -1}, {"seen": True}, {"seen": 1.5}, {"causes": []}, {"lost": 3}),
        *({"causes": {"x": "y"}}, {"lost": {"web": 1}}, {"lost": {"web": {"1.tar": "a"}}}),
        {"lost": {"web": {"1.tar": float("nan")}}},
    ],
)
def test_damaged_counts_are_damage(tmp_path, values):
    with pytest.raises(CheckpointError, match="damaged"):
        SkippedSamples(tmp_path, 0.05).restore(values)


def test_the_report_tells_of_lost_shards(tmp_path, caplog):
    skipped = SkippedSamples(tmp_path, 0.9)
    skipped.take_out(batch(lost("1.tar", 0.25), lost("2.tar", 0.25)), 0)
    with caplog.at_level(logging.WARNING):
        skipped.report()
    assert "2 of 3 training samples were skipped: 2 damaged shard." in caplog.text
    assert "50.0% of the shards of 'web' could not be read to their end" in caplog.text
