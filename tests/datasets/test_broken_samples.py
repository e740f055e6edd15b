"""Real oddities and real damage: what can be read is read rightly, what cannot is skipped and named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evlgen.datasets.base_dataset import Skipped
from evlgen.datasets.caption_dataset import CaptionDataset, CaptionEvalDataset, read_caption_records
from evlgen.datasets.media import ImageFiles
from evlgen.media.images import open_image
from evlgen.processors import build_processor

READABLE = [
    "cmyk.jpg",
    "exif_rotated.jpg",
    "gray.jpg",
    "one_pixel.png",
    "palette.png",
    "rgba.png",
    "sixteen_bit.png",
]
UNREADABLE = {
    "corrupted.mp4": "not an image",
    "empty.jpg": "empty",
    "gone.jpg": "does not exist",
    "text_named.jpg": "not an image",
    "truncated.jpg": "truncated",
}


@pytest.fixture(scope="module")
def broken(shared: Path) -> Path:
    return shared / "data/broken"


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[dict]:
    """Readable and unreadable files in turn."""
    path = tmp_path_factory.mktemp("annotations") / "broken.json"
    path.write_text(
        json.dumps([{"image": name, "caption": f"a {name}"} for name in sorted([*READABLE, *UNREADABLE])])
    )
    return read_caption_records(path)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(open_image(path)).astype(float)


@pytest.mark.parametrize("name", ["blip2_image_train", "blip_image_train", "blip_image_eval"])
def test_broken_files_are_skipped_in_their_own_place_and_named(broken, records, name: str) -> None:
    image = build_processor({"name": name, "image_size": 32})
    dataset = CaptionDataset(records, ImageFiles(broken), image, build_processor({"name": "blip_caption"}))
    samples = [dataset[i] for i in range(len(dataset))]
    for i, (record, sample) in enumerate(zip(records, samples, strict=True)):
        if record["visual"] in UNREADABLE:
            assert isinstance(sample, Skipped)
            assert (sample.index, sample.id) == (i, record["visual"])
            assert (
                UNREADABLE[record["visual"]] in sample.reason
                and str(broken / record["visual"]) in sample.reason
            )
        else:
            assert sample["image"].shape == (3, 32, 32) and sample["image"].isfinite().all()
            assert sample["image_id"] == record["visual"]
    batch = dataset.collater(samples)
    assert len(batch["image"]) == len(READABLE) and len(batch["skipped"]) == len(UNREADABLE)


def test_evaluation_skips_the_same_files(broken, records) -> None:
    dataset = CaptionEvalDataset(
        records, ImageFiles(broken), build_processor({"name": "blip_image_eval", "image_size": 8})
    )
    skipped = [s.id for s in (dataset[i] for i in range(len(dataset))) if isinstance(s, Skipped)]
    assert sorted(skipped) == sorted(UNREADABLE)


def test_rotated_photograph_is_turned_as_its_exif_says(broken) -> None:
    with Image.open(broken / "exif_rotated.jpg") as stored:
        assert np.array_equal(pixels(broken / "exif_rotated.jpg"), np.rot90(np.asarray(stored), k=-1))


def test_cmyk_photograph_has_the_greys_of_its_gray_twin(broken) -> None:
    luma = pixels(broken / "cmyk.jpg") @ (0.299, 0.587, 0.114)
    assert np.abs(luma - pixels(broken / "gray.jpg")[..., 0]).mean() < 4


def test_small_images_have_the_colours_of_the_photograph(broken) -> None:
    photo = open_image(broken / "cmyk.jpg")
    for name, tolerance in (("rgba.png", 6), ("palette.png", 45)):
        small = np.asarray(photo.resize((64, 40), Image.Resampling.BICUBIC)).astype(float)
        assert np.abs(pixels(broken / name) - small).mean() < tolerance


def test_sixteen_bit_image_keeps_its_greys(broken) -> None:
    with Image.open(broken / "sixteen_bit.png") as stored:
        expected = np.rint(np.asarray(stored) / 257)
    found = pixels(broken / "sixteen_bit.png")
    assert np.array_equal(found, np.repeat(expected[..., None], 3, axis=2))
    assert 100 < found.mean() < 155
