"""Regions of a picture: patches that became one token, filled with their mean colour and outlined.

The manner is that of figure 4 of Bolya et al., *Token Merging: Your ViT but Faster*, ICLR 2023 (arXiv
2210.09461). Patches of one region need not be neighbours: what ties them together is their fill and the colour
of their outline. Pure functions on arrays; nothing here knows a model.
"""

from __future__ import annotations

import colorsys

import numpy as np

LEAST_CONTRAST = 3.0  # of an outline and its fill; WCAG 2.1, 1.4.11: what graphics need to be seen
_LIGHTNESS = (0.5, 0.6, 0.4, 0.7, 0.3, 0.8, 0.2, 0.9, 0.1, 1.0, 0.0)  # the most colourful first
# Steps of hue from row to row and from column to column: 1/p and 1/p**2 of the plastic number p, whose multiples
# fill a square evenly (Roberts, 2018, the R2 sequence), so that no two patches near each other look alike.
_HUE_STEPS = np.array([0.7548776662466927, 0.5698402909980532])


def draw_regions(pictures: np.ndarray, groups: np.ndarray, scale: int = 1, width: int = 1) -> np.ndarray:
    """Fills every region with its mean colour and draws its outline on the inside of its border.

    Args:
        pictures: [..., H, W, 3] uint8, RGB; leading dimensions are frames whose regions are common.
        groups: [..., h, w] integers: patches with the same number are one region, in all frames. The grid lies
            evenly over the picture.
        scale: how many times larger the drawing is.
        width: of the outlines, in pixels of the drawing.

    Returns:
        [..., H * scale, W * scale, 3] uint8.
    """
    regions, first = _numbered(groups)
    size = pictures.shape[-3:-1]
    fills = _mean_colours(pictures, _stretched(regions, size))
    lines = outline_colours(fills, first, groups.shape[-2:])
    large = _stretched(regions, (size[0] * scale, size[1] * scale))
    return np.where(_is_border(large, width)[..., None], lines[large], fills[large])


def mean_colours(pictures: np.ndarray, groups: np.ndarray) -> dict[int, tuple[int, int, int]]:
    """The mean colour of each region's pixels, by its number in ``groups`` (shapes as in `draw_regions`)."""
    regions, _ = _numbered(groups)
    colours = _mean_colours(pictures, _stretched(regions, pictures.shape[-3:-1]))
    return dict(zip(np.unique(groups).tolist(), map(tuple, colours.tolist()), strict=True))


def outline_colours(fills: np.ndarray, first: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """A colour for each region's outline that is seen on its fill: [R, 3] uint8.

    The hue follows from the place of the region's first patch, so a region that grows from one drawing to the
    next keeps it; the lightness from the fill.

    Args:
        fills: [R, 3] uint8.
        first: [R], the position in the row-major grid of each region's first patch.
        grid: rows and columns.
    """
    rows, columns = np.divmod(first % (grid[0] * grid[1]), grid[1])
    hues = (np.stack([rows, columns], -1) @ _HUE_STEPS) % 1
    return np.array([_seen_on(fill, hue) for fill, hue in zip(fills, hues, strict=True)], dtype=np.uint8)


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    """Contrast of two RGB colours of 0..255, from 1 to 21 (WCAG 2.1)."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _seen_on(fill: np.ndarray, hue: float) -> tuple[int, int, int]:
    for lightness in _LIGHTNESS:
        colour = tuple(round(255 * part) for part in colorsys.hls_to_rgb(hue, lightness, 1.0))
        if contrast(np.array(colour), fill) >= LEAST_CONTRAST:
            return colour
    raise AssertionError("white or black is seen on every colour")


def _luminance(colour: np.ndarray) -> float:
    share = np.asarray(colour, dtype=np.float64) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)  # sRGB
    return float(linear @ (0.2126, 0.7152, 0.0722))


def _numbered(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same regions numbered from 0, [..., h, w], and where the first patch of each is, [R]."""
    _, first, regions = np.unique(groups, return_index=True, return_inverse=True)
    return regions.reshape(groups.shape), first


def _stretched(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[..., h, w] patches as [..., H, W] pixels."""
    rows, columns = (np.arange(pixels) * n // pixels for pixels, n in zip(size, grid.shape[-2:], strict=True))
    return grid[..., rows[:, None], columns]


def _mean_colours(pictures: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """[..., H, W, 3] and the region of each pixel -> [R, 3] uint8."""
    places = regions.ravel()
    sums = [np.bincount(places, weights=pictures[..., channel].ravel()) for channel in range(3)]
    return np.rint(np.stack(sums, -1) / np.bincount(places)[:, None]).astype(np.uint8)


def _is_border(regions: np.ndarray, width: int) -> np.ndarray:
    """Which pixels [..., H, W] have another region, or the picture's edge, fewer than ``width`` pixels off,
    corners included."""
    margin = [(0, 0)] * (regions.ndim - 2) + [(width, width)] * 2
    padded = np.pad(regions, margin, constant_values=-1)
    low, high = padded, padded
    for axis in (-2, -1):  # the smallest and the largest number in a square around each pixel
        windows_low = [np.roll(low, shift, axis) for shift in range(-width, width + 1)]
        windows_high = [np.roll(high, shift, axis) for shift in range(-width, width + 1)]
        low, high = np.minimum.reduce(windows_low), np.maximum.reduce(windows_high)
    inside = (..., slice(width, -width or None), slice(width, -width or None))
    return (low != high)[inside]
