"""Image processors against the transforms LAVIS composes them of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from evlgen.common.errors import ConfigError, DataError, RegistryError
from evlgen.processors import build_processor
from evlgen.processors.image import CLIP_MEAN, CLIP_STD
from evlgen.processors.randaugment import RandAugment

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
BICUBIC = transforms.InterpolationMode.BICUBIC
NAMES = ("blip_image_eval", "blip2_image_train", "blip_image_train")


def published(*geometry) -> transforms.Compose:
    return transforms.Compose([*geometry, transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD)])


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_contiguous_float32_of_the_asked_size(name: str) -> None:
    pixels = build_processor({"name": name, "image_size": 32})(PHOTO)
    assert (pixels.shape, pixels.dtype) == ((3, 32, 32), torch.float32)
    assert pixels.is_contiguous()


def test_default_sizes_are_the_published_ones() -> None:
    assert {name: build_processor({"name": name})(PHOTO).shape[-1] for name in NAMES} == {
        "blip_image_eval": 384,
        "blip2_image_train": 364,
        "blip_image_train": 384,
    }


def test_eval_equals_the_published_transforms() -> None:
    expected = published(transforms.Resize((40, 40), interpolation=BICUBIC))(PHOTO)
    pixels = build_processor({"name": "blip_image_eval", "image_size": 40})(PHOTO)
    torch.testing.assert_close(pixels, expected, atol=2e-6, rtol=0)


def test_training_equals_the_published_transforms_under_one_seed() -> None:
    crop = transforms.RandomResizedCrop(40, scale=(0.5, 1.0), interpolation=BICUBIC)
    expected = published(crop, transforms.RandomHorizontalFlip())
    ours = build_processor({"name": "blip2_image_train", "image_size": 40})
    for seed in range(8):
        torch.manual_seed(seed)
        target = expected(PHOTO)
        torch.manual_seed(seed)
        torch.testing.assert_close(ours(PHOTO), target, atol=2e-6, rtol=0)


def test_blip_training_augments_after_crop_and_flip() -> None:
    crop = transforms.RandomResizedCrop(40, scale=(0.5, 1.0), interpolation=BICUBIC)
    expected = published(crop, transforms.RandomHorizontalFlip(), RandAugment(num_ops=2, magnitude=5))
    ours = build_processor({"name": "blip_image_train", "image_size": 40})
    for seed in range(20):
        torch.manual_seed(seed)
        target = expected(PHOTO)
        torch.manual_seed(seed)
        torch.testing.assert_close(ours(PHOTO), target, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["blip2_image_train", "blip_image_train"])
def test_seeding_torch_repeats_a_training_picture(name: str) -> None:
    processor = build_processor({"name": name, "image_size": 32})

    def views() -> torch.Tensor:
        torch.manual_seed(3)
        return torch.stack([processor(PHOTO) for _ in range(6)])

    first = views()
    assert torch.equal(first, views())
    assert not torch.equal(first[0], first[1])


def test_own_mean_and_std_are_used() -> None:
    section = {"name": "blip_image_eval", "image_size": 8, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 1]}
    pixels = build_processor(section)(Image.new("RGB", (8, 8), "white"))
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([1.0, 2.0, 0.5]))


def test_any_mode_is_accepted_without_opening_it_first() -> None:
    processor = build_processor({"name": "blip_image_eval", "image_size": 8})
    deep = Image.fromarray(np.full((6, 9), 32768, dtype=np.uint16))
    torch.testing.assert_close(processor(deep), processor(Image.new("RGB", (9, 6), (128, 128, 128))))
    with pytest.raises(DataError, match="expected a Pillow image, got str"):
        processor("photo.jpg")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "blip_image_eval", "image_sise": 8}, r"image_sise.*Did you mean 'image_size'"),
        ({"name": "blip_image_eval", "image_size": 0}, r"image_size.*at least 1"),
        ({"name": "blip_image_eval", "mean": [0.5]}, r"mean: must be \[float, float, float\]"),
        ({"name": "blip_image_eval", "std": [0.5]}, r"std: must be \[float, float, float\]"),
        ({"name": "blip_image_eval", "std": [0.5, 0.0, 0.5]}, r"std must be positive"),
        (
            {"name": "blip2_image_train", "min_scale": 0.9, "max_scale": 0.5},
            r"min_scale 0.9 and max_scale 0.5",
        ),
        ({"name": "blip2_image_train", "max_scale": 1.5}, r"max_scale.*at most 1"),
        ({"image_size": 8}, r"needs the name of a processor"),
    ],
)
def test_impossible_settings_are_named(section: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_processor(section)


def test_misspelt_processor_names_the_nearest() -> None:
    with pytest.raises(RegistryError, match="Did you mean 'blip2_image_train'"):
        build_processor({"name": "blip2_image_trian"})
