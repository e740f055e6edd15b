"""The Shapes world as a captioning dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.config.schema import check_section
from evlgen.datasets.shapes.captions import captions
from evlgen.datasets.shapes.world import draw, scene
from evlgen.datasets.shapes_dataset import ShapesCaptionBuilder
from evlgen.files.io import PACKAGE_ROOT
from evlgen.processors.image import CLIP_MEAN, CLIP_STD


def builder(**changes) -> ShapesCaptionBuilder:
    cls = registry.get_builder_class("shapes_caption")
    section = OmegaConf.to_container(OmegaConf.load(PACKAGE_ROOT / cls.DEFAULT_CONFIG))["datasets"][
        "shapes_caption"
    ]
    for processor in section["vis_processor"].values():
        processor["image_size"] = 64
    checked = check_section({**section, **changes}, cls, "datasets.shapes_caption", ignore=cls.FROM_FRAMEWORK)
    return cls(name="shapes_caption", cache_root=Path("nowhere"), **checked)


def test_sizes_are_the_builders_parameters_and_nothing_is_missing() -> None:
    made = builder(train_size=30, val_size=4)
    assert made.missing() == []
    assert {split: len(dataset) for split, dataset in made.build_datasets().items()} == {
        "train": 30,
        "val": 4,
        "test": 500,
    }


def test_images_are_the_drawn_ones() -> None:
    sample = builder().get_split("val")[7]
    pixels = sample["image"].permute(1, 2, 0).numpy() * CLIP_STD + np.array(CLIP_MEAN)
    assert np.array_equal(np.rint(pixels * 255), draw(scene("val", 7)))
    assert (sample["image_id"], sample["instance_id"]) == (7, "7")
    assert "text_input" not in sample


def test_training_captions_are_one_of_the_scenes_five_by_the_sample_seed() -> None:
    dataset = builder().get_split("train")

    def caption(seed: int) -> str:
        torch.manual_seed(seed)
        return dataset[5]["text_input"]

    seen = {caption(seed) for seed in range(40)}
    assert seen == set(captions(scene("train", 5))) and len(seen) == 5
    assert caption(3) == caption(3)


def test_references_are_all_five_captions_of_every_scene() -> None:
    references = builder(test_size=6).get_split("test").references()
    assert references == {i: captions(scene("test", i)) for i in range(6)}


def test_another_seed_is_another_world() -> None:
    first, second = (builder(seed=seed, val_size=5).get_split("val").references() for seed in (0, 1))
    assert all(first[i] != second[i] for i in range(5))


def test_index_beyond_the_size_ends_iteration() -> None:
    assert len(list(builder(val_size=3).get_split("val"))) == 3


@pytest.mark.parametrize("size", [0, -5])
def test_empty_splits_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=r"datasets\.shapes_caption\.train_size.*at least 1"):
        builder(train_size=size)


@pytest.mark.parametrize("data_type", ["videos", "scenes"])
def test_scenes_are_shown_as_what_the_name_says(data_type: str) -> None:
    with pytest.raises(ConfigError, match=r"datasets\.shapes_caption\.data_type.*images.*" + data_type):
        builder(data_type=data_type)
