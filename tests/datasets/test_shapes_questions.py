"""Questions about the Shapes world: right answers, none of which pays blindly."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from evlgen.common.errors import DataError
from evlgen.common.registry import registry
from evlgen.config.schema import check_section
from evlgen.datasets.shapes.questions import ANSWERS, QUESTION_KINDS, Question, question
from evlgen.datasets.shapes.world import COLOURS, COLUMNS, KINDS, ROWS, draw, scene
from evlgen.datasets.shapes_vqa_dataset import ShapesVQABuilder
from evlgen.files.io import PACKAGE_ROOT
from evlgen.tasks.metrics.vqa_accuracy import vqa_accuracy

NUMBER_WORDS = {"one": 1, "two": 2, "three": 3}


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    return [question("train", i) for i in range(2100)]


def builder(**changes) -> ShapesVQABuilder:
    cls = registry.get_builder_class("shapes_vqa")
    section = OmegaConf.to_container(OmegaConf.load(PACKAGE_ROOT / cls.DEFAULT_CONFIG).datasets.shapes_vqa)
    for processor in section["vis_processor"].values():
        processor["image_size"] = 64
    checked = check_section({**section, **changes}, cls, "datasets.shapes_vqa", ignore=cls.FROM_FRAMEWORK)
    return cls(name="shapes_vqa", cache_root=Path("nowhere"), **checked)


def named(text: str) -> tuple[str | None, str | None]:
    """The kind and the colour that a question names."""
    words = set(re.findall(r"\w+", text))
    kinds = [kind for kind in KINDS if words & {kind, f"{kind}s", f"{kind}es"}]
    colours = [colour for colour in COLOURS if colour in words]
    return next(iter(kinds), None), next(iter(colours), None)


def true_answer(q: Question) -> str:
    """The answer, worked out from the shapes."""
    kind, colour = named(q.text)
    shapes = [s for s in q.scene.shapes if kind in (None, s.kind) and colour in (None, s.colour)]
    if q.kind == "number":
        return next(word for word, count in NUMBER_WORDS.items() if count == len(shapes))
    if q.kind == "presence":
        return "yes" if shapes else "no"
    if q.kind == "relation":
        return "yes" if _is_so(q) else "no"
    (shape,) = shapes
    if q.kind == "place":
        place = " ".join(w for w in (shape.row, shape.column) if w != "middle")
        return place or "in the middle"
    return {"colour": shape.colour, "shape": shape.kind, "size": shape.size}[q.kind]


def _is_so(q: Question) -> bool:
    first, relation, second = re.fullmatch(r"is the (\w+) (.+) the (\w+)\?", q.text).groups()
    (word,) = set(relation.split()) & {"left", "right", "above", "below"}
    a, b = ([s for s in q.scene.shapes if s.kind == kind] for kind in (first, second))
    axis, key = (COLUMNS, "column") if word in ("left", "right") else (ROWS, "row")
    steps = [axis.index(getattr(x, key)) - axis.index(getattr(y, key)) for x in a for y in b]
    return all(step < 0 if word in ("left", "above") else step > 0 for step in steps)


def test_every_answer_is_right_about_its_scene_and_among_those_to_rank(asked) -> None:
    for q in asked:
        assert q.answer == true_answer(q), (q.text, q.scene.description)
        assert q.answer in ANSWERS
    assert {q.answer for q in asked} == set(ANSWERS)


def test_a_question_follows_from_split_index_and_seed_alone() -> None:
    first = question("val", 5)
    question("val", 6)
    question.cache_clear()
    assert question("val", 5) == first
    assert question("val", 5, seed=1) != first and question("test", 5) != first
    assert first.scene == scene("val", first.scene.index)
    with pytest.raises(DataError, match="no split 'vla'"):
        question("vla", 5)


def test_who_has_not_seen_the_image_is_right_once_in_three(asked) -> None:
    """The best constant answer to each kind of question, and the best to each very wording."""
    kinds = defaultdict(Counter)
    for q in asked:
        kinds[q.kind][q.answer] += 1
    share = {kind: max(c.values()) / c.total() for kind, c in kinds.items()}
    assert set(share) == set(QUESTION_KINDS)
    most = {"number": 0.48, "colour": 0.2, "shape": 0.24, "size": 0.57, "place": 0.2, "presence": 0.57}
    assert all(share[kind] <= limit for kind, limit in {**most, "relation": 0.57}.items())
    sizes = {kind: c.total() for kind, c in kinds.items()}
    assert min(sizes.values()) > 0.7 * max(sizes.values())
    assert sum(max(c.values()) for c in kinds.values()) / len(asked) < 0.36

    half = len(asked) // 2  # learned by heart from one half, tried on the other
    wordings = defaultdict(Counter)
    for q in asked[:half]:
        wordings[q.text][q.answer] += 1
    guesses = [(wordings[q.text].most_common(1) or [("", 0)])[0][0] == q.answer for q in asked[half:]]
    assert np.mean(guesses) < 0.38


def test_training_samples_have_the_answer_and_others_have_not() -> None:
    train, val = builder().get_split("train"), builder(val_size=7).get_split("val")
    learned, asked = train[3], val[3]
    expected = question("train", 3)
    assert np.array_equal(np.asarray(train.image(3)), draw(expected.scene))
    assert learned.pop("image").shape == asked.pop("image").shape == (3, 64, 64)
    assert learned == {
        "text_input": expected.text,
        "text_output": expected.answer,
        "question_id": 3,
        "instance_id": "3",
    }
    expected = question("val", 3)
    assert asked == {
        "text_input": expected.text,
        "question_id": 3,
        "image_id": expected.scene.index,
        "instance_id": "3",
    }
    assert len(val) == 7 and set(map(len, val.answers().values())) == {10}
    assert val.answer_types()[3] == expected.kind and expected.answer in val.answer_list()


def test_what_the_language_model_says_is_right_by_vqas_accuracy() -> None:
    dataset = builder(val_size=400).get_split("val")
    said = [question("val", i).answer for i in range(400)]
    for i, answers in dataset.answers().items():
        assert vqa_accuracy(said[i], answers) == 1.0
        assert vqa_accuracy("green" if said[i] == "red" else "red", answers) == 0.0
    assert {"two", "in the middle"} < set(said)


def test_images_of_training_are_in_no_other_split() -> None:
    found = {s: {question(s, i).scene.description for i in range(120)} for s in ("train", "val", "test")}
    assert not found["train"] & (found["val"] | found["test"])


def test_images_are_told_apart_by_their_scene() -> None:
    dataset = builder().get_split("val")
    other = builder(seed=1).get_split("val")
    assert dataset.visual_source(2) == f"shapes/0/val/{question('val', 2).scene.index}"
    assert dataset.visual_source(2) != other.visual_source(2)
