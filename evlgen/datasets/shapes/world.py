"""Scenes of the Shapes world and their images.

A scene is one to three coloured shapes, each in a cell of its own on a 3 x 3 grid. It follows from
``(split, index, seed)`` alone, on every machine. What tells scenes apart is their description (kind, colour,
size and cell of every shape); each description belongs to exactly one split, so no training scene is ever met
in validation or test. Images of one description still differ: position inside the cell, radius, shade and
background vary.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from evlgen.common.errors import DataError, did_you_mean

IMAGE_SIZE = 64
KINDS = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (240, 136, 24),
    "yellow": (240, 212, 40),
    "green": (44, 160, 64),
    "blue": (36, 84, 204),
    "purple": (128, 52, 160),
    "pink": (244, 134, 180),
    "black": (28, 28, 32),
}
SIZES = ("small", "large")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "middle", "right")
SPLITS = ("train", "val", "test")

_RADII = {"small": (4.5, 5.0, 5.5), "large": (8.0, 8.5, 9.0)}
_CELL_CENTRES = (11, 32, 53)
_JITTER = 1  # pixels; shapes of neighbouring cells stay apart, and all stay inside the image
_SHADE = 14  # steps of 256 by which a shape's colour may differ from the name's own
BACKGROUNDS = (
    (232, 232, 228),
    (222, 230, 238),
    (238, 230, 218),
    (224, 236, 224),
    (236, 224, 234),
    (204, 206, 210),
)
# share of further shapes that repeat an earlier kind and colour, so that there is something to count
_TWIN_SHARE = 0.25
SHAPE_COUNTS = (1, 2, 2, 2, 3, 3)


@dataclass(frozen=True)
class Shape:
    """One shape: what captions may say (kind, colour, size, row, column) and how it is drawn (pixels,
    RGB)."""

    kind: str
    colour: str
    size: str
    row: str
    column: str
    x: int
    y: int
    radius: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """One to three shapes on a soft background."""

    split: str
    index: int
    seed: int
    shapes: tuple[Shape, ...]
    background: tuple[int, int, int]

    @property
    def description(self) -> str:
        """What makes this scene another scene than the next: independent of the order of shapes and of
        jitter."""
        return describe(self.shapes)


def describe(shapes: tuple[Shape, ...]) -> str:
    """Kind, colour, size and cell of every shape, in an order that depends on nothing else."""
    return "; ".join(sorted(f"{s.size} {s.colour} {s.kind} {s.row} {s.column}" for s in shapes))


def split_of(description: str) -> str:
    """The one split a description belongs to: eight tenths train, one tenth each val and test."""
    return {0: "val", 1: "test"}.get(zlib.crc32(description.encode()) % 10, "train")


@lru_cache(maxsize=16)  # a sample's image and its captions ask for the same one in turn
def scene(split: str, index: int, seed: int = 0) -> Scene:
    """The scene number ``index`` of a split.

    Raises:
        DataError: there is no such split, or the index is negative.
    """
    if split not in SPLITS:
        raise DataError(
            f"Shapes has no split '{split}'.{did_you_mean(split, SPLITS)} Splits: {', '.join(SPLITS)}."
        )
    if index < 0:
        raise DataError(f"Shapes index {index} is negative; indices start at 0.")
    rng = random.Random(f"shapes/{seed}/{split}/{index}")
    shapes = _random_shapes(rng)
    while split_of(describe(shapes)) != split:
        shapes = _random_shapes(rng)
    return Scene(split, index, seed, shapes, rng.choice(BACKGROUNDS))


def draw(scene: Scene) -> np.ndarray:
    """The image of a scene: uint8 RGB [64, 64, 3]."""
    canvas = _background(scene.background, (scene.index * 7 + len(scene.shapes)) % 8).copy()
    for shape in scene.shapes:
        mask = _mask(shape.kind, shape.radius)
        rows, columns = _window(shape, mask)
        area = canvas[rows, columns]
        area += mask * (np.asarray(shape.rgb, dtype=np.float32) - area)
    return canvas.astype(np.uint8)


def coverage(scene: Scene, patch_size: int = 8) -> np.ndarray:
    """How much of every patch each shape covers: float32 [shapes, rows, columns] in 0..1."""
    side = IMAGE_SIZE // patch_size
    covered = np.zeros((len(scene.shapes), IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    for i, shape in enumerate(scene.shapes):
        mask = _mask(shape.kind, shape.radius)
        covered[(i, *_window(shape, mask))] = mask[..., 0]
    return covered.reshape(-1, side, patch_size, side, patch_size).mean(axis=(2, 4))


def _random_shapes(rng: random.Random) -> tuple[Shape, ...]:
    cells = rng.sample(range(9), rng.choice(SHAPE_COUNTS))
    shapes: list[Shape] = []
    for cell in cells:
        if shapes and rng.random() < _TWIN_SHARE:
            kind, colour = shapes[-1].kind, shapes[-1].colour
        else:
            kind, colour = rng.choice(KINDS), rng.choice(tuple(COLOURS))
        shapes.append(random_shape(rng, kind, colour, *divmod(cell, 3)))
    return tuple(shapes)


def random_shape(rng: random.Random, kind: str, colour: str, row: int, column: int) -> Shape:
    """A shape of any size, shade and radius in a cell of the grid (0 is the top row, the left column)."""
    size = rng.choice(SIZES)
    red, green, blue = COLOURS[colour]
    return Shape(
        kind,
        colour,
        size,
        ROWS[row],
        COLUMNS[column],
        x=_CELL_CENTRES[column] + rng.randint(-_JITTER, _JITTER),
        y=_CELL_CENTRES[row] + rng.randint(-_JITTER, _JITTER),
        radius=rng.choice(_RADII[size]),
        rgb=(_shaded(rng, red), _shaded(rng, green), _shaded(rng, blue)),
    )


def _shaded(rng: random.Random, channel: int) -> int:
    return min(255, max(0, channel + rng.randint(-_SHADE, _SHADE)))


def _window(shape: Shape, mask: np.ndarray) -> tuple[slice, slice]:
    half = mask.shape[0] // 2
    return slice(shape.y - half, shape.y + half), slice(shape.x - half, shape.x + half)


@lru_cache(maxsize=256)
def _background(rgb: tuple[int, int, int], variant: int) -> np.ndarray:
    """A soft tone with a faint slope and grain: float32 [64, 64, 3]."""
    rng = np.random.RandomState(variant)
    ramp = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    slope_x, slope_y = rng.uniform(-8, 8, 2).astype(np.float32)
    grain = rng.uniform(-3, 3, (IMAGE_SIZE, IMAGE_SIZE, 1)).astype(np.float32)
    tone = (
        np.asarray(rgb, dtype=np.float32)
        + slope_x * ramp[None, :, None]
        + slope_y * ramp[:, None, None]
        + grain
    )
    return np.clip(tone, 0, 255)


@lru_cache(maxsize=256)
def _mask(kind: str, radius: float) -> np.ndarray:
    """Opacity of a shape, antialiased 8 x 8 per pixel: float32 [2h, 2h, 1] around its centre."""
    half, fine = 10, 8
    line = (np.arange(2 * half * fine) + 0.5) / fine - half
    x, y = np.meshgrid(line / radius, line / radius)
    inside = _INSIDE[kind](x, y).astype(np.float32)
    return inside.reshape(2 * half, fine, 2 * half, fine).mean(axis=(1, 3))[..., None]


# Every shape fills the unit circle's box; y points down.
def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x**2 + y**2 <= 1


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) <= 0.9


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (y <= 0.9) & (2 * abs(x) <= y + 1.1)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points: in each tenth of a turn the edge is the straight line from an outer to an inner corner."""
    tenth = np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + tenth) % (2 * tenth) - tenth)
    outer, inner = 1.1, 0.46
    corner_x, corner_y = inner * np.cos(tenth), inner * np.sin(tenth)
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    return (along - outer) * corner_y + across * (outer - corner_x) <= 0


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The sextic (x^2 + y^2 - 1)^3 = x^2 y^3, scaled into the box."""
    u, v = 1.16 * x, -1.16 * y + 0.1
    return (u**2 + v**2 - 1) ** 3 <= u**2 * v**3


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1)


_INSIDE = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
}
