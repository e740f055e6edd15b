"""Text that describes one scene several times over: what the bundled language model is trained on.

A language model that has only ever read single captions has no use for what stands before one, so soft
prompts cannot steer it. In these documents later lines depend on earlier ones: captions, the same in other
words, lists of attributes, questions with answers. Many documents open with a *bag*: words of the scene in no
order a sentence would have, several of them possibly sharing one position, as soft prompts will stand before
a caption later.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from evlgen.datasets.shapes.captions import captions, questions, write_caption
from evlgen.datasets.shapes.world import Scene, Shape

_FILLERS = ("plain", "background", "nothing")
_MAX_BAG = 20
_SHARE_WITH_BAG = 0.85
_SHARE_BLENDED = 0.85  # of the bags
_SHARE_CAPTION_FIRST = 0.75  # of the texts after a bag


@dataclass(frozen=True)
class Document:
    """``bag``: words per position, read before ``text``; ``text``: lines that each end in a line break."""

    bag: tuple[tuple[str, ...], ...]
    text: str


def document(scene: Scene, rng: random.Random) -> Document:
    """One document about a scene, by the choices of ``rng``."""
    if rng.random() >= _SHARE_WITH_BAG:
        lines = _lines(scene, rng)
        if rng.random() < 0.5:
            lines.insert(0, tag_line(scene, rng))
        return Document((), _text(lines))
    bag = blended_bag(scene, rng) if rng.random() < _SHARE_BLENDED else word_bag(scene, rng)
    lines = _lines(scene, rng)
    if rng.random() < _SHARE_CAPTION_FIRST:
        lines.insert(0, write_caption(scene, rng))
    return Document(bag, _text(lines))


def question_line(question: str, answer: str) -> str:
    """``Question: is there a red circle? Short answer: yes``."""
    return f"Question: {question} Short answer: {answer}"


def tag_line(scene: Scene, rng: random.Random) -> str:
    """Attributes of every shape in shuffled order: ``circle red top large left, small blue ...``."""
    shapes = list(scene.shapes)
    rng.shuffle(shapes)
    return ", ".join(" ".join(_shuffled(_attributes(shape), rng)) for shape in shapes)


def word_bag(scene: Scene, rng: random.Random) -> tuple[tuple[str, ...], ...]:
    """One word per position; the words of a shape stand together, shapes may come twice, fillers in
    between."""
    positions: list[tuple[str, ...]] = []
    for shape in _with_repeats(scene, rng, most=4):
        positions += [(word,) for word in _shuffled(_attributes(shape), rng)]
        positions += [(rng.choice(_FILLERS),)] * rng.choice((0, 0, 1, 2))
    return tuple(positions[:_MAX_BAG])


def blended_bag(scene: Scene, rng: random.Random) -> tuple[tuple[str, ...], ...]:
    """Several words per position: every position knows most of one shape, or is filler, in any order."""
    positions = []
    for i, shape in enumerate(_with_repeats(scene, rng, most=6)):
        words = _shuffled(_attributes(shape), rng)
        partial = i >= len(scene.shapes) and rng.random() < 0.5
        positions.append(tuple(words[: rng.randint(3, 5)] if partial else words))
    positions += [(rng.choice(_FILLERS),)] * rng.randint(0, _MAX_BAG - len(positions))
    rng.shuffle(positions)
    return tuple(positions)


def _attributes(shape: Shape) -> list[str]:
    return [shape.size, shape.colour, shape.kind, shape.row, shape.column]


def _with_repeats(scene: Scene, rng: random.Random, most: int) -> list[Shape]:
    """Every shape in a random order, then up to ``most`` in all with repeats."""
    shapes = list(scene.shapes)
    rng.shuffle(shapes)
    return shapes + rng.choices(shapes, k=rng.randint(0, most - len(shapes)))


def _shuffled(words: list[str], rng: random.Random) -> list[str]:
    return rng.sample(words, len(words))


def _lines(scene: Scene, rng: random.Random) -> list[str]:
    """One or two captions and up to two questions, in any order."""
    asked = questions(scene)
    lines = [question_line(*pair) for pair in rng.sample(asked, rng.randint(0, 2))]
    lines += [write_caption(scene, rng) for _ in range(rng.randint(1, 2))]
    rng.shuffle(lines)
    return lines


def _text(lines: list[str]) -> str:
    return "".join(line + "\n" for line in lines)


def corpus_lines(scene: Scene) -> list[str]:
    """All captions and questions of a scene, for the tokenizer."""
    return captions(scene) + [question_line(*pair) for pair in questions(scene)]
