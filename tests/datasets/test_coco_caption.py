"""The coco_caption dataset: LAVIS's layout, Karpathy's files, and every way they can be wrong."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from evlgen.common.errors import ConfigError, DataError
from evlgen.common.registry import registry
from evlgen.config.schema import check_section
from evlgen.datasets.base_dataset import Skipped
from evlgen.datasets.caption_builders import CaptionBuilder
from evlgen.datasets.caption_dataset import id_rule
from evlgen.datasets.media import ImageFiles
from evlgen.files.io import PACKAGE_ROOT

TRAIN = [
    {"image": "train2014/COCO_train2014_000000000009.jpg", "caption": "A red bus.", "image_id": "coco_9"},
    {"image": "train2014/COCO_train2014_000000000009.jpg", "caption": "The bus; red!", "image_id": "coco_9"},
    {"image": "val2014/COCO_val2014_000000000042.jpg", "caption": "Two dogs", "image_id": "coco_42"},
]
VAL = [
    {"image": "val2014/COCO_val2014_000000000042.jpg", "caption": ["Two dogs", "dogs"]},
    {"image": "val2014/COCO_val2014_000000391895.jpg", "caption": ["A man"]},
]
SIZED = {
    "vis_processor": {
        "train": {"name": "blip2_image_train", "image_size": 16},
        "eval": {"name": "blip_image_eval", "image_size": 16},
    }
}


def defaults() -> dict:
    path = PACKAGE_ROOT / registry.get_builder_class("coco_caption").DEFAULT_CONFIG
    return OmegaConf.to_container(OmegaConf.load(path))["datasets"]["coco_caption"]


def builder(root: Path, **changes) -> CaptionBuilder:
    cls = registry.get_builder_class("coco_caption")
    section = OmegaConf.to_container(OmegaConf.merge(defaults(), SIZED, changes))
    checked = check_section(section, cls, "datasets.coco_caption", ignore=cls.FROM_FRAMEWORK)
    return cls(name="coco_caption", cache_root=root, **checked)


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root in LAVIS's layout with three small images."""
    for split, records in {"train": TRAIN, "val": VAL, "test": VAL}.items():
        write(tmp_path / f"coco/annotations/coco_karpathy_{split}.json", records)
        for record in records:
            image = tmp_path / "coco/images" / record["image"]
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 20), "red").save(image)
    return tmp_path


def annotation(root: Path, split: str = "train") -> Path:
    return root / f"coco/annotations/coco_karpathy_{split}.json"


def test_training_has_one_sample_per_caption(root) -> None:
    dataset = builder(root).get_split("train")
    assert len(dataset) == 3
    sample = dataset[1]
    assert sample["image"].shape == (3, 16, 16) and sample["image"].dtype == torch.float32
    del sample["image"]
    assert sample == {"text_input": "the bus red", "image_id": "coco_9", "instance_id": "1"}


def test_scoring_has_one_sample_per_image_and_its_number_as_id(root) -> None:
    dataset = builder(root).get_split("val")
    sample = dataset[1]
    assert sorted(sample) == ["image", "image_id", "instance_id"]
    assert [dataset[i]["image_id"] for i in range(2)] == [42, 391895]
    assert dataset.references() == {42: ["Two dogs", "dogs"], 391895: ["A man"]}


def test_training_layout_can_be_scored_and_the_other_way_round(root) -> None:
    write(annotation(root, "val"), TRAIN)
    write(annotation(root), VAL)
    datasets = builder(root).build_datasets()
    assert datasets["val"].references() == {
        "coco_9": ["A red bus.", "The bus; red!"],
        "coco_42": ["Two dogs"],
    }
    assert [datasets["train"][i]["text_input"] for i in range(3)] == ["two dogs", "dogs", "a man"]
    assert datasets["train"][0]["image_id"] == 42


def test_ids_are_numbers_only_where_those_tell_images_apart() -> None:
    def ids(*names: str) -> list:
        records = [{"visual": name} for name in names]
        return list(map(id_rule(records), records))

    assert ids("a/COCO_val2014_000000000042.jpg", "b/7.jpg", "b/7.jpg") == [42, 7, 7]
    assert ids("a/1.jpg", "b/1.jpg") == ["a/1.jpg", "b/1.jpg"]
    assert ids("dog.jpg", "1.jpg") == ["dog.jpg", "1.jpg"]
    assert ids("a.jpg.jpg", "gg.jpg") == ["a.jpg.jpg", "gg.jpg"]


def test_the_second_image_with_a_given_id_is_skipped_in_scoring_and_learned_in_training(root) -> None:
    records = [{**record, "image_id": 5} for record in VAL]
    write(annotation(root, "val"), records)
    write(annotation(root), records)
    first, second = (builder(root).get_split("val")[i] for i in range(2))
    assert first["image_id"] == 5
    assert (second.index, second.id, second.cause) == (1, VAL[1]["image"], "duplicate id")
    assert f"image_id 5 is that of {VAL[0]['image']} too" in second.reason
    assert [sample["image_id"] for sample in builder(root).get_split("train")] == [5, 5, 5]


def test_ground_truth_file_is_used_where_it_is(root) -> None:
    truth = [{"image_id": i, "caption": f"truth {i}", "id": i} for i in (42, 391895, 77)]
    write(root / "coco_gt/coco_karpathy_val_gt.json", {"annotations": truth, "images": []})
    datasets = builder(root).build_datasets()
    assert datasets["val"].references() == {42: ["truth 42"], 391895: ["truth 391895"]}
    assert datasets["test"].references()[42] == ["Two dogs", "dogs"]


def test_an_image_that_the_ground_truth_lacks_is_scored_against_its_own_captions(root, caplog) -> None:
    truth = {"annotations": [{"image_id": 42, "caption": "x"}]}
    write(root / "coco_gt/coco_karpathy_val_gt.json", truth)
    assert builder(root).get_split("val").references() == {42: ["x"], 391895: ["A man"]}
    assert "images that the ground truth lacks: 1" in caplog.text


def test_an_image_without_captions_that_the_ground_truth_lacks_is_skipped(root) -> None:
    path = root / "coco_gt/coco_karpathy_val_gt.json"
    write(annotation(root, "val"), [{"image": record["image"]} for record in VAL])
    write(path, {"annotations": [{"image_id": 42, "caption": "x"}]})
    dataset = builder(root).get_split("val")
    assert dataset.references() == {42: ["x"]} and dataset[1].cause == "no caption"
    assert "nor has the ground truth one of image_id 391895" in dataset[1].reason
    write(path, {"annotations": [{"image_id": 7, "caption": "x"}]})
    with pytest.raises(DataError, match=r"COCO_val2014_000000000042\.jpg: it has no caption, .* all 2"):
        builder(root).get_split("val")


def test_a_ground_truth_of_another_layout_is_named(root) -> None:
    path = root / "coco_gt/coco_karpathy_val_gt.json"
    write(path, {"42": ["x"]})
    with pytest.raises(DataError, match=r"ground truth .*val_gt\.json must be .*it is a mapping with '42'"):
        builder(root).get_split("val")


def test_a_bad_caption_of_the_ground_truth_is_left_out_with_a_warning(root, caplog) -> None:
    captions = ["x", "", None, "a\0b"]
    truth = [{"image_id": i, "caption": text} for i in (42, 391895) for text in captions]
    write(root / "coco_gt/coco_karpathy_val_gt.json", {"annotations": [*truth, 7]})
    assert builder(root).get_split("val").references() == {42: ["x", ""], 391895: ["x", ""]}
    assert "5 captions are left out, such as a mapping with 'image_id', 'caption'" in caplog.text


@pytest.mark.parametrize(("own", "theirs"), [("42", 42), (42, "42"), (42, 42), ("video1", "video1")])
def test_ids_are_those_of_the_ground_truth_as_number_or_text(root, own, theirs) -> None:
    write(annotation(root, "val"), [{"image": VAL[0]["image"], "image_id": own}])
    truth = {"annotations": [{"image_id": theirs, "caption": "x"}]}
    write(root / "coco_gt/coco_karpathy_val_gt.json", truth)
    dataset = builder(root).get_split("val")
    assert [dataset[0]["image_id"]] == list(dataset.references()) == [theirs]


def test_a_bad_record_is_skipped_in_its_place_and_moves_no_other(root) -> None:
    image = TRAIN[0]["image"]
    content = [
        {"image": image, "caption": "a"},
        "x",
        {"image": image},
        {"image": image, "caption": " "},
        {"image": image, "caption": ["b", "", 3, "c\0"]},
        {"image": image, "caption": "word " * 10_000},
    ]
    write(annotation(root), content)
    dataset = builder(root).get_split("train")
    found = [
        s.cause if isinstance(s := dataset[i], Skipped) else s["text_input"] for i in range(len(dataset))
    ]
    damaged = ["empty caption", "bad record", "damaged text"]
    long = " ".join(["word"] * 50)  # what blip_caption keeps
    assert found == ["a", "bad record", "bad record", "empty caption", "b", *damaged, long]
    assert (
        dataset[2].id == f"record 2 of {annotation(root)}" and "no 'caption' but 'image'" in dataset[2].reason
    )
    assert [dataset.sample_id(i) for i in (1, 4)] == [f"record 1 of {annotation(root)}", image]
    write(annotation(root, "val"), content)
    dataset = builder(root).get_split("val")
    assert list(dataset.references().values()) == [["a", "b", content[-1]["caption"]]]


def test_text_that_is_not_utf8_makes_one_record_bad(root) -> None:
    text = json.dumps([{"image": TRAIN[0]["image"], "caption": c} for c in ("caf\u00e9", "cafe")])
    annotation(root).write_bytes(text.replace("\\u00e9", "\u00e9").encode("latin-1"))
    dataset = builder(root).get_split("train")
    assert "bytes that are not UTF-8" in dataset[0].reason and dataset[1]["text_input"] == "cafe"


def test_several_annotation_files_are_read_one_after_the_other(root) -> None:
    write(root / "more.json", VAL)
    files = {"train": {"storage": ["coco/annotations/coco_karpathy_train.json", str(root / "more.json")]}}
    assert len(builder(root, build_info={"annotations": files}).get_split("train")) == 6


def test_absolute_paths_and_splits_of_ones_own(root, tmp_path) -> None:
    write(tmp_path / "mine.json", VAL)
    annotations = {"train_mine": {"storage": str(tmp_path / "mine.json")}}
    made = builder(
        root, build_info={"annotations": annotations, "images": {"storage": str(root / "coco/images")}}
    )
    assert made.splits == ["train", "val", "test", "train_mine"]
    assert "text_input" in made.get_split("train_mine")[0]


def test_storage_may_have_a_scheme_and_an_address_is_not_fetched_by_looking(root) -> None:
    annotations = {
        "train": {"storage": "evlgen://configs/none.json"},
        "val": {"storage": "https://x.invalid/v.json"},
    }
    lines = builder(root, build_info={"annotations": annotations}).missing(["train", "val"])
    assert len(lines) == 1 and str(PACKAGE_ROOT / "configs/none.json") in lines[0]


def test_misspelt_split_names_the_nearest(root) -> None:
    with pytest.raises(
        ConfigError, match=r"'coco_caption' has no split 'vla'\. Did you mean 'val'.*train, val, test"
    ):
        builder(root).get_split("vla")


def test_missing_says_what_where_and_how_for_every_thing(tmp_path) -> None:
    lines = builder(tmp_path).missing()
    assert len(lines) == 4
    assert str(annotation(tmp_path)) in lines[0]
    assert f"Run `python -m evlgen download coco --to {tmp_path}`, or set EVLGEN_CACHE" in lines[0]
    assert f"image folder is not at {tmp_path / 'coco/images'}" in lines[3]
    assert "Run `python -m evlgen download coco --to" in lines[3]


def test_the_command_that_gets_what_is_missing_is_for_the_data_root(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path))
    assert all("Run `python -m evlgen download coco`, or" in line for line in builder(tmp_path).missing())


def test_missing_names_the_addresses_of_what_no_command_gets(tmp_path) -> None:
    source = {"storage": "mine.json", "url": "https://x.invalid/mine.json", "md5": "aa31"}
    images = {"storage": "mine", "url": ["https://x.invalid/a.zip", "https://x.invalid/b.zip"]}
    lines = builder(tmp_path, build_info={"annotations": {"train": source}, "images": images}).missing(
        ["train"]
    )
    assert "Download https://x.invalid/mine.json (md5 aa31) to that path" in lines[0]
    assert "Download https://x.invalid/a.zip" in lines[1] and "https://x.invalid/b.zip" in lines[1]


def test_missing_looks_only_at_the_splits_asked_for(root) -> None:
    annotation(root, "test").unlink()
    assert builder(root).missing(["train", "val"]) == []
    assert len(builder(root).missing(["test"])) == 1
    assert len(builder(root).get_split("val")) == 2


def test_asking_for_a_split_without_files_says_what_is_missing(tmp_path) -> None:
    with pytest.raises(DataError, match=r"train annotation is not at .*evlgen download coco --to"):
        builder(tmp_path).get_split("train")


def test_missing_image_folder_is_named_before_any_image_is_read(root) -> None:
    for year in ("train2014", "val2014"):
        (root / "coco/images" / year).rename(root / year)
    message = r"image folder .*coco/images/train2014 is missing: 2 of 3 records point into it\. Run"
    with pytest.raises(DataError, match=message):
        builder(root).get_split("train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"image": "a.jpg",\n "caption": }]', r"is not JSON: .* at line 2, column 13"),
        ("<html>", r"is not JSON: .* at line 1, column 1"),
        ('[{"image": "a.jpg", "caption": "x"}', r"is not JSON: .* at line 1, column 36"),
        ('[{"image": "a.jpg", "caption": "x"}] 1', r"is not JSON: Extra data at line 1, column 38"),
        ("[1,]", r"is not JSON: .* at line 1, column 4"),
        ([], r"has no records"),
        ({"a": 1}, r"must be a list of records, or .*, not a mapping with 'a'"),
        ({"images": [], "annotations": []}, r"has no images"),
        (
            {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [5]},
            r"image 0 of .*: it has no caption",
        ),
        ({"images": [1], "annotations": {}}, r"'annotations' must be a list"),
        (["x", "y"], r'record 0 of .* must be a mapping with \'image\' and \'caption\', not "x".*all 2'),
        (
            [{"image": "a.jpg", "captions": ["x"]}],
            r"record 0 of .* has no 'caption' but 'image', 'captions'.*mean",
        ),
        ([{"caption": "x"}], r"record 0 of .* has no 'image' but 'caption'"),
        ([{"image": 3, "caption": "x"}], r"record 0 of .*: 'image' must be a file name, not 3"),
        ([{"image": "a", "caption": 3}], r"'caption' must be text or a list of it, not 3"),
        ([{"image": "a", "caption": []}], r"it has no caption"),
        (
            [{"image": "a", "caption": "x", "image_id": [1]}],
            r"'image_id' must be a number or text, not \[1\]",
        ),
    ],
)
def test_wrong_annotations_name_file_place_and_content(root, content, message: str) -> None:
    write(annotation(root), content)
    with pytest.raises(DataError, match=message) as caught:
        builder(root).get_split("train")
    assert str(annotation(root)) in str(caught.value)


def test_annotation_that_is_not_text_is_named(root) -> None:
    annotation(root).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"coco_karpathy_train\.json is not UTF-8 text"):
        builder(root).get_split("train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"build_info": {"anotations": {}}}, r"build_info\.anotations.*Did you mean 'annotations'"),
        (
            {"build_info": {"annotations": {"train": {"storge": "x"}}}},
            r"train\.storge.*Did you mean 'storage'",
        ),
        (
            {"vis_processor": {"trian": {"name": "blip_image_eval"}}},
            r"vis_processor\.trian.*Did you mean 'train'",
        ),
        ({"text_processor": {"train": {"max_words": 0}}}, r"text_processor\.train\.max_words.*at least 1"),
    ],
)
def test_wrong_keys_are_named_with_their_path(root, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        builder(root, **changes)


def test_missing_processor_is_named(root) -> None:
    section = {**defaults(), **SIZED, "text_processor": {"eval": {"name": "blip_caption"}}}
    made = registry.get_builder_class("coco_caption")(name="coco_caption", cache_root=root, **section)
    assert len(made.get_split("val")) == 2
    with pytest.raises(
        ConfigError, match=r"datasets\.coco_caption\.text_processor\.train is missing.*blip_caption"
    ):
        made.get_split("train")


def test_real_photographs_in_lavis_layout_are_read(shared) -> None:
    datasets = builder(shared / "data/lavis_cache").build_datasets()
    assert {split: len(dataset) for split, dataset in datasets.items()} == {"train": 40, "val": 2, "test": 2}
    batch = datasets["train"].collater([datasets["train"][i] for i in range(0, 40, 5)])
    assert batch["image"].shape == (8, 3, 16, 16) and batch["skipped"] == []
    assert sorted(datasets["val"].references()) == [900007, 900008]
    assert all(len(captions) == 5 for captions in datasets["val"].references().values())


class Noted(ImageFiles):
    """Notes the names that are looked at."""

    def place(self, name):
        self.__dict__.setdefault("asked", []).append(name)
        return super().place(name)


def test_an_image_with_several_captions_is_looked_for_once_and_counted_as_often(tmp_path, caplog):
    (tmp_path / "a").mkdir()
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("1.png", b"")
    media = Noted(tmp_path)
    media.check(["a/1.png", "a/1.png", *["b/2.png"] * 3, *["c.zip/3.png"] * 4, "a/1.png"], "Get it.")
    assert media.asked == ["a/1.png", "b/2.png", "c.zip/3.png", "a/1.png"]
    assert "7 of 10 records will be skipped" in caplog.text and "none of the 4 images" in caplog.text
    assert "(It is so with 3 elsewhere.)" in caplog.text
