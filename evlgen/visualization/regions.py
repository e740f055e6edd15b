"""Regions of an image: patches that became one token, filled with their mean colour and outlined.

The manner is that of figure 4 of Bolya et al., *Token Merging: Your ViT but Faster*, ICLR 2023 (arXiv
2210.09461). Patches of one region need not be neighbours: what ties them together is their fill and the
colour of their outline. Patches that are alone have a faint outline without a colour, so that the others
stand out. Pure functions on arrays; nothing here knows a model.
"""

from __future__ import annotations

import colorsys

import numpy as np

# How far an outline is from its fill at least: in colour, and in lightness, for eyes that see few colours.
LEAST_DISTANCE, LEAST_CONTRAST = 45.0, 1.45
FAINT_CONTRAST = 1.4  # of the outline of a patch that is alone
_LIGHTNESS = (0.5, 0.6, 0.4, 0.7, 0.3, 0.8, 0.2, 0.9, 0.1, 1.0, 0.0)  # the most colourful first
# Steps of hue from row to row and from column to column: 1/p and 1/p**2 of the plastic number p, whose
# multiples fill a square evenly (Roberts, 2018, the R2 sequence), so that patches near each other differ.
_HUE_STEPS = np.array([0.7548776662466927, 0.5698402909980532])
# Red, orange, yellow, green, cyan, azure, blue, violet, magenta, rose, red: steps that look alike in size.
_HUES = (0.0, 0.083, 0.15, 0.33, 0.5, 0.58, 0.667, 0.76, 0.84, 0.92, 1.0)
_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def draw_regions(images: np.ndarray, groups: np.ndarray, scale: int = 1, width: int = 1) -> np.ndarray:
    """Fills every region with its mean colour and draws its outline on the inside of its border.

    Args:
        images: [..., H, W, 3] uint8, RGB; leading dimensions are frames whose regions are common.
        groups: [..., h, w] integers: patches with the same number are one region, in all frames. The grid
            lies evenly over the image.
        scale: how many times larger the drawing is.
        width: of the outlines, in pixels of the drawing; half of it around patches that are alone.

    Returns:
        [..., H * scale, W * scale, 3] uint8.
    """
    regions, first = _numbered(groups)
    size = images.shape[-3:-1]
    fills = _mean_colours(images, _stretched(regions, size))
    is_alone = np.bincount(regions.ravel()) == 1
    lines = outline_colours(fills, first, groups.shape[-2:], is_alone)
    large = _stretched(regions, (size[0] * scale, size[1] * scale))
    wide, narrow = _is_border(large, width), _is_border(large, max(1, width // 2))
    return np.where(np.where(is_alone[large], narrow, wide)[..., None], lines[large], fills[large])


def outline_colours(
    fills: np.ndarray, first: np.ndarray, grid: tuple[int, int], is_alone: np.ndarray
) -> np.ndarray:
    """A colour for each region's outline that is seen on its fill: [R, 3] uint8.

    The hue follows from the place of the region's first patch, so a region that grows from one drawing to the
    next keeps it; the lightness from the fill.

    Args:
        fills: [R, 3] uint8.
        first: [R], the position in the row-major grid of each region's first patch.
        grid: rows and columns.
        is_alone: [R], which regions are one patch: they get a shade of grey.
    """
    rows, columns = np.divmod(first % (grid[0] * grid[1]), grid[1])
    hues = np.interp((np.stack([rows, columns], -1) @ _HUE_STEPS) % 1, np.linspace(0, 1, len(_HUES)), _HUES)
    chosen = [
        _shade_on(fill) if alone else _colour_on(fill, hue)
        for fill, hue, alone in zip(fills, hues, is_alone, strict=True)
    ]
    return np.array(chosen, dtype=np.uint8)


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    """Contrast of two RGB colours of 0..255, from 1 to 21 (WCAG 2.1)."""
    light, dark = sorted((_xyz(one)[1], _xyz(other)[1]), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Difference of two RGB colours of 0..255 as the eye has it (CIE 1976, in L*a*b*); black to white is
    100."""
    return float(np.linalg.norm(_lab(one) - _lab(other)))


def _shade_on(fill: np.ndarray) -> tuple[int, int, int]:
    """The fill, darker or, where it is dark, lighter."""
    toward = 0 if _xyz(fill)[1] > 0.18 else 255  # the luminance of a middle grey
    for share in np.linspace(0.1, 1, 19):
        colour = np.rint(fill + (toward - fill.astype(float)) * share)
        if contrast(colour, fill) >= FAINT_CONTRAST:
            break
    return tuple(colour.astype(int).tolist())


def _colour_on(fill: np.ndarray, hue: float) -> tuple[int, int, int]:
    for lightness in _LIGHTNESS:
        colour = np.rint(255 * np.array(colorsys.hls_to_rgb(hue, lightness, 1.0)))
        if contrast(colour, fill) >= LEAST_CONTRAST and distance(colour, fill) >= LEAST_DISTANCE:
            return tuple(colour.astype(int).tolist())
    raise AssertionError("white or black is seen on every colour")


def _xyz(colour: np.ndarray) -> np.ndarray:
    """An sRGB colour of 0..255 in CIE XYZ, white at 1, 1, 1 (IEC 61966-2-1); Y is its luminance."""
    share = np.asarray(colour, dtype=np.float64) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    xyz = _TO_XYZ @ linear
    return xyz / _TO_XYZ.sum(1)


def _lab(colour: np.ndarray) -> np.ndarray:
    xyz = _xyz(colour)
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def _numbered(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same regions numbered from 0, [..., h, w], and where the first patch of each is, [R]."""
    _, first, regions = np.unique(groups, return_index=True, return_inverse=True)
    return regions.reshape(groups.shape), first


def _stretched(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[..., h, w] patches as [..., H, W] pixels."""
    rows, columns = (np.arange(pixels) * n // pixels for pixels, n in zip(size, grid.shape[-2:], strict=True))
    return grid[..., rows[:, None], columns]


def _mean_colours(images: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """[..., H, W, 3] and the region of each pixel -> [R, 3] uint8."""
    places = regions.ravel()
    sums = [np.bincount(places, weights=images[..., channel].ravel()) for channel in range(3)]
    return np.rint(np.stack(sums, -1) / np.bincount(places)[:, None]).astype(np.uint8)


def _is_border(regions: np.ndarray, width: int) -> np.ndarray:
    """Which pixels [..., H, W] have another region, or the image's edge, fewer than ``width`` pixels off,
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
