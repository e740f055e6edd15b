"""What is skipped is judged: samples by their number, shards by their share of a dataset."""

from __future__ import annotations

import json
import logging

import pytest
from omegaconf import OmegaConf
from PIL import Image

from evlgen.assemble import run
from evlgen.common.errors import CheckpointError, TrainingError
from evlgen.config.config import Config
from evlgen.datasets.base_dataset import Skipped
from evlgen.loaders.data import BatchPlan
from evlgen.runners.skipped import FILE, SkippedSamples


def lost(name: str, share: float, dataset: str = "web") -> Skipped:
    return Skipped(None, name, "it is garbage.", "damaged shard", share, dataset)


def batch(*skipped: Skipped, read: int = 1) -> dict:
    return {"text_input": ["a"] * read, "skipped": list(skipped)}


def test_one_of_a_thousand_shards_stops_no_run_however_often_it_comes(tmp_path):
    skipped = SkippedSamples(tmp_path, 0.05)
    for iteration in range(200):
        skipped.pop_skipped(batch(lost("3.tar", 0.001), read=30), iteration)
    assert skipped.lost == {"web": {"3.tar": 0.001}} and skipped.causes.total() == 200
    (line,) = (tmp_path / FILE).read_text().splitlines()
    assert json.loads(line)["index"] is None and json.loads(line)["id"] == "3.tar"


def test_more_than_the_allowed_share_of_shards_stops_the_run_at_once(tmp_path):
    skipped = SkippedSamples(tmp_path, 0.05)
    skipped.pop_skipped(batch(lost("1.tar", 0.04), lost("1.tar", 0.04, "other")), 0)
    with pytest.raises(TrainingError, match=r"6\.0% of the shards of dataset 'web' could not be read.*0\.05"):
        skipped.pop_skipped(batch(lost("2.tar", 0.02)), 1)


def test_each_of_several_processes_meets_its_part_of_the_shards(tmp_path):
    SkippedSamples(tmp_path, 0.05, processes=2).pop_skipped(batch(lost("1.tar", 0.02)), 0)
    with pytest.raises(TrainingError, match=r"6\.0% of the shards"):
        SkippedSamples(tmp_path, 0.05, processes=2).pop_skipped(batch(lost("1.tar", 0.03)), 0)


def test_a_resumed_run_goes_on_counting_lost_shards(tmp_path):
    before = SkippedSamples(tmp_path, 0.05)
    before.pop_skipped(batch(lost("1.tar", 0.04)), 0)
    after = SkippedSamples(tmp_path, 0.05)
    after.restore(json.loads(json.dumps(before.to_json())))
    with pytest.raises(TrainingError, match=r"8\.0% of the shards"):
        after.pop_skipped(batch(lost("2.tar", 0.04)), 1)


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
    skipped.pop_skipped(batch(lost("1.tar", 0.25), lost("2.tar", 0.25)), 0)
    with caplog.at_level(logging.WARNING):
        skipped.report()
    assert "2 of 3 training samples were skipped: 2 damaged shard." in caplog.text
    assert "50.0% of the shards of 'web' could not be read to their end" in caplog.text


@pytest.fixture
def questions(tiny_project, tmp_path):
    """Writes a project with a table of eight questions, batches of two; some are longer than is read."""

    def write(long, words="what is this? " * 20, **sections):
        rows = [f"a.png,{words if i in long else 'what is this?'},red\n" for i in range(8)]
        (tmp_path / "my.csv").write_text("".join(["image,question,answer\n", *rows]))
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        settings = {"task": "vqa", "valid_splits": [], "precision": "fp32", "max_epoch": 1}
        path = tiny_project(run={**settings, "batch_size_train": 2, **sections})
        content = OmegaConf.load(path)
        content.datasets = {"image_text": {"annotations": {"train": str(tmp_path / "my.csv")}}}
        OmegaConf.save(content, path)
        return path

    return write


@pytest.mark.parametrize(
    ("answers", "words"),
    # the tokenizer itself would take the latter for 20 tokens; spelled they are more
    [("sample", "what is this? " * 20), ("all", "what is this? " * 20), ("sample", "</s>" * 20)],
    ids=["sample", "all", "spelled"],
)
def test_questions_too_long_for_an_answer_are_skipped_and_counted(
    questions, tmp_path, caplog, answers, words
):
    """A whole batch of them, and one beside a good one."""
    order = BatchPlan([8], 2, seed=42).order(0)
    path = questions(long=order[2:5], words=words, max_skipped_share=0.5)
    content = OmegaConf.load(path)
    content.datasets.image_text.train_answers = answers
    OmegaConf.save(content, path)
    with caplog.at_level(logging.WARNING):
        run(Config.load(path))
    folder = tmp_path / "output" / "latest"
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in logged] == [1, 3, 4]
    listed = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    assert {r["cause"] for r in listed} == {"nothing to learn"}
    assert "takes all 32 tokens of model.max_txt_len" in listed[0]["reason"]
    assert "3 of 8 training samples were skipped: 3 nothing to learn." in caplog.text


def test_a_run_whose_questions_are_all_too_long_ends_with_an_error(questions):
    with pytest.raises(TrainingError, match="8 of 8 samples could not be read .8 nothing"):
        run(Config.load(questions(long=range(8))))
