"""Short videos of the Shapes world: shapes move, come and go, and captions say what no single frame shows.

A video has one to three shapes, each in a track of its own: a row of the grid in videos whose shapes move
sideways, a column in those whose shapes move up or down. In the outer tracks a shape may move from one end to
the other; and where there are several, one may be seen in only the first or only the second half of the
video.

What has to be seen over time: which shapes there are, as one may come late or be gone; and where they are.
Captions say of a place or a relation only what holds from the first moment to the last. A star that stays in
the corner is `in the top left corner`; one that starts there is `at the top` when it moves sideways and `on
the left` when it moves down. No caption says which way something moves, for two reasons: the bundled language
model has no words for it, and attention over frames, which knows no order among them, could not tell.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from evlgen.datasets.shapes.captions import CAPTIONS_PER_SCENE, write_caption
from evlgen.datasets.shapes.checker import judge
from evlgen.datasets.shapes.reading import Reading, read
from evlgen.datasets.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    SHAPE_COUNTS,
    Scene,
    Shape,
    draw,
    random_shape,
    split_of,
)
from evlgen.media.video import VideoSource

NUM_FRAMES = 8
_SHARE_MOVING = 0.7  # of the shapes in outer tracks
_SHARE_PASSING = 0.6  # of the videos of several shapes: those in which one comes or goes
_SHARE_WITHOUT_PLACE = 0.2  # of the captions that say nothing of places which are kept all the same


@dataclass(frozen=True)
class MovingScene:
    """The shapes of a video at its first moment and at its last, in the same order.

    Args:
        sideways: shapes that move keep their row; else their column.
        seen: of each shape the frames in which it is drawn, from the first to before the second.
    """

    first: Scene
    last: Scene
    sideways: bool
    seen: tuple[tuple[int, int], ...]

    @property
    def description(self) -> str:
        """What makes this video another than the next, as `world.Scene.description`."""
        parts = zip(self.first.shapes, self.last.shapes, self.seen, strict=True)
        return "; ".join(sorted(f"{_words(a)} to {b.row} {b.column} in {seen}" for a, b, seen in parts))

    def frame(self, index: int) -> np.ndarray:
        """uint8 RGB [64, 64, 3]."""
        along = index / (NUM_FRAMES - 1)
        parts = zip(self.first.shapes, self.last.shapes, self.seen, strict=True)
        shapes = tuple(_between(a, b, along) for a, b, seen in parts if index in range(*seen))
        return draw(dataclasses.replace(self.first, shapes=shapes))


class ShapesVideo(VideoSource):
    """The frames of a moving scene, drawn when they are asked for."""

    def __init__(self, scene: MovingScene) -> None:
        self.scene = scene

    def __len__(self) -> int:
        return NUM_FRAMES

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        return map(self.scene.frame, indices)


@lru_cache(maxsize=16)  # a sample's video and its captions ask for the same one in turn
def moving_scene(split: str, index: int, seed: int = 0) -> MovingScene:
    """The video number ``index`` of a split; follows from the arguments alone, and is in no other split."""
    rng = random.Random(f"clips/{seed}/{split}/{index}")
    while True:
        made = _random_video(split, index, seed, rng)
        if split_of(made.description) == split:
            return made


def captions(scene: MovingScene) -> list[str]:
    """Five different captions of a video, true from its first moment to its last."""
    first = scene.first
    rng = random.Random(f"clip captions/{first.seed}/{first.split}/{first.index}")
    lasting = _lasting(scene)
    found: dict[str, None] = {}
    while len(found) < CAPTIONS_PER_SCENE:
        text = write_caption(lasting, rng)
        reading = read(text)
        if (reading.claims or rng.random() < _SHARE_WITHOUT_PLACE) and _holds(reading, scene):
            found[text] = None
    return list(found)


def is_true(caption: str, scene: MovingScene) -> bool:
    """Whether a caption is true of a video and leaves none of its shapes out: it is so at the first moment
    and at the last, and hence between, as shapes move on straight lines."""
    return _holds(read(caption), scene)


def _holds(reading: Reading, scene: MovingScene) -> bool:
    return all(judge(reading, moment) for moment in dict.fromkeys((scene.first, scene.last)))


def _random_video(split: str, index: int, seed: int, rng: random.Random) -> MovingScene:
    sideways = rng.random() < 0.5
    tracks = rng.sample(range(3), rng.choice(SHAPE_COUNTS))
    background = rng.choice(BACKGROUNDS)
    pairs = [_random_motion(rng, track, sideways) for track in tracks]
    seen = [(0, NUM_FRAMES)] * len(pairs)
    if len(pairs) > 1 and rng.random() < _SHARE_PASSING:
        half = NUM_FRAMES // 2
        seen[rng.randrange(len(pairs))] = rng.choice(((0, half), (half, NUM_FRAMES)))
    first, last = (Scene(split, index, seed, shapes, background) for shapes in zip(*pairs, strict=True))
    return MovingScene(first, last, sideways, tuple(seen))


def _random_motion(rng: random.Random, track: int, sideways: bool) -> tuple[Shape, Shape]:
    """A shape where it starts and where it ends, which is the same place unless it moves."""
    start = end = rng.randrange(3)
    if track != 1 and rng.random() < _SHARE_MOVING:
        start, end = rng.choice(((0, 2), (2, 0)))
    kind, colour = rng.choice(KINDS), rng.choice(tuple(COLOURS))
    here, there = ((track, place) if sideways else (place, track) for place in (start, end))
    shape = random_shape(rng, kind, colour, *here)
    if here == there:
        return shape, shape
    goal = random_shape(rng, kind, colour, *there)
    return shape, dataclasses.replace(shape, row=goal.row, column=goal.column, x=goal.x, y=goal.y)


def _lasting(scene: MovingScene) -> Scene:
    """The places that shapes keep. One that moves is put in the middle of its track: the track is then all
    that captions say of its place."""
    middle: dict[str, Any] = {"column" if scene.sideways else "row": "middle"}
    pairs = zip(scene.first.shapes, scene.last.shapes, strict=True)
    shapes = (a if a == b else dataclasses.replace(a, **middle) for a, b in pairs)
    return dataclasses.replace(scene.first, shapes=tuple(shapes))


def _between(a: Shape, b: Shape, along: float) -> Shape:
    return dataclasses.replace(a, x=round(a.x + along * (b.x - a.x)), y=round(a.y + along * (b.y - a.y)))


def _words(shape: Shape) -> str:
    return f"{shape.size} {shape.colour} {shape.kind} {shape.row} {shape.column}"
