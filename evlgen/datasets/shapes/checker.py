"""Is a caption true to a scene of the Shapes world, and does it leave nothing out?

This reads English and knows nothing about how captions are written: noun phrases, relations and positions
become constraints on shapes, and a caption is true when its noun phrases can be given to the scene's shapes
so that every constraint holds, every shape is named, and every shape's colour is said. Words it does not know
make a caption untrue.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from evlgen.datasets.shapes.reading import Claim, Mention, Reading, read
from evlgen.datasets.shapes.world import IMAGE_SIZE, Scene, Shape

_CLEARLY = 10  # pixels between centres from which one shape is left of, or above, another
_NEAR = 34  # pixels between centres up to which shapes are next to each other
_THIRD = IMAGE_SIZE / 3
_LOW_MIDDLE_HIGH = {"top": 0, "left": 0, "middle": 1, "bottom": 2, "right": 2}

Assignment = dict[int, tuple[Shape, ...]]


@dataclass(frozen=True)
class Verdict:
    """``true``: the caption says only what is so, and names everything; otherwise ``reasons`` say what is
    wrong."""

    true: bool
    reasons: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.true


def check(caption: str, scene: Scene) -> Verdict:
    """Compares a caption with the scene it should describe."""
    return judge(read(caption), scene)


def judge(reading: Reading, scene: Scene) -> Verdict:
    """Compares what a caption says with a scene; for captions that are compared with several."""
    if reading.unknown:
        return Verdict(False, tuple(f"cannot read '{word}'" for word in reading.unknown))
    if not reading.mentions:
        return Verdict(False, ("names no shape",))
    fits = list(_assignments(reading, scene.shapes))
    if not fits:
        return Verdict(False, _missing_shapes(reading, scene.shapes))
    complete = [fit for fit in fits if not _left_out(reading, fit, scene.shapes)]
    if not complete:
        return Verdict(False, min((_left_out(reading, fit, scene.shapes) for fit in fits), key=len))
    wrong = min((_wrong_claims(reading, fit) for fit in complete), key=len)
    return Verdict(not wrong, wrong)


def _assignments(reading: Reading, shapes: tuple[Shape, ...]) -> Iterator[Assignment]:
    """Every way to give each mention shapes that look as it says; new mentions share none."""

    def extend(index: int, given: Assignment, free: tuple[Shape, ...]) -> Iterator[Assignment]:
        if index == len(reading.mentions):
            yield given
            return
        mention = reading.mentions[index]
        if mention.same_as is not None:
            pool, rest = given[mention.same_as], free
        elif mention.part_of is not None:
            siblings = [m for m in range(index) if reading.mentions[m].part_of == mention.part_of]
            taken = {id(shape) for m in siblings for shape in given[m]}
            pool, rest = tuple(s for s in given[mention.part_of] if id(s) not in taken), free
        else:
            pool, rest = free, None
        for chosen in itertools.combinations(pool, mention.count):
            if all(_looks(shape, mention) for shape in chosen):
                left = rest if rest is not None else tuple(s for s in free if s not in chosen)
                yield from extend(index + 1, {**given, index: chosen}, left)

    yield from extend(0, {}, shapes)


def _looks(shape: Shape, mention: Mention) -> bool:
    said = ((mention.kind, shape.kind), (mention.colour, shape.colour), (mention.size, shape.size))
    return all(word is None or word == fact for word, fact in said)


def _missing_shapes(reading: Reading, shapes: tuple[Shape, ...]) -> tuple[str, ...]:
    """Reasons when no assignment exists: mentions nothing in the scene looks like, or too many mentions."""
    found = [
        f"there is no '{m.text}'" if m.count == 1 else f"there are not '{m.text}'"
        for m in reading.mentions
        if sum(_looks(shape, m) for shape in shapes) < m.count
    ]
    return tuple(found) or ("names more shapes than there are",)


def _left_out(reading: Reading, fit: Assignment, shapes: tuple[Shape, ...]) -> tuple[str, ...]:
    named = {id(s) for chosen in fit.values() for s in chosen}
    coloured = {id(s) for index, chosen in fit.items() if reading.mentions[index].colour for s in chosen}
    kinds = {id(s) for index, chosen in fit.items() if reading.mentions[index].kind for s in chosen}
    reasons = []
    for shape in shapes:
        if id(shape) not in named:
            reasons.append(f"leaves out the {shape.colour} {shape.kind}")
        elif id(shape) not in coloured:
            reasons.append(f"does not say that the {shape.kind} is {shape.colour}")
        elif id(shape) not in kinds:
            reasons.append(f"does not say that the {shape.colour} shape is a {shape.kind}")
    return tuple(reasons)


def _wrong_claims(reading: Reading, fit: Assignment) -> tuple[str, ...]:
    return tuple(f"not so: '{claim.text}'" for claim in reading.claims if not _holds(claim, fit))


def _holds(claim: Claim, fit: Assignment) -> bool:
    subjects = [shape for index in claim.subjects for shape in fit[index]]
    objects = [shape for index in claim.objects for shape in fit[index]]
    if claim.about == "place":
        return all(_stands(shape, claim.words) for shape in subjects)
    if claim.about == "arrangement":
        return _arranged(subjects, claim.words[0])
    return all(_related(a, b, word) for a in subjects for b in objects for word in claim.words)


def _related(a: Shape, b: Shape, word: str) -> bool:
    if a is b:
        return False
    if word == "near":
        return (a.x - b.x) ** 2 + (a.y - b.y) ** 2 <= _NEAR**2
    gap = {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[word]
    return gap >= _CLEARLY


def _stands(shape: Shape, words: tuple[str, ...]) -> bool:
    """Whether a shape is in the named third or thirds of the image; ``middle`` alone is the middle of
    both."""
    row = {int(shape.y // _THIRD)}
    column = {int(shape.x // _THIRD)}
    if words in (("middle",), ("middle", "middle")):
        return row == column == {1}
    for word in words:
        axis = (
            row
            if word in ("top", "bottom")
            else column
            if word in ("left", "right")
            else _other_axis(words, row, column)
        )
        if axis != {_LOW_MIDDLE_HIGH[word]}:
            return False
    return True


def _other_axis(words: tuple[str, ...], row: set[int], column: set[int]) -> set[int]:
    """``middle`` beside ``left`` or ``right`` is about the row, beside ``top`` or ``bottom`` about the
    column."""
    return row if {"left", "right"} & set(words) else column


def _arranged(shapes: list[Shape], how: str) -> bool:
    xs, ys = [s.x for s in shapes], [s.y for s in shapes]
    level, upright = max(ys) - min(ys) < _CLEARLY, max(xs) - min(xs) < _CLEARLY
    if how == "beside":
        return level and not upright
    if how == "stacked":
        return upright and not level
    return (level or upright) and len(shapes) > 1  # in a row
