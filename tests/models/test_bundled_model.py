"""What the bundled model has learned, and that it is the image it reads."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from evlgen import load_model_and_preprocess
from evlgen.datasets.shapes.checker import check
from evlgen.datasets.shapes.world import draw, scene

COUNT = 100


@pytest.fixture(scope="module")
def loaded():
    return load_model_and_preprocess("evlgen_opt", "shapes")


@pytest.fixture(scope="module")
def scenes():
    return [scene("test", i) for i in range(COUNT)]


@pytest.fixture(scope="module")
def pixels(loaded, scenes):
    process = loaded[1]["eval"]
    return torch.stack([process(Image.fromarray(draw(s))) for s in scenes])


def share_true(captions, scenes) -> float:
    return sum(check(c, s).true for c, s in zip(captions, scenes, strict=True)) / len(scenes)


def test_its_captions_of_held_out_images_are_true(loaded, scenes, pixels):
    captions = loaded[0].generate({"image": pixels}, num_beams=1, max_length=40)
    assert share_true(captions, scenes) >= 0.85


def test_captions_of_other_images_are_not(loaded, scenes, pixels):
    captions = loaded[0].generate({"image": pixels.roll(1, dims=0)}, num_beams=1, max_length=40)
    assert share_true(captions, scenes) <= 0.05


def test_the_language_model_without_the_image_is_rarely_right(loaded, scenes):
    language = loaded[0].language
    nothing = torch.zeros(COUNT, 0, language.embed_dim)
    torch.manual_seed(0)
    for options in ({"num_beams": 1}, {"use_nucleus_sampling": True}):
        captions = language.generate(nothing, ["there is"] * COUNT, max_length=40, **options)
        assert share_true([f"there is {c}" for c in captions], scenes) <= 0.05


def test_its_soft_prompts_are_seventeen_of_sixty_five_tokens(loaded, pixels):
    model = loaded[0]
    assert model.visual_tokens(pixels[:2]).shape == (2, 65, 128)
    assert model.soft_prompts({"image": pixels[:2]}).shape == (2, 17, 128)
