"""Captions and questions people might write under an image of the Shapes world.

Every caption names all shapes with their colours; some add sizes, positions or relations, each in words that
vary. What follows from a scene is deterministic, so a scene always has the same five captions and the same
questions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evlgen.datasets.shapes.world import COLOURS, COLUMNS, KINDS, ROWS, Scene, Shape

CAPTIONS_PER_SCENE = 5
NUMBERS = {1: "one", 2: "two", 3: "three"}
_SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big")}
_RELATIONS = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under", "beneath"),
}
_TO_IT = {
    "left": ("to its left", "to the left of it"),
    "right": ("to its right", "to the right of it"),
    "above": ("above it",),
    "below": ("below it", "under it"),
}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_OPENERS = (
    "a picture of",
    "an image of",
    "a photo of",
    "a drawing of",
    "this picture shows",
    "we see",
    "here we have",
)
_SHARE_WITH_SIZES, _SHARE_WITH_POSITIONS = 0.35, 0.3


@dataclass(frozen=True)
class Group:
    """Shapes of one kind and colour, which a caption names together."""

    members: tuple[Shape, ...]

    @property
    def kind(self) -> str:
        return self.members[0].kind

    @property
    def colour(self) -> str:
        return self.members[0].colour

    @property
    def size(self) -> str | None:
        """The one size all members have, or None."""
        first = self.members[0].size
        return first if all(s.size == first for s in self.members) else None


def captions(scene: Scene) -> list[str]:
    """Five different captions of a scene, lower case, without a full stop."""
    rng = random.Random(f"captions/{scene.seed}/{scene.split}/{scene.index}")
    found: dict[str, None] = {}
    while len(found) < CAPTIONS_PER_SCENE:
        found[write_caption(scene, rng)] = None
    return list(found)


def write_caption(scene: Scene, rng: random.Random) -> str:
    """One caption of a scene, by the choices of ``rng``."""
    groups = groups_of(scene)
    rng.shuffle(groups)
    with_sizes = rng.random() < _SHARE_WITH_SIZES
    phrases = [noun_phrase(group, rng, with_sizes) for group in groups]
    write = {1: _one_group, 2: _two_groups, 3: _three_groups}[len(groups)]
    return write(groups, phrases, rng)


def groups_of(scene: Scene) -> list[Group]:
    """The shapes of a scene, gathered by kind and colour."""
    together: dict[tuple[str, str], list[Shape]] = {}
    for shape in scene.shapes:
        together.setdefault((shape.kind, shape.colour), []).append(shape)
    return [Group(tuple(members)) for members in together.values()]


def relations(first: Group, second: Group) -> list[str]:
    """What ``first`` is to ``second``: left, right, above, below. Along the longer way only; both on a
    diagonal."""
    across = _order([s.column for s in first.members], [s.column for s in second.members], COLUMNS)
    down = _order([s.row for s in first.members], [s.row for s in second.members], ROWS)
    found = []
    if across and abs(across) >= abs(down):
        found.append("left" if across < 0 else "right")
    if down and abs(down) >= abs(across):
        found.append("above" if down < 0 else "below")
    return found


def _order(first: list[str], second: list[str], axis: tuple[str, ...]) -> int:
    """Steps from the second's nearest to the first's nearest member; 0 unless all are on one side of all."""
    a, b = [axis.index(v) for v in first], [axis.index(v) for v in second]
    if max(a) < min(b):
        return max(a) - min(b)
    return max(0, min(a) - max(b))


def noun_phrase(group: Group, rng: random.Random, with_size: bool) -> str:
    """``a large red circle``, ``two blue squares``: number, size if wanted and shared, colour, kind."""
    size = rng.choice(_SIZE_WORDS[group.size]) if with_size and group.size else ""
    count = len(group.members)
    if count > 1:
        number = "a pair of" if count == 2 and rng.random() < 0.15 else NUMBERS[count]
        return _words(number, size, group.colour, _plural(group.kind))
    if rng.random() < 0.04:
        return _words(_article(size or group.kind), size, group.kind, "that is", group.colour)
    first = size or group.colour
    article = _article(first) if rng.random() > 0.06 else "one"
    return _words(article, size, group.colour, group.kind)


def position_phrase(shape: Shape, rng: random.Random) -> str:
    """Where in the image: ``in the top left corner``, ``on the right side``, ``in the middle``."""
    if (shape.row, shape.column) == ("middle", "middle"):
        return rng.choice(("in the middle", "in the centre", "in the middle of the picture"))
    if shape.row == "middle":
        return rng.choice((f"on the {shape.column}", f"on the {shape.column} side"))
    if shape.column == "middle":
        return rng.choice((f"at the {shape.row}", f"at the {shape.row} of the picture"))
    return rng.choice((f"in the {shape.row} {shape.column} corner", f"at the {shape.row} {shape.column}"))


def _one_group(groups: list[Group], phrases: list[str], rng: random.Random) -> str:
    group, phrase = groups[0], phrases[0]
    if len(group.members) == 1:
        return _one_shape(group.members[0], phrase, rng)
    frames: list[Callable[[], str]] = [
        lambda: phrase,
        lambda: f"there are {phrase}",
        lambda: _opened(phrase, rng),
        lambda: f"{phrase} in the picture",
    ]
    if len(group.members) == 2:
        frames += [lambda: _pair(group, phrase, rng)] * 3
    return rng.choice(frames)()


def _one_shape(shape: Shape, phrase: str, rng: random.Random) -> str:
    where = position_phrase(shape, rng)
    return rng.choice(
        (
            phrase,
            f"there is {phrase}",
            _opened(phrase, rng),
            f"{phrase} {where}",
            f"{phrase} {where}",
            f"there is {phrase} {where}",
            f"{phrase} is {where}",
            f"{where} there is {phrase}",
            f"{_opened(phrase, rng)} {where}",
        )
    )


def _pair(group: Group, phrase: str, rng: random.Random) -> str:
    """Two shapes of one kind and colour, told apart by size or place."""
    first, second = group.members
    frames = []
    if first.size != second.size:
        frames.append(f"{phrase}, one large and one small")
        frames.append(f"{phrase}, a big one and a small one")
    if first.row == second.row:
        frames.append(f"{phrase} side by side")
        frames.append(
            f"{phrase}, one on the left and one on the right"
            if _apart(group)
            else f"{phrase} next to each other"
        )
    if first.column == second.column:
        frames.append(f"{phrase}, one above the other")
    for relation in relations(Group((first,)), Group((second,))):
        one = noun_phrase(Group((first,)), rng, False)
        frames.append(f"{one} {rng.choice(_RELATIONS[relation])} another {group.colour} {group.kind}")
    return rng.choice(frames)


def _apart(group: Group) -> bool:
    return {s.column for s in group.members} == {"left", "right"}


def _two_groups(groups: list[Group], phrases: list[str], rng: random.Random) -> str:
    (first, second), (a, b) = groups, phrases
    if rng.random() < _SHARE_WITH_POSITIONS and _all_single(groups):
        x, y = (position_phrase(g.members[0], rng) for g in groups)
        return rng.choice(
            (f"{a} {x} and {b} {y}", f"there is {a} {x} and {b} {y}", f"{x} there is {a} and {y} {b}")
        )
    plain = [f"{a} and {b}", _there(first, f"{a} and {b}"), _opened(f"{a} and {b}", rng), f"{a} with {b}"]
    if first.kind == second.kind and _all_single(groups):
        plain.append(f"two {_plural(first.kind)}, one {first.colour} and one {second.colour}")
        plain.append(
            f"{_article(first.colour)} {first.colour} and {_article(second.colour)} {second.colour} "
            f"{first.kind}"
        )
    found = relations(first, second)
    if not found or rng.random() < 0.35:
        return rng.choice(plain)
    return _related(first, a, second, b, found, rng)


def _related(first: Group, a: str, second: Group, b: str, found: list[str], rng: random.Random) -> str:
    relation = rng.choice(found)
    words = rng.choice(_RELATIONS[relation])
    frames = [
        f"{a} {words} {b}",
        f"{a} {words} {b}",
        f"{a} {_is(first)} {words} {b}",
        f"{words} {b} there {_is(first)} {a}",
        f"{_there(first, a)} {words} {b}",
        f"{_opened(a, rng)} {words} {b}",
    ]
    if len(first.members) == 1:
        frames.append(f"{a} with {b} {rng.choice(_TO_IT[_OPPOSITE[relation]])}")
    if len(found) == 2:
        frames.append(f"{a} {found[1]} and to the {found[0]} of {b}")
    return rng.choice(frames)


def _three_groups(groups: list[Group], phrases: list[str], rng: random.Random) -> str:
    first, second, third = groups
    a, b, c = phrases
    every = f"{a}, {b} and {c}"
    plain = [every, every, f"there are {every}", _opened(every, rng), f"{a} and {b} with {c}"]
    related: list[str] = []
    for relation in relations(first, second):
        words = rng.choice(_RELATIONS[relation])
        related += [f"{a} {words} {b}, and {c}", f"{a} is {words} {b}, and there is {c}"]
        if second.kind not in (first.kind, third.kind):
            for other in relations(third, second):
                more = rng.choice(_RELATIONS[other])
                related.append(f"{a} {words} {b}, and {c} {more} the {second.kind}")
    for relation in _in_both(relations(first, third), relations(second, third)):
        related.append(f"{a} and {b} are {rng.choice(_RELATIONS[relation])} {c}")
    for relation in _in_both(relations(first, second), relations(first, third)):
        related.append(f"{a} {rng.choice(_RELATIONS[relation])} {b} and {c}")
    if rng.random() < _SHARE_WITH_POSITIONS / 2:
        x, y, z = (position_phrase(g.members[0], rng) for g in groups)
        return f"{a} {x}, {b} {y} and {c} {z}"
    return rng.choice(related if related and rng.random() < 0.5 else plain)


def _in_both(relations: Sequence[str], others: Sequence[str]) -> list[str]:
    """In the order of the first: that of a set differs between processes, and the generator is drawn from."""
    return [relation for relation in relations if relation in others]


def _opened(phrase: str, rng: random.Random) -> str:
    return f"{rng.choice(_OPENERS)} {phrase}"


def _there(group: Group, phrase: str) -> str:
    return f"there {_is(group)} {phrase}"


def _is(group: Group) -> str:
    return "is" if len(group.members) == 1 else "are"


def _all_single(groups: list[Group]) -> bool:
    return all(len(group.members) == 1 for group in groups)


def _plural(kind: str) -> str:
    return kind + ("es" if kind.endswith("s") else "s")


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _words(*words: str) -> str:
    return " ".join(word for word in words if word)


def questions(scene: Scene) -> list[tuple[str, str]]:
    """Questions with one right answer each, in a fixed order: colours, kinds, counts, sizes, places, yes and
    no."""
    rng = random.Random(f"questions/{scene.seed}/{scene.split}/{scene.index}")
    shapes = scene.shapes
    asked = [("how many shapes are there?", NUMBERS[len(shapes)])]
    for kind in dict.fromkeys(s.kind for s in shapes):
        asked += _about_kind(kind, [s for s in shapes if s.kind == kind])
    for colour in dict.fromkeys(s.colour for s in shapes):
        kinds = [s.kind for s in shapes if s.colour == colour]
        asked.append((f"how many {colour} shapes are there?", NUMBERS[len(kinds)]))
        if len(kinds) == 1:
            asked.append((f"what shape is {colour}?", kinds[0]))
    asked += _yes_and_no(scene, rng)
    return asked


def _about_kind(kind: str, shapes: list[Shape]) -> list[tuple[str, str]]:
    asked = [(f"how many {_plural(kind)} are there?", NUMBERS[len(shapes)])]
    if len(shapes) == 1:
        shape = shapes[0]
        asked.append((f"what colour is the {kind}?", shape.colour))
        asked.append((f"is the {kind} large or small?", shape.size))
        asked.append((f"where is the {kind}?", _place(shape)))
    return asked


def _place(shape: Shape) -> str:
    if shape.row == shape.column == "middle":
        return "in the middle"
    return " ".join(word for word in (shape.row, shape.column) if word != "middle")


def _yes_and_no(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """As many questions to be answered by yes as by no, so that neither answer pays blindly."""
    there = rng.choice(scene.shapes)
    kind, colour = there.kind, there.colour
    while any((s.kind, s.colour) == (kind, colour) for s in scene.shapes):
        kind, colour = rng.choice(
            ((rng.choice(KINDS), there.colour), (there.kind, rng.choice(tuple(COLOURS))))
        )
    asked = [
        (f"is there {_article(there.colour)} {there.colour} {there.kind}?", "yes"),
        (f"is there {_article(colour)} {colour} {kind}?", "no"),
    ]
    lonely = [g for g in groups_of(scene) if [s.kind for s in scene.shapes].count(g.kind) == 1]
    if len(lonely) > 1:
        first, second = rng.sample(lonely, 2)
        for relation in relations(first, second):
            asked.append((f"is the {first.kind} {_RELATIONS[relation][0]} the {second.kind}?", "yes"))
            asked.append(
                (f"is the {first.kind} {_RELATIONS[_OPPOSITE[relation]][0]} the {second.kind}?", "no")
            )
    return asked
