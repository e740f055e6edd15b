"""Scenes, images, captions and questions of the Shapes world."""

from __future__ import annotations

import numpy as np
import pytest

from evlgen.common.errors import DataError
from evlgen.datasets.shapes.captions import captions, questions
from evlgen.datasets.shapes.documents import blended_bag, document, tag_line, word_bag
from evlgen.datasets.shapes.world import COLOURS, KINDS, SPLITS, coverage, describe, draw, scene


def test_a_scene_follows_from_split_index_and_seed_alone():
    later = scene("train", 17)
    assert scene("train", 3) == scene("train", 3)
    assert scene("train", 17) == later
    assert scene("train", 3, seed=1) != scene("train", 3)
    assert np.array_equal(draw(scene("val", 5)), draw(scene("val", 5)))


def test_the_first_scene_and_its_image_never_change():
    """Bundled weights were trained on this world: another world under the same name would break them."""
    first = scene("train", 0)
    assert first.description == "small black heart bottom middle"
    assert captions(first)[0] == "there is a black heart"
    image = draw(first)
    shape = first.shapes[0]
    assert tuple(image[shape.y, shape.x]) == shape.rgb


def test_splits_share_no_scene():
    found = {split: {scene(split, i).description for i in range(1500)} for split in SPLITS}
    assert not found["train"] & found["val"]
    assert not found["train"] & found["test"]
    assert not found["val"] & found["test"]


def test_a_description_does_not_depend_on_the_order_of_shapes():
    shapes = scene("train", 7).shapes
    assert len(shapes) == 3
    assert describe(shapes) == describe(shapes[::-1])


def test_a_split_that_is_not_there_is_named_with_the_nearest():
    with pytest.raises(DataError, match="'trian'.*Did you mean 'train'"):
        scene("trian", 0)
    with pytest.raises(DataError, match="-1 is negative"):
        scene("train", -1)


def test_images_are_64_by_64_rgb_and_show_every_shape_in_its_colour():
    for i in range(200):
        item = scene("val", i)
        image = draw(item)
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        for shape in item.shapes:
            distance = np.abs(image[shape.y, shape.x].astype(int) - shape.rgb).max()
            assert distance <= 1, f"{shape} has another colour at its centre"


def test_shapes_of_a_scene_do_not_overlap_and_stay_inside():
    for i in range(300):
        shapes = scene("train", i).shapes
        for n, a in enumerate(shapes):
            assert a.radius <= min(a.x, a.y) and max(a.x, a.y) + a.radius <= 64
            for b in shapes[n + 1 :]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius


def test_the_same_description_gives_different_images():
    seen: dict[str, np.ndarray] = {}
    for i in range(3000):
        item = scene("train", i)
        if item.description in seen:
            assert not np.array_equal(seen[item.description], draw(item))
            return
        seen[item.description] = draw(item)
    pytest.fail("no description came twice in 3,000 scenes")


def test_coverage_is_the_share_of_each_patch_a_shape_covers():
    item = next(s for s in (scene("train", i) for i in range(100)) if s.shapes[0].kind == "square")
    covered = coverage(item)
    assert covered.shape == (len(item.shapes), 8, 8)
    side = 1.8 * item.shapes[0].radius
    assert covered[0].sum() * 64 == pytest.approx(side**2, rel=0.08)


def test_guessing_does_not_pay():
    """No kind with colour is in more than a twelfth of the images, and few images repeat a
    description."""
    scenes = [scene("test", i) for i in range(1000)]
    for kind in KINDS:
        for colour in COLOURS:
            share = np.mean(
                [any((s.kind, s.colour) == (kind, colour) for s in item.shapes) for item in scenes]
            )
            assert share < 1 / 12, (kind, colour, share)
    assert len({s.description for s in scenes}) > 850


def test_every_scene_has_five_different_captions_that_never_change():
    for i in range(300):
        item = scene("val", i)
        lines = captions(item)
        assert len(set(lines)) == 5
        assert lines == captions(item)
        assert all(line == line.lower().strip() and "\n" not in line for line in lines)


def test_captions_vary_in_their_words():
    words = {word for i in range(500) for line in captions(scene("train", i)) for word in line.split()}
    assert {"left", "right", "above", "below", "two", "three", "tiny", "big", "corner", "another"} <= words


def test_questions_have_the_answers_the_scene_gives():
    item = next(s for s in (scene("train", i) for i in range(50)) if s.description.count(";") == 2)
    asked = dict(questions(item))
    assert asked["how many shapes are there?"] == "three"
    for shape in item.shapes:
        if [s.kind for s in item.shapes].count(shape.kind) == 1:
            assert asked[f"what colour is the {shape.kind}?"] == shape.colour
            assert asked[f"is the {shape.kind} large or small?"] == shape.size


def test_yes_and_no_are_equally_often_right():
    answers = [a for i in range(500) for _, a in questions(scene("train", i)) if a in ("yes", "no")]
    assert answers.count("yes") == answers.count("no")


def test_documents_say_the_scene_before_and_after():
    import random

    item, rng = scene("train", 7), random.Random(0)
    words = {w for s in item.shapes for w in (s.size, s.colour, s.kind, s.row, s.column)}
    for bag in (word_bag(item, rng), blended_bag(item, rng)):
        assert words <= {w for position in bag for w in position}
        assert len(bag) <= 28
    assert words == set(tag_line(item, rng).replace(",", "").split())
    texts = [document(item, random.Random(n)) for n in range(50)]
    assert all(t.text.endswith("\n") and len(t.text) > 10 for t in texts)
    assert any("Short answer:" in t.text for t in texts) and any(not t.bag for t in texts)
