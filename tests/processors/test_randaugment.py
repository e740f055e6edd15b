"""RandAugment's operations against slow obvious versions of what LAVIS does with OpenCV."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from evlgen.common.errors import ConfigError
from evlgen.processors import randaugment
from evlgen.processors.randaugment import OPERATIONS, RandAugment

H, W = 20, 26


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A smooth image, so that a misplaced half pixel shows and interpolation rounding does not."""
    y, x = np.mgrid[:H, :W] / 20
    waves = [np.sin(3 * x + k) * np.cos(2 * y - k) for k in range(3)]
    return Image.fromarray((120 + 80 * np.stack(waves, axis=-1)).astype(np.uint8))


def warped(image: Image.Image, forward: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear warp by a 2 x 3 matrix input -> output, pixel centres at integers, as in `cv2.warpAffine`.

    Returns the image and a mask of pixels that come from well inside or well outside of the input.
    """
    pixels = np.asarray(image).astype(float)
    matrix = np.linalg.inv(np.vstack([forward, [0, 0, 1]]))
    out, clear = np.full((H, W, 3), 128.0), np.ones((H, W), dtype=bool)
    for v in range(H):
        for u in range(W):
            x, y, _ = matrix @ (u, v, 1)
            if 0 <= x <= W - 1 and 0 <= y <= H - 1:
                x0, y0 = min(int(x), W - 2), min(int(y), H - 2)
                a, b = x - x0, y - y0
                corners = pixels[y0 : y0 + 2, x0 : x0 + 2]
                out[v, u] = (1 - b) * ((1 - a) * corners[0, 0] + a * corners[0, 1]) + b * (
                    (1 - a) * corners[1, 0] + a * corners[1, 1]
                )
            else:
                clear[v, u] = not (-1 < x < W and -1 < y < H)
    return out, clear


def rotation(degrees: float) -> list[list[float]]:
    """The matrix of `cv2.getRotationMatrix2D((W / 2, H / 2), degrees, 1)`."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    x, y = W / 2, H / 2
    return [[cos, sin, (1 - cos) * x - sin * y], [-sin, cos, sin * x + (1 - cos) * y]]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("name", "amount", "forward"),
    [
        ("shear_x", 0.15, lambda f: [[1, f, 0], [0, 1, 0]]),
        ("shear_y", 0.15, lambda f: [[1, 0, 0], [f, 1, 0]]),
        ("translate_x", 5, lambda f: [[1, 0, -f], [0, 1, 0]]),
        ("translate_y", 5, lambda f: [[1, 0, 0], [0, 1, -f]]),
        ("rotate", 15, rotation),
    ],
)
def test_warps_equal_opencvs_definition(photo, name: str, amount: float, sign: int, forward) -> None:
    expected, clear = warped(photo, forward(sign * amount))
    found = np.asarray(getattr(randaugment, name)(photo, sign * amount)).astype(float)
    assert clear.mean() > 0.85
    assert np.abs(found - expected)[clear].max() <= 1.01


def test_autocontrast_stretches_every_channel_to_the_full_range() -> None:
    pixels = np.zeros((2, 3, 3), dtype=np.uint8)
    pixels[..., 0] = [[50, 60, 70], [80, 90, 101]]
    found = np.asarray(OPERATIONS["AutoContrast"](Image.fromarray(pixels), 0.5))
    assert found[..., 0].ravel().tolist() == [0, 50, 100, 150, 200, 255]
    assert not found[..., 1:].any()


def test_equalize_equals_the_published_table() -> None:
    channel = np.random.default_rng(1).normal(100, 20, (40, 40)).clip(0, 255).astype(np.uint8)
    counts = np.bincount(channel.ravel(), minlength=256)
    step = counts[counts != 0][:-1].sum() // 255
    table = (step // 2 + np.concatenate([[0], np.cumsum(counts[:-1])])) // step
    found = np.asarray(OPERATIONS["Equalize"](Image.fromarray(np.dstack([channel] * 3)), 0.5))
    assert np.array_equal(found[..., 0], table.clip(0, 255)[channel])


def test_brightness_scales_by_the_published_factor(photo) -> None:
    found = np.asarray(OPERATIONS["Brightness"](photo, 0.1))
    assert np.array_equal(found, (np.asarray(photo) * np.float32(0.1 * 1.8 + 0.1)).astype(np.uint8))


def test_sharpness_below_one_blends_towards_the_smoothed_image(photo) -> None:
    pixels = np.asarray(photo).astype(float)
    shifted = [np.roll(pixels, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    smooth = (sum(shifted) + 4 * pixels) / 13
    expected = 0.9 * smooth + 0.1 * pixels
    found = np.asarray(OPERATIONS["Sharpness"](photo, 0)).astype(float)
    assert np.abs(found - expected)[1:-1, 1:-1].max() <= 1.01
    assert np.array_equal(found[0], pixels[0])


@pytest.mark.parametrize("name", ["Identity", "Brightness", "Sharpness"])
def test_at_blips_magnitude_these_change_nothing(photo, name: str) -> None:
    assert np.array_equal(OPERATIONS[name](photo, 0.5), photo)


def test_the_ten_operations_are_blips() -> None:
    assert sorted(OPERATIONS) == [
        "AutoContrast",
        "Brightness",
        "Equalize",
        "Identity",
        "Rotate",
        "Sharpness",
        "ShearX",
        "ShearY",
        "TranslateX",
        "TranslateY",
    ]


@pytest.mark.parametrize(
    ("name", "warp", "amount"),
    [
        ("ShearX", randaugment.shear_x, 0.15),
        ("ShearY", randaugment.shear_y, 0.15),
        ("TranslateX", randaugment.translate_x, 5),
        ("TranslateY", randaugment.translate_y, 5),
        ("Rotate", randaugment.rotate, 15),
    ],
)
def test_at_blips_magnitude_warps_go_both_ways_by_the_published_amount(photo, name, warp, amount) -> None:
    torch.manual_seed(0)
    seen = {OPERATIONS[name](photo, 0.5).tobytes() for _ in range(16)}
    assert seen == {warp(photo, amount).tobytes(), warp(photo, -amount).tobytes()}


def test_each_drawn_operation_is_applied_half_of_the_time(photo) -> None:
    torch.manual_seed(0)
    augment = RandAugment(num_ops=1, magnitude=5, operations=["TranslateX"])
    changed = sum(augment(photo).tobytes() != photo.tobytes() for _ in range(400))
    assert 160 <= changed <= 240


def test_seeding_torch_repeats_the_choices(photo) -> None:
    augment = RandAugment()

    def images() -> list[bytes]:
        torch.manual_seed(7)
        return [augment(photo).tobytes() for _ in range(30)]

    first = images()
    assert first == images()
    assert len(set(first)) > 8


def test_unknown_operation_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no operation 'Rotat'.*Did you mean 'Rotate'"):
        RandAugment(operations=["Rotat"])
