"""Videos of the Shapes world: what moves, what is seen when, and that captions say what lasts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from evlgen.common.registry import registry
from evlgen.config.schema import check_section
from evlgen.datasets.shapes.checker import check
from evlgen.datasets.shapes.reading import read
from evlgen.datasets.shapes.videos import (
    NUM_FRAMES,
    MovingScene,
    ShapesVideo,
    captions,
    is_true,
    moving_scene,
)
from evlgen.datasets.shapes.world import Scene, Shape, draw
from evlgen.files.io import PACKAGE_ROOT

VIDEOS = [moving_scene("train", i) for i in range(60)]


def cross(x: int, y: int, row: str, column: str, colour: str = "red") -> Shape:
    return Shape("cross", colour, "large", row, column, x, y, 8.0, (214, 40, 40))


def made_by_hand() -> MovingScene:
    """A red cross that moves along the top from left to right, and a blue one at the bottom left that comes
    half-way."""
    blue = cross(11, 53, "bottom", "left", "blue")
    first, last = (
        Scene("test", 0, 0, (cross(x, 11, "top", column), blue), (232, 232, 228))
        for x, column in ((11, "left"), (53, "right"))
    )
    return MovingScene(first, last, True, ((0, 8), (4, 8)))


def moment(scene: MovingScene, index: int) -> Scene:
    """All shapes where they are at a frame, seen or not."""
    shapes = tuple(
        dataclasses.replace(
            a,
            x=round(a.x + (b.x - a.x) * index / (NUM_FRAMES - 1)),
            y=round(a.y + (b.y - a.y) * index / (NUM_FRAMES - 1)),
        )
        for a, b in zip(scene.first.shapes, scene.last.shapes, strict=True)
    )
    return dataclasses.replace(scene.first, shapes=shapes)


def test_frames_show_the_shapes_that_are_there_where_they_are():
    scene = made_by_hand()
    frames = ShapesVideo(scene).read([0, 3, 7])
    red, blue = (scene.first.shapes[0], scene.first.shapes[1])
    assert np.array_equal(frames[0], draw(dataclasses.replace(scene.first, shapes=(red,))))
    moved = dataclasses.replace(red, x=29)  # 11 + 42 * 3 / 7
    assert np.array_equal(frames[1], draw(dataclasses.replace(scene.first, shapes=(moved,))))
    at_the_end = (dataclasses.replace(red, x=53), blue)
    assert np.array_equal(frames[2], draw(dataclasses.replace(scene.first, shapes=at_the_end)))


@pytest.mark.parametrize(
    ("caption", "true"),
    [
        ("a red cross at the top and a blue cross at the bottom left", True),
        ("a blue cross below a red cross", True),
        ("a red cross at the top left and a blue cross at the bottom left", False),  # only at first
        ("a red cross at the top right and a blue cross at the bottom left", False),  # only at last
        ("a red cross to the right of a blue cross", False),  # at first it is above
        ("a red cross at the top", False),  # leaves out what comes later
        ("a red cross and a blue cross", True),
    ],
)
def test_a_caption_is_true_that_is_so_from_first_to_last_and_leaves_nothing_out(caption, true):
    assert is_true(caption, made_by_hand()) == true


def test_every_caption_is_true_at_every_moment():
    for scene in VIDEOS[:30]:
        found = captions(scene)
        assert len(set(found)) == 5
        for index in (0, 2, 5, 7):
            assert all(check(text, moment(scene, index)) for text in found), scene.description


def test_a_video_is_the_same_each_time_and_in_one_split_only():
    moving_scene.cache_clear()
    assert [moving_scene("train", i) for i in range(5)] == VIDEOS[:5]
    assert captions(VIDEOS[3]) == captions(moving_scene("train", 3))
    others = {moving_scene(split, i).description for split in ("val", "test") for i in range(60)}
    assert not others & {scene.description for scene in VIDEOS}
    assert moving_scene("train", 0, seed=1) != VIDEOS[0]


def test_most_videos_show_what_no_single_frame_does():
    """The kinds and colours of the first frame are not all, or a place that it shows is not kept."""
    passing = [scene for scene in VIDEOS if len(set(scene.seen)) > 1]
    moving = [scene for scene in VIDEOS if scene.first.shapes != scene.last.shapes]
    assert len(passing) > 15 and len(moving) > 30
    assert len({*map(id, passing), *map(id, moving)}) > 45
    placed = [bool(read(text).claims) for scene in VIDEOS[:30] for text in captions(scene)]
    assert sum(placed) > 0.8 * len(placed)


def test_shapes_never_touch_and_always_one_is_seen():
    for scene in VIDEOS:
        for index in range(NUM_FRAMES):
            shapes = moment(scene, index).shapes
            assert any(index in range(*seen) for seen in scene.seen)
            for i, a in enumerate(shapes):
                assert all(max(abs(a.x - b.x), abs(a.y - b.y)) > 18 for b in shapes[:i])


def test_the_dataset_gives_videos_with_one_of_their_captions():
    cls = registry.get_builder_class("shapes_video_caption")
    section = OmegaConf.to_container(OmegaConf.load(PACKAGE_ROOT / cls.DEFAULT_CONFIG))["datasets"][
        "shapes_video_caption"
    ]
    for processor in section["vis_processor"].values():
        processor["image_size"] = 64
    checked = check_section(
        {**section, "train_size": 4, "test_size": 3}, cls, "datasets.x", ignore=cls.FROM_FRAMEWORK
    )
    builder = cls(name="shapes_video_caption", cache_root=Path("nowhere"), **checked)
    train, test = builder.get_split("train"), builder.get_split("test")
    torch.manual_seed(0)
    sample = train[2]
    assert sample["image"].shape == (3, 4, 64, 64) and sample["text_input"] in captions(VIDEOS[2])
    assert "text_input" not in test[0] and test[0]["image_id"] == 0
    references = test.references()
    assert references[1] == captions(moving_scene("test", 1))
    assert test.extra_metrics({i: texts[0] for i, texts in references.items()}) == {"true_captions": 1.0}
    assert test.extra_metrics({0: "nothing", 1: references[1][0]}) == {"true_captions": 0.5}
    shown, frames = np.asarray(test.image(0)), test.video(0).read([2, 4])
    assert shown.shape == (128, 128, 3)
    assert np.array_equal(shown[:64, 64:], frames[0]) and np.array_equal(shown[64:, :64], frames[1])
    assert test.visual_source(0) != train.visual_source(0)
