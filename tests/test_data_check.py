"""`data check`: counts, broken samples, text lengths and sheets of a dataset."""

from __future__ import annotations

import argparse
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from shard_files import write_shards

from evlgen.commands import data_check
from evlgen.commands.data_check import add_arguments
from evlgen.common.errors import DataError
from evlgen.data_check import check_split, find_shared, format_counts, write_sheet, write_skipped
from evlgen.datasets.base_dataset import BadRecord, MediaDataset
from evlgen.datasets.media import ImageFiles
from evlgen.datasets.shards import ShardDataset
from evlgen.models.text_lengths import TextLength
from evlgen.processors import build_processor
from evlgen.processors.text import BlipCaptionProcessor

LIMIT = "model.max_txt_len"


class Captions(MediaDataset):
    def load_text(self, index):
        text = self.records[index]["caption"]
        if not text:
            raise DataError("the caption is empty.", "empty caption")
        return {"text_input": text, "image_id": index}


@pytest.fixture
def dataset(tmp_path):
    """Three images, one of them twice; a file that is missing, one that is none, a record without text."""
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (20, 10)).save(tmp_path / name)
    (tmp_path / "text.png").write_text("no image")
    rows = [("a.png", "one"), ("a.png", "one two"), ("gone.png", "x"), ("text.png", "x"), ("b.png", "")]
    records = [{"visual": name, "caption": text} for name, text in rows]
    records += [BadRecord("record 5", "has no caption."), {"visual": "c.png", "caption": "a b c d"}]
    processor = build_processor({"name": "blip_image_eval", "image_size": 8})
    return Captions(records, ImageFiles(tmp_path), processor)


def words(texts: dict) -> list[TextLength]:
    """In words, of which a model would read three."""
    count = len(texts["text_input"].split())
    return [TextLength(1, count, is_cut=count > 3, is_lost=count > 9)]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_is_counted_and_every_broken_one_named_by_its_cause(dataset, workers, tmp_path):
    report = check_split("mine/train", dataset, words, workers)
    assert report.num_samples == 7 and report.readable == [0, 1, 6]
    assert dict(report.causes) == {
        **{"missing file": 1, "not an image": 1, "empty caption": 1, "bad record": 1},
    }
    write_skipped([report], tmp_path / "skipped.jsonl")
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").open()]
    assert [(r["index"], r["id"]) for r in listed] == [
        *((2, "gone.png"), (3, "text.png"), (4, "b.png"), (5, "record 5")),
    ]
    assert listed[0]["split"] == "mine/train" and "does not exist" in listed[0]["reason"]


def test_text_lengths_are_measured_against_what_the_model_reads(dataset):
    report = check_split("mine/train", dataset, words, 0)
    assert report.counts == {"read": [1, 1, 1], "learned": [1, 2, 4]}
    found = report.to_json({LIMIT: 3}, "words")
    assert found["words"]["learned"] == {"median": 2, "p90": 4, "longest": 4}
    assert (found["texts"], found["cut_off"], found["nothing_left"]) == (3, 1, 0)
    lines = list(format_counts(report, {LIMIT: 3}, "words"))
    assert lines[-1] == "  cut off: 1 of 3 texts (model.max_txt_len: 3)"
    report.lengths += [TextLength(1, 10, True, True)]
    lines = list(format_counts(report, {LIMIT: 3}, "words"))
    assert lines[-1] == "  cut off: 2 of 4 texts (model.max_txt_len: 3); of 1 nothing is left to learn"
    assert "cut_off" not in report.to_json({}, "words") and "cut off" not in "".join(
        format_counts(report, {}, "words")
    )


def test_images_that_two_splits_share_are_counted(dataset, tmp_path):
    first = check_split("mine/train", dataset, words, 0)
    records = [{"visual": name, "caption": "x"} for name in ("a.png", "d.png")]
    other = Captions(records, ImageFiles(tmp_path), dataset.vis_processor)
    second = check_split("mine/val", other, words, 0)
    assert list(find_shared([first, second])) == ["mine/train and mine/val share 1 images or videos"]
    assert first.shared == {"mine/val": 1} and second.shared == {"mine/train": 1}


def test_the_sheet_shows_each_readable_image_once(dataset, tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        "evlgen.tasks.caption_sheet.caption_sheet",
        lambda images, captions, path: shown.update(captions=captions, sizes=[p.size for p in images]),
    )
    assert write_sheet(check_split("mine/train", dataset, words, 0), dataset, tmp_path / "sheet.png")
    assert shown["captions"] == [("one", "a.png"), ("a b c d", "c.png")]
    assert shown["sizes"] == [(20, 10)] * 2


def checked(project, into) -> tuple[int, dict]:
    """The exit code of `data check`, and its report."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    code = data_check.run(
        parser.parse_args(["--cfg-path", str(project), "--to", str(into), "--num-workers", "0"])
    )
    return code, json.loads((into / "report.json").read_text())


def own_project(tmp_path, annotations: str, run: str = "task: captioning, max_epoch: 1"):
    """A project of one's own tables on the bundled model."""
    project = tmp_path / "p.yaml"
    project.write_text(
        f"""
model: {{arch: evlgen_opt, model_type: shapes, max_txt_len: 10}}
datasets: {{image_text: {{annotations: {annotations}}}}}
run: {{{run}}}
"""
    )
    return project


def test_a_split_that_cannot_be_read_is_noted_and_the_others_are_looked_at(dataset, tmp_path, capsys):
    (tmp_path / "train.csv").write_text("image,caption\na.png,red\nb.png,a red star\n")
    (tmp_path / "val.csv").write_text("")
    tables = f"{{val: {tmp_path / 'val.csv'}, train: {tmp_path / 'train.csv'}}}"
    code, report = checked(own_project(tmp_path, tables), tmp_path / "out")
    assert code == 1 and "val.csv has no row that names its columns" in report["image_text/val"]["error"]
    assert report["image_text/train"]["samples"] == 2 and (tmp_path / "out" / "skipped.jsonl").is_file()
    assert "image_text/val: cannot be looked at: " in capsys.readouterr().out


def test_a_question_is_measured_with_its_prompt_and_its_answer(dataset, tmp_path):
    (tmp_path / "train.csv").write_text("image,question,answer\na.png,what color is it?,red\n")
    table, found = f"{{train: {tmp_path / 'train.csv'}}}", []
    for prompt in ("{}", "Question: {} Short answer:"):
        project = own_project(tmp_path, table, f'task: vqa, prompt: "{prompt}", max_epoch: 1')
        found.append(checked(project, tmp_path / "out")[1]["image_text/train"])
    bare, asked = found
    assert (bare["cut_off"], bare["tokens"]["read"]["longest"], bare["limits"]) == (0, 8, {LIMIT: 10})
    assert (asked["cut_off"], asked["nothing_left"], asked["tokens"]["read"]["longest"]) == (1, 1, 12)


def test_what_questions_give_away_without_their_images_is_told(dataset, tmp_path, capsys):
    rows = {
        "train": [("what color is it?", "red"), ("what color is it?", "red"), ("how many stars?", "two")],
        "val": [("What color is it ?", "red"), ("how many stars?", "two"), ("how many dogs?", "six")],
    }
    for split, questions in rows.items():
        lines = [f"{'ab'[split == 'val']}.png,{question},{answer}" for question, answer in questions]
        (tmp_path / f"{split}.csv").write_text("\n".join(["image,question,answer", *lines]) + "\n")
    tables = f"{{train: {tmp_path / 'train.csv'}, val: {tmp_path / 'val.csv'}}}"
    checked(own_project(tmp_path, tables, "task: exact_match_qa, max_epoch: 1"), tmp_path / "out")
    told = [line for line in capsys.readouterr().out.splitlines() if "without looking" in line]
    assert told == [
        "image_text/val: without looking, train's most frequent answer gets 66.7 by the same question, "
        "66.7 by the first two words, 33.3 by any question"
    ]


def test_a_lost_shard_counts_by_its_share(tmp_path):
    shards = write_shards(tmp_path, [4, 4, 4])
    Path(shards[1]).write_bytes(b"garbage" * 1000)
    processors = {"name": "blip_image_eval", "image_size": 8}, {"name": "blip_caption"}
    stream = ShardDataset(shards, *map(build_processor, processors))
    report = check_split("web/train", stream.listed(), words, 0)
    assert report.broken_share == pytest.approx(1 / 3)
    assert "  broken: 1 (33.3%): 1 damaged shard" in list(format_counts(report, {}, "words"))


def test_shards_have_a_sheet_and_a_count_of_images(dataset, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for name in ("a", "b"):
            (tmp_path / f"{name}.txt").write_text("a red star")
            for suffix in ("png", "txt"):
                shard.add(tmp_path / f"{name}.{suffix}", f"{name}.{suffix}")
    listed = ShardDataset([str(tmp_path / "0.tar")], dataset.vis_processor, BlipCaptionProcessor()).listed()
    report = check_split("mine/train", listed, words, 0)
    assert (report.num_samples, report.num_visuals, report.readable) == (2, 2, [0, 1])
    assert write_sheet(report, listed, tmp_path / "sheet.png") and (tmp_path / "sheet.png").is_file()
