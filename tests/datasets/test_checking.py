"""`data check`: counts, broken samples, text lengths and sheets of a dataset."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from evlgen.common.errors import DataError
from evlgen.datasets.base_dataset import BadRecord, MediaDataset
from evlgen.datasets.checking import check_split, find_shared, told, write_sheet, write_skipped
from evlgen.datasets.media import ImageFiles
from evlgen.processors import build_processor


class Captions(MediaDataset):
    def load_text(self, index):
        text = self.records[index]["caption"]
        if not text:
            raise DataError("the caption is empty.", "empty caption")
        return {"text_input": text, "image_id": index}


@pytest.fixture
def dataset(tmp_path):
    """Three pictures, one of them twice; a file that is missing, one that is none, a record without text."""
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (20, 10)).save(tmp_path / name)
    (tmp_path / "text.png").write_text("no picture")
    rows = [("a.png", "one"), ("a.png", "one two"), ("gone.png", "x"), ("text.png", "x"), ("b.png", "")]
    records = [{"visual": name, "caption": text} for name, text in rows]
    records += [BadRecord("record 5", "has no caption."), {"visual": "c.png", "caption": "a b c d"}]
    processor = build_processor({"name": "blip_image_eval", "image_size": 8})
    return Captions(records, ImageFiles(tmp_path), processor)


def words(text: str) -> int:
    return len(text.split())


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
    assert report.token_counts == {"text_input": [1, 2, 4]}
    lengths = report.to_json({"text_input": 3}, "words")["words"]["text_input"]
    assert lengths == {"median": 2, "p90": 4, "longest": 4, "limit": 3, "above_limit": 1}
    assert "1 of 3 above 3" in "\n".join(told(report, {"text_input": 3}, "words"))
    assert "all within the limit of 4" in "\n".join(told(report, {"text_input": 4}, "words"))


def test_pictures_that_two_splits_share_are_counted(dataset, tmp_path):
    first = check_split("mine/train", dataset, words, 0)
    records = [{"visual": name, "caption": "x"} for name in ("a.png", "d.png")]
    other = Captions(records, ImageFiles(tmp_path), dataset.vis_processor)
    second = check_split("mine/val", other, words, 0)
    assert list(find_shared([first, second])) == ["mine/train and mine/val share 1 pictures or clips"]
    assert first.shared == {"mine/val": 1} and second.shared == {"mine/train": 1}


def test_the_sheet_shows_each_readable_picture_once(dataset, tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        "evlgen.tasks.caption_sheet.caption_sheet",
        lambda pictures, captions, path: shown.update(captions=captions, sizes=[p.size for p in pictures]),
    )
    assert write_sheet(check_split("mine/train", dataset, words, 0), dataset, tmp_path / "sheet.png")
    assert shown["captions"] == [("one", "a.png"), ("a b c d", "c.png")]
    assert shown["sizes"] == [(20, 10)] * 2
