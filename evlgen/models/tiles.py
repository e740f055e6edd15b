"""High resolution: an image's tiles and an overview of it, each through the encoder, joined to one sequence.

Pixels come as one image of ``rows x columns`` squares of the encoder's size (`evlgen.processors.tiles`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evlgen.common.errors import ConfigError, DataError
from evlgen.config.model_config import ModelConfig, TilesConfig
from evlgen.models.vision.base import VisionEncoder

Grid = tuple[int, int]


class RaggedPrompts(list):
    """Soft prompts [M, C] of images that have different numbers of them."""

    @property
    def device(self) -> torch.device:
        return self[0].device

    def __getitem__(self, places: Any) -> Any:
        if isinstance(places, int):
            return super().__getitem__(places)
        rows = range(len(self))[places] if isinstance(places, slice) else places
        return RaggedPrompts(super(RaggedPrompts, self).__getitem__(int(row)) for row in rows)


def as_prompts(prompts: Tensor | Sequence[Tensor]) -> Tensor | RaggedPrompts:
    """Soft prompts of several images: [B, M, C] where all have as many, else `RaggedPrompts`."""
    if isinstance(prompts, Tensor):
        return prompts
    is_even = len({len(of_one) for of_one in prompts}) == 1
    return torch.stack(list(prompts)) if is_even else RaggedPrompts(prompts)


class Tiling(nn.Module):
    """How images are cut, and what is joined.

    Args:
        side: of a tile: the encoder's image size.
        language_dim: channels of soft prompts.
        marker_rms: the scale at which the marker behind each row of tiles starts.
    """

    def __init__(self, cfg: TilesConfig, side: int, language_dim: int, marker_rms: float) -> None:
        super().__init__()
        self.max, self.overview, self.join, self.side = cfg.max, cfg.overview, cfg.join, side
        self.marker = nn.Parameter(marker_rms * torch.randn(language_dim)) if cfg.row_markers else None

    @classmethod
    def build(
        cls,
        cfg: ModelConfig,
        vision: VisionEncoder,
        language_dim: int,
        marker_rms: float,
        temporal: str | None,
    ) -> Tiling | None:
        """The tiling of a config, if it has one.

        Raises:
            ConfigError: a model of videos; an encoder of another image size than the config's.
        """
        tiles = cfg.vision.tiles
        if tiles is None:
            return None
        if temporal is not None:
            raise ConfigError(
                f"model.vision.tiles: images are cut into tiles, and this is a model of videos ({temporal}). "
                "Set it to null, or model.vision.temporal to null in an architecture of images."
            )
        if vision.image_size != cfg.vision.image_size:
            raise ConfigError(
                f"model.vision.tiles: '{cfg.vision.name}' has fixed positions for images of "
                f"{vision.image_size} pixels, which cannot be resampled to model.vision.image_size "
                f"{cfg.vision.image_size}, the side of a tile. Set image_size: {vision.image_size}."
            )
        if tiles.row_markers and tiles.join == "before":
            raise ConfigError(
                "model.vision.tiles.row_markers: rows have no end where the connector reads all tiles at "
                "once. Set it to false, or join: after."
            )
        return cls(tiles, vision.image_size, language_dim, marker_rms)

    def grid_of(self, shape: Sequence[int]) -> Grid:
        """Rows and columns of an image [3, H, W].

        Raises:
            ConfigError: a video.
            DataError: no such image, or one of more tiles than the model reads.
        """
        if len(shape) == 4:
            raise ConfigError(
                "model.vision.tiles: this model cuts images into tiles, and a video was given to it. Set "
                "tiles to null and model.vision.temporal for videos."
            )
        rows, columns = (size // self.side for size in shape[-2:])
        whole = list(shape) == [3, rows * self.side, columns * self.side]
        if not whole or not 0 < rows * columns <= self.max:
            raise DataError(
                f"an image has shape {list(shape)}, and the model reads grids of at most {self.max} tiles of "
                f"{self.side} x {self.side} pixels (model.vision.tiles). Give the processors image_size: "
                f"{self.side} and max_tiles: {self.max}."
            )
        return rows, columns

    def num_views(self, grid: Grid) -> int:
        """How often the encoder looks at an image: at each tile, and at an overview of several."""
        count = grid[0] * grid[1]
        return count + (self.overview and count > 1)

    def cut(self, image: Tensor) -> Tensor:
        """[3, rows * S, columns * S] -> views [V, 3, S, S]: the overview, then the tiles, row by row."""
        rows, columns = self.grid_of(image.shape)
        tiles = image.unflatten(2, (columns, self.side)).unflatten(1, (rows, self.side))
        tiles = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)
        if self.num_views((rows, columns)) == len(tiles):
            return tiles
        size = (self.side, self.side)
        overview = F.interpolate(image[None].float(), size, mode="bicubic", antialias=True)
        return torch.cat([overview.to(tiles.dtype), tiles])

    def joined(self, prompts: Tensor, grid: Grid) -> Tensor:
        """The soft prompts [V, M, C] of an image's views in a row: [V * M, C], with a marker behind each row
        of tiles where there are markers."""
        if self.marker is None:
            return prompts.flatten(0, 1)
        rows, columns = grid
        marker = self.marker.to(prompts.dtype)[None]
        tiles = prompts[len(prompts) - rows * columns :].split(columns)
        parts = [part for row in tiles for part in (row.flatten(0, 1), marker)]
        return torch.cat([*prompts[: len(prompts) - rows * columns], *parts])

    def num_soft(self, shape: Sequence[int], of_views: Callable[[int], int]) -> int:
        """The soft prompts of an image [3, H, W].

        Args:
            of_views: from a number of views whose tokens stand in a row to the connector's soft prompts.
        """
        return self._num_soft(self.grid_of(shape), of_views)

    def most_soft(self, of_views: Callable[[int], int]) -> int:
        """The soft prompts of an image of the most tiles."""
        return self._num_soft((self.max, 1), of_views)

    def _num_soft(self, grid: Grid, of_views: Callable[[int], int]) -> int:
        views = self.num_views(grid)
        if self.join == "before":
            return of_views(views)
        return views * of_views(1) + (0 if self.marker is None else grid[0])
