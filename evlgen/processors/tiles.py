"""Images of high resolution as grids of square tiles, which an encoder reads one by one.

The grid is chosen as LLaVA-NeXT's AnyRes does (Liu et al., 2024; ``select_best_resolution`` of its public
code): the one that keeps most of the image's pixels, and of those the one that adds least. It is chosen among
all grids of at most ``max`` tiles; LLaVA-1.6's own list has neither a single tile nor four in a row
(``image_grid_pinpoints``: 1 x 2, 2 x 1, 2 x 2, 1 x 3, 3 x 1). The image is then resized to the whole grid;
LLaVA-NeXT keeps its proportions there and fills the rest with black.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image
from torchvision.transforms import v2

#: Proportions of the random part that training takes of an image; nearer to 1 there would be no grids.
RATIOS = (0.4, 2.5)

Resized = Callable[[Image.Image, tuple[int, int]], Image.Image]


def choose_grid(width: int, height: int, side: int, most: int) -> tuple[int, int]:
    """Rows and columns of the grid of at most ``most`` tiles for an image of width x height pixels.

    Args:
        side: of a tile, in pixels.
    """
    grids = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]

    def quality(grid: tuple[int, int]) -> tuple[int, int]:
        rows, columns = grid
        scale = min(columns * side / width, rows * side / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - rows * columns * side * side

    return max(sorted(grids, key=lambda grid: grid[0] * grid[1]), key=quality)


class ToGrid:
    """An image resized to its grid of tiles, [rows * side, columns * side] pixels."""

    def __init__(self, side: int, most: int, resized: Resized) -> None:
        self.side, self.most, self.resized = side, most, resized

    def __call__(self, image: Image.Image) -> Image.Image:
        rows, columns = choose_grid(*image.size, self.side, self.most)
        return self.resized(image, (rows * self.side, columns * self.side))


class RandomPartToGrid(v2.RandomResizedCrop):
    """A random part of an image, resized to its grid of tiles."""

    def __init__(self, to_grid: ToGrid, scale: tuple[float, float]) -> None:
        super().__init__((to_grid.side, to_grid.side), scale=scale, ratio=RATIOS)
        self.to_grid = to_grid

    def transform(self, inpt: Image.Image, params: dict[str, Any]) -> Image.Image:
        left, top = params["left"], params["top"]
        return self.to_grid(inpt.crop((left, top, left + params["width"], top + params["height"])))
