"""Every published caption set: its storage, its layout, its samples; and real data in the same layouts."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from evlgen.common.errors import DataError
from evlgen.common.registry import registry
from evlgen.config.schema import check_section
from evlgen.datasets.base_dataset import Skipped
from evlgen.datasets.caption_builders import CaptionBuilder
from evlgen.files.io import PACKAGE_ROOT

PAIRS = [{"image": "a/1_77.jpg", "caption": "A red bus"}, {"image": "a/2_77.jpg", "caption": "Two dogs."}]
PAIR_SAMPLES = [
    ("a red bus", "a/1_77.jpg"),
    ("two dogs", "a/2_77.jpg"),
]  # no ids, and numbers that are not one's own
VIDEOS = [
    {"image_id": "video0", "video": "video0.gif", "caption": "Arms"},
    {"image_id": "video0", "video": "video0.gif", "caption": "Two people"},
]
VIDEOS_SCORED = [{"image_id": "video3", "video": "video3.gif", "caption": ["Makeup", "A woman"]}]
VIDEO_SAMPLES = [("arms", "video0"), ("two people", "video0")]
VIDEO_REFERENCES = {"video3": ["Makeup", "A woman"]}

# set -> training: (annotation, (text_input, image_id) of its samples), scoring: (annotation, references)
SETS = {
    "coco_caption": (
        (
            [{"image": "val2014/COCO_val2014_000000000042.jpg", "caption": "Dogs", "image_id": "coco_42"}],
            [("dogs", "coco_42")],
        ),
        (
            [{"image": "val2014/COCO_val2014_000000000042.jpg", "caption": ["Dogs", "Two"]}],
            {42: ["Dogs", "Two"]},
        ),
    ),
    "nocaps": (None, ([{"image": "0013ea2087020901.jpg", "img_id": 0}, {"image": "b.jpg", "img_id": 1}], {})),
    "flickr30k": (
        ([{"image": "flickr30k-images/1000092795.jpg", "caption": "A man", "image_id": 3}], [("a man", 3)]),
        (
            [{"image": "flickr30k-images/1007129816.jpg", "caption": ["A man", "A hat"]}],
            {1007129816: ["A man", "A hat"]},
        ),
    ),
    "vg_caption": (
        (
            [
                {"image": "VG_100K/1.jpg", "caption": "a clock", "image_id": 1},
                {"image": "VG_100K/1.jpg", "caption": "a street", "image_id": 1},
            ],
            [("a clock", 1), ("a street", 1)],
        ),
        None,
    ),
    "conceptual_caption_3m": ((PAIRS, PAIR_SAMPLES), None),
    "conceptual_caption_12m": ((PAIRS, PAIR_SAMPLES), None),
    "sbu_caption": (([{**p, "url": "http://a.b/c.jpg"} for p in PAIRS], PAIR_SAMPLES), None),
    "msrvtt_caption": ((VIDEOS, VIDEO_SAMPLES), (VIDEOS_SCORED, VIDEO_REFERENCES)),
    "msvd_caption": ((VIDEOS, VIDEO_SAMPLES), (VIDEOS_SCORED, VIDEO_REFERENCES)),
    "vatex_caption": ((VIDEOS, VIDEO_SAMPLES), (VIDEOS_SCORED, VIDEO_REFERENCES)),
    "webvid_2m": (([{"video": "001/7.gif", "caption": "Sea"}], [("sea", 7)]), None),
    "webvid_10m": (([{"image": "001/7.gif", "caption": "Sea"}], [("sea", 7)]), None),
}


def build(name: str, root: Path, **changes) -> CaptionBuilder:
    """The builder of a set with its default YAML, but small images."""
    cls = registry.get_builder_class(name)
    section = OmegaConf.load(PACKAGE_ROOT / cls.DEFAULT_CONFIG)["datasets"][name]
    for processor in section.vis_processor.values():
        processor.image_size = 16
    plain = OmegaConf.to_container(OmegaConf.merge(section, changes))
    checked = check_section(plain, cls, f"datasets.{name}", ignore=cls.FROM_FRAMEWORK)
    return cls(name=name, cache_root=root, **checked)


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_media(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [Image.new("RGB", (24, 18), colour) for colour in ("red", "green", "blue", "white")]
    if path.suffix == ".gif":
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    else:
        frames[0].save(path)


def write_set(name: str, root: Path) -> CaptionBuilder:
    """The files of a set where its YAML says they are."""
    builder = build(name, root)
    info = builder.build_info
    for split, source in info.annotations.items():
        annotation, _ = SETS[name][0 if split == "train" else 1]
        write(root / source.storage, annotation)
        for record in annotation:
            write_media(root / builder.media_source.storage / (record.get("image") or record["video"]))
    return builder


@pytest.mark.parametrize("name", SETS)
def test_a_published_set_is_read_in_its_published_layout(name: str, tmp_path) -> None:
    builder = write_set(name, tmp_path)
    assert builder.missing() == []
    shape = (3, 4, 16, 16) if builder.data_type == "videos" else (3, 16, 16)
    training, scoring = SETS[name]
    assert builder.splits == (["train"] if training else []) + (["val", "test"] if scoring else [])
    if training:
        dataset = builder.get_split("train")
        samples = [dataset[i] for i in range(len(dataset))]
        assert [(s["text_input"], s["image_id"]) for s in samples] == training[1]
        assert [s["instance_id"] for s in samples] == [str(i) for i in range(len(samples))]
        assert all(s["image"].shape == shape and s["image"].dtype == torch.float32 for s in samples)
    if scoring:
        dataset = builder.get_split("test")
        assert dataset.references() == scoring[1]
        assert dataset[0]["image"].shape == shape and sorted(dataset[0]) == [
            "image",
            "image_id",
            "instance_id",
        ]


def test_every_published_caption_set_is_in_the_table() -> None:
    builders = {name: registry.get_builder_class(name) for name in registry.list_datasets()}
    ours = {
        n for n, cls in builders.items() if issubclass(cls, CaptionBuilder) and "evlgen." in cls.__module__
    }
    elsewhere = {
        "flickr8k",
        "coco_retrieval",
        "flickr30k_retrieval",
        "msrvtt_retrieval",
    }
    assert ours == {*SETS} | elsewhere


def test_nocaps_is_scored_with_its_official_file_by_domain(tmp_path) -> None:
    builder = write_set("nocaps", tmp_path)
    assert [builder.get_split("val")[i]["image_id"] for i in range(2)] == [0, 1]
    truth = {
        "images": [
            {"id": 0, "open_images_id": "0013ea2087020901", "domain": "in-domain", "file_name": "x.jpg"},
            {"id": "1", "open_images_id": "b", "domain": "out-domain", "file_name": "b.jpg"},
            {"id": 2, "open_images_id": "c", "domain": "out-domain", "file_name": "c.jpg"},
        ],
        "annotations": [{"image_id": i, "id": 9 + i, "caption": f"caption {i}"} for i in range(3)],
    }
    write(tmp_path / "nocaps/annotations/nocaps_val_gt.json", truth)
    dataset = builder.get_split("val")
    assert dataset.references() == {0: ["caption 0"], 1: ["caption 1"]}
    assert dataset.domains() == {0: "in-domain", 1: "out-domain"}
    assert builder.get_split("test").domains() == {}


COCO_FILE = {
    "info": {},
    "images": [
        {"id": 42, "file_name": "COCO_val2014_000000000042.jpg"},
        {"id": 7, "file_name": "COCO_val2014_000000000007.jpg"},
    ],
    "annotations": [
        {"image_id": 7, "id": 1, "caption": "A"},
        {"image_id": 42, "id": 2, "caption": "B"},
        {"image_id": "7", "id": 3, "caption": "C"},  # number and text are one id
        {"image_id": 8, "id": 4, "caption": "of no image"},
    ],
}


def coco(root: Path, split: str, content: dict, file: str = "captions_val2014.json", folder: str = "val2014"):
    """A split of COCO in its own file, and its images in a folder of `images`."""
    write(root / "coco/annotations" / file, content)
    for image in content["images"]:
        write_media(root / "coco/images" / folder / image["file_name"])
    storage = {split: {"storage": f"coco/annotations/{file}"}}
    return build("coco_caption", root, build_info={"annotations": storage}).get_split(split)


def test_cocos_own_file_is_read_without_its_folders_in_the_names(tmp_path) -> None:
    dataset = coco(tmp_path, "val", COCO_FILE)
    assert [dataset[i]["image_id"] for i in range(2)] == [42, 7]
    assert dataset.sample_id(0) == "val2014/COCO_val2014_000000000042.jpg"
    assert dataset.references() == {42: ["B"], 7: ["A", "C"]}
    stray = dataset[2]
    assert (
        isinstance(stray, Skipped)
        and stray.id.startswith("annotation 3 of ")
        and "none of the file" in stray.reason
    )
    training = coco(tmp_path, "train", COCO_FILE)
    assert [training[i]["text_input"] for i in range(3)] == ["b", "a", "c"]


def test_the_folder_of_images_that_are_numbers_is_the_annotations(tmp_path) -> None:
    content = {**COCO_FILE, "images": [{"id": 42, "file_name": "000000000042.jpg"}]}
    dataset = coco(tmp_path, "val", content, "captions_val2017.json", "val2017")
    assert dataset[0]["image"].shape == (3, 16, 16) and dataset.sample_id(0) == "val2017/000000000042.jpg"


def test_images_of_cocos_own_file_may_lie_in_the_media_folder_itself(tmp_path) -> None:
    dataset = coco(tmp_path, "val", COCO_FILE, folder=".")
    assert dataset[0]["image"].shape == (3, 16, 16)


def test_a_folder_of_cocos_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match=r"image folder .*coco/images/val2014 is missing: 2 of 2 records"):
        coco(tmp_path, "val", COCO_FILE, folder="elsewhere")


def test_images_without_captions_are_written_about_and_not_scored(tmp_path) -> None:
    dataset = coco(tmp_path, "test", {"images": COCO_FILE["images"]})
    assert len(dataset) == 2 and dataset.references() == {}
    some = {**COCO_FILE, "annotations": COCO_FILE["annotations"][:1]}
    dataset = coco(tmp_path, "test", some)
    assert (dataset[0].cause, dataset.references()) == ("no caption", {7: ["A"]})
    with pytest.raises(DataError, match="image 0 of .*captions_val2014.json: .* no 'caption'"):
        coco(tmp_path, "train", {"images": COCO_FILE["images"]})


def test_names_in_missing_folders_are_skipped_and_told_and_refused_where_there_are_no_others(
    tmp_path, caplog
) -> None:
    record = SETS["coco_caption"][0][0][0]
    write_media(tmp_path / "coco/images" / record["image"])
    annotation = tmp_path / "coco/annotations/coco_karpathy_train.json"
    gone = {**record, "image": "gone/1.jpg"}
    write(annotation, [record, gone, gone, gone, {**record, "image": "away/1.jpg"}])
    dataset = build("coco_caption", tmp_path).get_split("train")
    assert [dataset[i].cause for i in (1, 2, 3, 4)] == ["missing file"] * 4
    assert dataset[0]["text_input"] == "dogs"
    assert len(caplog.records) == 1
    assert "4 of 5 records will be skipped: image folder" in caplog.text
    assert "images/gone is missing: 3 of 5 records point into it. (It is so with 1 elsewhere.)" in caplog.text
    write(annotation, [gone, gone, {**record, "image": "away/1.jpg"}])
    with pytest.raises(DataError, match=r"images/gone is missing: 2 of 3 records"):
        build("coco_caption", tmp_path).get_split("train")


@pytest.fixture(scope="module")
def real(shared):
    return functools.partial(build, root=shared / "data/lavis_cache")


def test_real_photographs_with_cocos_own_file(real) -> None:
    storage = {"val": {"storage": "coco/annotations/captions_val2014.json"}}
    dataset = real(
        "coco_caption", build_info={"annotations": storage, "ground_truth": {"val": {"storage": "none"}}}
    )
    dataset = dataset.get_split("val")
    assert len(dataset) == 10 and not any(isinstance(dataset[i], Skipped) for i in range(10))
    karpathy = real("coco_caption", build_info={"ground_truth": {"val": {"storage": "none"}}}).get_split(
        "val"
    )
    assert karpathy.references().items() <= dataset.references().items()


def test_real_nocaps_images(real) -> None:
    dataset = real("nocaps").get_split("val")
    assert [dataset[i]["image_id"] for i in range(2)] == [0, 1]
    assert [len(texts) for texts in dataset.references().values()] == [5, 5]


def test_real_videos_of_several_formats(real) -> None:
    datasets = {split: real("msrvtt_caption").get_split(split) for split in ("train", "val", "test")}
    assert [len(dataset) for dataset in datasets.values()] == [9, 2, 2]
    batch = datasets["train"].collater([datasets["train"][i] for i in (0, 3, 6)])
    assert batch["image"].shape == (3, 3, 4, 16, 16) and batch["image_id"] == ["video0", "video1", "video2"]
    assert list(datasets["test"].references()) == ["video3", "video4"]
    assert datasets["test"][1]["image"].isfinite().all() and datasets["test"].image(1).mode == "RGB"
