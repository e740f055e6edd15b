"""Drawing of regions: fills, outlines and their colours, against slow obvious versions."""

from __future__ import annotations

import numpy as np
import pytest

from evlgen.visualization.regions import (
    LEAST_CONTRAST,
    LEAST_DISTANCE,
    contrast,
    distance,
    draw_regions,
)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def plain_pixels(groups: np.ndarray, height: int, width: int) -> list[list[int]]:
    """The region of each pixel."""
    h, w = groups.shape
    return [[int(groups[y * h // height, x * w // width]) for x in range(width)] for y in range(height)]


def plain_means(image: np.ndarray, groups: np.ndarray) -> dict[int, tuple[int, ...]]:
    members: dict[int, list] = {}
    for y, row in enumerate(plain_pixels(groups, *image.shape[:2])):
        for x, region in enumerate(row):
            members.setdefault(region, []).append(image[y, x].astype(float))
    return {region: tuple(np.rint(np.mean(m, axis=0)).astype(int)) for region, m in members.items()}


def plain_border(labels: list[list[int]], width: int) -> np.ndarray:
    """Which pixels have a pixel of another region, or none, within ``width`` to any side."""
    rows, columns = len(labels), len(labels[0])
    border = np.zeros((rows, columns), dtype=bool)
    for y in range(rows):
        for x in range(columns):
            for dy in range(-width, width + 1):
                for dx in range(-width, width + 1):
                    inside = 0 <= y + dy < rows and 0 <= x + dx < columns
                    border[y, x] |= not inside or labels[y + dy][x + dx] != labels[y][x]
    return border


GROUPS = np.array([[7, 7, 2, 3], [7, 5, 2, 9], [4, 5, 5, 9], [3, 3, 8, 1]])


@pytest.mark.parametrize("size", [(16, 16), (18, 23)])
def test_each_region_has_the_mean_colour_of_its_pixels(size):
    image = noise(*size, 3)
    drawn = draw_regions(image, GROUPS, scale=8, width=1)  # a region's pixels that are not its outline
    labels = plain_pixels(GROUPS, *(8 * side for side in size))
    border = plain_border(labels, 1)
    for region, colour in plain_means(image, GROUPS).items():
        inside = (np.array(labels) == region) & ~border
        assert np.array_equal(np.unique(drawn[inside], axis=0), [colour])


@pytest.mark.parametrize(("scale", "width"), [(1, 1), (3, 2), (2, 3)])
@pytest.mark.parametrize("size", [(24, 24), (22, 27)])
def test_outlines_are_where_regions_end_and_nowhere_else(size, scale, width):
    image = noise(*size, 3)
    drawn = draw_regions(image, GROUPS, scale, width)
    assert drawn.shape == (size[0] * scale, size[1] * scale, 3)
    labels = plain_pixels(GROUPS, *drawn.shape[:2])
    is_alone = np.vectorize(lambda region: (GROUPS == region).sum() == 1)(labels)
    narrow, wide = plain_border(labels, max(1, width // 2)), plain_border(labels, width)
    fills = plain_means(image, GROUPS)
    filled = np.array([[fills[region] for region in row] for row in labels])
    assert np.array_equal((drawn != filled).any(-1), np.where(is_alone, narrow, wide))


def test_patches_far_apart_share_fill_and_outline():
    drawn = draw_regions(noise(40, 40, 3), GROUPS, width=2)
    upper, lower = drawn[:10, 30:], drawn[30:, :10]  # a part each of region 3, at the image's corners
    assert np.array_equal(upper[0, 0], lower[0, 0]) and np.array_equal(upper[5, 5], lower[5, 5])
    corners = {tuple(drawn[y, x]) for y, x in ((0, 0), (0, 20), (0, 30), (10, 10), (10, 30))}
    assert len(corners) == 5  # one outline colour for each of the five regions of several patches


@pytest.mark.parametrize(
    "colour", [(0, 0, 0), (255, 255, 255), (118, 118, 118), (128, 128, 128), (220, 20, 30), (10, 30, 200)]
)
def test_outlines_are_seen_on_dark_light_and_colourful_images(colour):
    image = np.full((96, 96, 3), colour, dtype=np.uint8)
    groups = np.arange(36).reshape(12, 3).repeat(4, axis=1)
    drawn = draw_regions(image, groups)
    outlines = {tuple(pixel) for pixel in drawn.reshape(-1, 3).tolist()} - {colour}
    assert len(outlines) > 15
    for outline in outlines:
        assert contrast(np.array(outline), np.array(colour)) >= LEAST_CONTRAST
        assert distance(np.array(outline), np.array(colour)) >= LEAST_DISTANCE


def test_contrast_and_distance_are_those_of_their_standards():
    white, black, red = np.full(3, 255), np.zeros(3), np.array([255, 0, 0])
    assert contrast(white, black) == pytest.approx(21)
    assert contrast(red, white) == pytest.approx(3.998, abs=1e-3)
    assert distance(white, black) == pytest.approx(100)
    # sRGB red in L*a*b* is 53.2, 80.1, 67.2
    assert distance(red, black) == pytest.approx(np.linalg.norm([53.2, 80.1, 67.2]), abs=0.2)


def test_a_region_keeps_the_hue_of_its_first_patch_as_it_grows():
    image = np.full((40, 40, 3), 200, dtype=np.uint8)
    small = np.arange(16).reshape(4, 4)
    small[0, 1] = 0
    large = small.copy()
    large[1, :2] = 0
    assert np.array_equal(draw_regions(image, small)[0, 0], draw_regions(image, large)[0, 0])


def test_regions_of_several_frames_have_one_colour():
    frames = np.stack([np.full((8, 8, 3), 10, np.uint8), np.full((8, 8, 3), 50, np.uint8)])
    groups = np.array([[[0, 1], [1, 1]], [[0, 2], [2, 2]]])
    drawn = draw_regions(frames, groups, scale=2)
    assert np.array_equal(drawn[0, :8, :8], drawn[1, :8, :8])
    assert [tuple(drawn[i, y, x]) for i, y, x in ((0, 4, 4), (0, 12, 12), (1, 12, 12))] == [
        (shade,) * 3 for shade in (30, 10, 50)
    ]
