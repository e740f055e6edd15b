"""What the captioning task writes and scores, with ids of any kind and in parts of a dataset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from evlgen.common.errors import DataError
from evlgen.common.registry import registry
from evlgen.config.run_config import RunConfig
from evlgen.datasets.base_dataset import BaseDataset, image_to_show
from evlgen.datasets.caption_dataset import CaptionEvalDataset
from evlgen.datasets.media import ImageFiles
from evlgen.processors import build_processor
from evlgen.runners.sample_captions import save_image
from evlgen.tasks.captioning import domain_scores
from evlgen.tasks.metrics import score_captions

TEXTS = {
    7: ["a red bus on a street", "the bus is red"],
    "7": ["two dogs play in the grass", "dogs on grass"],
    "video3": ["a woman puts on makeup", "a woman and her makeup"],
    2**40: ["a man rides a horse", "a horse with a rider"],
}
WRITTEN = {7: "a red bus", "7": "dogs in the grass", "video3": "a woman puts on makeup", 2**40: "a cat"}

IMAGE = build_processor({"name": "blip_image_eval", "image_size": 8})


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> tuple[dict[str, float], Path]:
    """The metrics of a set of images with such ids, two of them in one domain; and the result folder."""
    folder = tmp_path_factory.mktemp("set")
    for i in range(len(TEXTS)):
        Image.new("RGB", (8, 8), "red").save(folder / f"{i}.png")
    records = [{"visual": f"{i}.png", "caption": t, "image_id": n} for i, (n, t) in enumerate(TEXTS.items())]
    domains = {7: "in-domain", "7": "out-domain", "video3": "in-domain"}
    dataset = CaptionEvalDataset(records, ImageFiles(folder), IMAGE, domains=domains)
    task = registry.get_task_class("video_captioning")(RunConfig(task="video_captioning", metrics=["cider"]))
    results = [
        {"image_id": i, "caption": c, "instance_id": str(n)} for n, (i, c) in enumerate(WRITTEN.items())
    ]
    return task.after_evaluation(results[::-1], dataset, "val", folder / "result"), folder / "result"


def test_captions_are_written_in_the_datasets_order_with_ids_as_they_are(evaluated) -> None:
    _, folder = evaluated
    rows = json.loads((folder / "captions.json").read_text())
    assert rows == [{"image_id": i, "caption": c} for i, c in WRITTEN.items()]
    assert (folder / "captions.png").stat().st_size > 0


def test_scores_of_a_domain_are_those_of_its_images_alone(evaluated) -> None:
    found, folder = evaluated
    own = (7, "video3")
    inside = score_captions({i: TEXTS[i] for i in own}, {i: WRITTEN[i] for i in own}, ["cider"])
    assert found["CIDEr_in-domain"] == pytest.approx(inside.values["CIDEr"]) and inside.values["CIDEr"] > 1
    assert found["CIDEr_out-domain"] == 0  # one image: every n-gram is in all of its images
    assert found["CIDEr"] != pytest.approx(found["CIDEr_in-domain"])
    assert json.loads((folder / "metrics.json").read_text())["CIDEr_in-domain"] == found["CIDEr_in-domain"]


def test_a_dataset_without_parts_has_no_scores_of_parts() -> None:
    assert domain_scores(TEXTS, WRITTEN, {}) == {}
    assert domain_scores(TEXTS, WRITTEN, {"image of another set": "in-domain"}) == {}


def test_how_captions_are_written_follows_from_the_run_section() -> None:
    asked = []

    class Model:
        def generate(self, samples, **options):
            asked.append((samples.get("prompt"), options))
            return ["x"]

    given = {"num_beams": 3, "min_len": 2, "max_len": 7, "length_penalty": -1.0, "repetition_penalty": 1.5}
    for run in ({}, {"prompt": "a photo of", **given}):
        task = registry.get_task_class("captioning")(RunConfig(task="captioning", **run))
        task.valid_step(Model(), {"image_id": [1], "instance_id": ["0"]})
    keys = ("num_beams", "min_length", "max_length", "length_penalty", "repetition_penalty")
    assert asked == [(None, {"max_length": 30}), ("a photo of", dict(zip(keys, given.values(), strict=True)))]


def test_both_names_are_of_one_task() -> None:
    assert registry.get_task_class("video_captioning") is registry.get_task_class("captioning")


def test_captions_without_references_are_written_and_not_scored(tmp_path, caplog) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "1.png")
    records = [{"visual": "1.png", "image_id": 0}, {"visual": "gone.png", "image_id": 1}]
    dataset = CaptionEvalDataset(records, ImageFiles(tmp_path), IMAGE)
    task = registry.get_task_class("captioning")(RunConfig(task="captioning"))
    results = [{"image_id": 0, "caption": "x", "instance_id": "0"}]
    assert task.after_evaluation(results, dataset, "test", tmp_path) == {}
    assert json.loads((tmp_path / "captions.json").read_text()) == [{"image_id": 0, "caption": "x"}]
    assert "test has no references" in caplog.text
    assert "captions.json lacks 1 of 2 samples" in caplog.text


@pytest.mark.parametrize(
    ("limits", "lacking"),
    [
        ({"max_valid_samples": 2}, ""),
        ({"max_eval_samples": 2}, ""),
        ({"max_valid_samples": 3}, "lacks 1 of 3"),
        ({"max_valid_samples": 9, "max_eval_samples": 3}, "lacks 1 of 3"),
        ({"max_valid_samples": 1}, "lacks 2 of 4"),  # so many are of a test
    ],
)
def test_samples_that_were_not_asked_for_are_not_said_to_lack(tmp_path, caplog, limits, lacking) -> None:
    records = [{"visual": f"{i}.png", "image_id": i} for i in range(4)]
    task = registry.get_task_class("captioning")(RunConfig(task="captioning", max_epoch=1, **limits))
    task.warn_if_incomplete([{}, {}], CaptionEvalDataset(records, ImageFiles(tmp_path), IMAGE), tmp_path)
    assert lacking in caplog.text if lacking else not caplog.text


@pytest.mark.parametrize(
    ("size", "shown"), [((512, 99), (512, 99)), ((3000, 1500), (512, 256)), ((1, 20_000), (1, 512))]
)
def test_large_images_are_shown_small(size, shown) -> None:
    kept = Image.new("RGB", size, "red")

    class Kept(BaseDataset):
        def image(self, index):
            return kept

    image = image_to_show(Kept(range(1)), 0)
    assert image.size == shown and image.getpixel((0, 0)) == (255, 0, 0) and kept.size == size


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_scores_do_not_depend_on_images_that_cannot_be_shown_any_more(tmp_path, caplog, damage) -> None:
    for i in range(2):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{i}.png")
    records = [{"visual": f"{i}.png", "caption": texts} for i, texts in enumerate(TEXTS.values()) if i < 2]
    dataset = CaptionEvalDataset(records, ImageFiles(tmp_path), IMAGE)
    results = [{"image_id": i, "caption": "a red bus", "instance_id": str(i)} for i in range(2)]
    task = registry.get_task_class("captioning")(RunConfig(task="captioning", metrics=["bleu"]))
    damage(tmp_path / "0.png")
    assert task.after_evaluation(results, dataset, "val", tmp_path / "result")["Bleu_1"] > 0
    assert (tmp_path / "result" / "captions.png").stat().st_size > 0
    assert "an image is not shown: cannot read image" in caplog.text
    assert save_image(results[0], dataset, tmp_path / "small.png") is None


@pytest.mark.parametrize(("name", "key"), [("captioning", "image_id"), ("vqa", "question_id")])
def test_a_dataset_that_gives_no_id_is_told_which(name, key) -> None:
    task = registry.get_task_class(name)(RunConfig(task=name))
    with pytest.raises(
        DataError, match=rf"'{name}' scores by '{key}'.*they have image, text_input.*load_sample"
    ):
        task.valid_step(None, {"image": None, "text_input": ["a"]})


def test_images_without_references_are_written_and_not_scored(tmp_path, caplog) -> None:
    class Partly(BaseDataset):
        def references(self):
            return {1: TEXTS[7], 2: TEXTS["7"], 3: []}

    task = registry.get_task_class("captioning")(RunConfig(metrics=["cider"]))
    results = [{"image_id": i, "caption": TEXTS[7][i % 2], "instance_id": str(i - 1)} for i in (1, 2, 3, 4)]
    scores = task.after_evaluation(results, Partly(results), "val", tmp_path)
    own = {1: TEXTS[7][1], 2: TEXTS[7][0]}
    wanted = score_captions({1: TEXTS[7], 2: TEXTS["7"]}, own, ["cider"])
    assert scores["CIDEr"] == wanted.values["CIDEr"]
    assert "val: only 2 of 4 images have references" in caplog.text
    assert len(json.loads((tmp_path / "captions.json").read_text())) == 4
    assert task.after_evaluation(results[2:], Partly(results), "val", tmp_path) == {}
