"""Image processors against the transforms LAVIS composes them of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from evlgen.common.errors import ConfigError, DataError, RegistryError
from evlgen.media.images import open_image
from evlgen.processors import build_processor
from evlgen.processors.image import CLIP_MEAN, CLIP_STD
from evlgen.processors.randaugment import RandAugment

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
BICUBIC = transforms.InterpolationMode.BICUBIC
NAMES = ("blip_image_eval", "blip2_image_train", "blip_image_train", "clip_image_eval", "clip_image_train")


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
        "clip_image_eval": 224,
        "clip_image_train": 224,
    }


def test_eval_equals_the_published_transforms() -> None:
    expected = published(transforms.Resize((40, 40), interpolation=BICUBIC))(PHOTO)
    pixels = build_processor({"name": "blip_image_eval", "image_size": 40})(PHOTO)
    torch.testing.assert_close(pixels, expected, atol=2e-6, rtol=0)


def test_clip_eval_is_the_square_in_the_middle() -> None:
    for photo in (PHOTO, PHOTO.transpose(Image.Transpose.ROTATE_90), PHOTO.crop((0, 0, 31, 20))):
        expected = published(transforms.Resize(40, interpolation=BICUBIC), transforms.CenterCrop(40))(photo)
        pixels = build_processor({"name": "clip_image_eval", "image_size": 40})(photo)
        torch.testing.assert_close(pixels, expected, atol=2e-6, rtol=0)


def test_clip_eval_of_a_very_long_image_is_its_middle() -> None:
    for resize in ("pillow", "torch"):
        section = {"name": "clip_image_eval", "image_size": 40, "resize": resize}
        processor = build_processor(section)
        torch.testing.assert_close(
            processor(PHOTO), build_processor({**section, "resize": "pillow"})(PHOTO), atol=0.05, rtol=0
        )
        line = Image.new("RGB", (1, 1_000_000), "red")
        line.paste("blue", (0, 499_990, 1, 500_010))
        for long in (line, line.transpose(Image.Transpose.ROTATE_90)):
            torch.testing.assert_close(processor(long), processor(Image.new("RGB", (9, 9), "blue")))


def test_clip_training_equals_the_published_transforms_under_one_seed() -> None:
    expected = published(transforms.RandomResizedCrop(40, scale=(0.9, 1.0), interpolation=BICUBIC))
    ours = build_processor({"name": "clip_image_train", "image_size": 40})
    for seed in range(4):
        torch.manual_seed(seed)
        target = expected(PHOTO)
        torch.manual_seed(seed)
        torch.testing.assert_close(ours(PHOTO), target, atol=2e-6, rtol=0)


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
def test_seeding_torch_repeats_a_training_image(name: str) -> None:
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


@pytest.mark.parametrize("name", ["blip_image_eval", "blip2_image_train"])
@pytest.mark.parametrize("size", [(64, 48), (300, 451), (20, 31), (40, 40), (9, 200), (1, 1)])
def test_torch_resizes_as_pillow_does_but_for_one_of_255(name: str, size: tuple[int, int]) -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    section = {"name": name, "image_size": 40, "mean": [0, 0, 0], "std": [1, 1, 1], "resize": "torch"}
    processor = build_processor(section)
    torch.manual_seed(3)
    pixels = processor(noise) * 255
    torch.manual_seed(3)
    left, top, width, height, is_mirrored = 0, 0, *size, False
    if name == "blip2_image_train":
        params = processor.transform.transforms[0].make_params([noise])
        left, top, width, height = (params[key] for key in ("left", "top", "width", "height"))
        is_mirrored = torch.rand(1).item() < 0.5
    part = noise.crop((left, top, left + width, top + height))
    rows = part.resize((40, height), Image.Resampling.BICUBIC)  # Pillow's order of the two depends on sizes
    expected = rows.resize((40, 40), Image.Resampling.BICUBIC)
    expected = np.asarray(expected)[:, ::-1] if is_mirrored else np.asarray(expected)
    difference = (pixels - torch.from_numpy(expected.transpose(2, 0, 1).copy())).abs()
    assert difference.max() < 1.01 and (difference > 0.5).float().mean() < 0.03
    assert pixels.is_contiguous() and pixels.shape == (3, 40, 40)


@pytest.mark.parametrize("min_scale", [0.2, 0.5, 1.0])
def test_no_part_of_an_image_of_the_draft_size_is_smaller_than_the_target(min_scale: float) -> None:
    processor = build_processor(
        {"name": "blip2_image_train", "image_size": 40, "min_scale": min_scale, "draft": True}
    )
    crop, least = processor.transform.transforms[0], processor.draft_size
    sides = []
    torch.manual_seed(0)
    for width, height in ((least, least), (least, 2 * least), (3 * least, least), (least + 7, least)):
        image = Image.new("RGB", (width, height))
        for _ in range(60):
            params = crop.make_params([image])
            sides.append(min(params["width"], params["height"]))
    assert min(sides) >= 40
    assert min(sides) < 50 or min_scale == 1.0  # and none larger than it must be


def test_a_draft_is_decoded_smaller_but_never_below_the_target(tmp_path) -> None:
    x = np.linspace(0, 3, 640)
    smooth = 127 + 120 * np.sin(np.add.outer(x[:480], x)[..., None] * (1, 2, 3))
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "x.jpg", quality=95)
    for size, decoded in ((224, (320, 240)), (240, (320, 240)), (241, (640, 480)), (100, (160, 120))):
        plain, draft = (
            build_processor({"name": "blip_image_eval", "image_size": size, "draft": draft, "std": [1] * 3})
            for draft in (False, True)
        )
        assert plain.draft_size is None
        opened = open_image(tmp_path / "x.jpg", draft.draft_size)
        assert opened.size == decoded
        assert (draft(opened) - plain(open_image(tmp_path / "x.jpg"))).abs().mean() < 0.01
