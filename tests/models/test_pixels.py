"""Pillow images given to a model: they go through its own eval processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from evlgen import load_model_and_preprocess
from evlgen.common.errors import DataError
from evlgen.datasets.shapes.world import draw, scene
from evlgen.media.video import FrameList


def image(index: int) -> Image.Image:
    return Image.fromarray(draw(scene("test", index))).resize((90, 70))


@pytest.fixture(scope="module")
def bundled():
    model, processors, _ = load_model_and_preprocess("evlgen_opt", "shapes")
    return model, processors["eval"]


def test_an_image_and_a_list_of_them_are_what_their_pixels_are(bundled):
    model, process = bundled
    images = [image(3), image(4)]
    pixels = torch.stack([process(one) for one in images])
    wanted = model.generate({"image": pixels}, num_beams=1)
    assert wanted[0] != wanted[1]
    for given in ({"image": images}, images, tuple(images), list(pixels), pixels):
        assert model.generate(given, num_beams=1) == wanted
        assert model.texts(model.generate_tokens(given, num_beams=1)) == wanted
    for given in ({"image": images[0]}, images[0], images[0].convert("RGBA")):
        assert model.generate(given, num_beams=1) == wanted[:1]
    asked = {"text_input": "what is it?"}
    answers = model.predict_answers({"image": images, **asked})
    assert answers == model.predict_answers({"image": pixels, **asked})
    assert model.rank_answers({"image": images[0], **asked}, ["yes", "no"])[0] in ("yes", "no")
    assert torch.equal(model.soft_prompts({"image": images}), model.soft_prompts({"image": pixels}))


@pytest.mark.parametrize(
    "given",
    [[], "x.png", ["x.png"], None, {"image": None}, np.zeros((64, 64, 3), np.uint8), [torch.zeros(3)]],
)
def test_other_things_are_refused_by_name(bundled, given):
    with pytest.raises(DataError, match="Pillow image|empty list|image has shape"):
        bundled[0].generate(given)


def test_a_video_model_takes_images_lists_of_frames_and_videos():
    model, processors, _ = load_model_and_preprocess("evlgen_video_opt", "shapes")
    frames = [image(3), image(4).convert("L")]
    video = FrameList([np.asarray(frame.convert("RGB")) for frame in frames])
    wanted = processors["eval"].__class__(64, model.vision.image_mean, model.vision.image_std)(video)
    for given in ([frames], [video]):
        assert torch.equal(model.encode(given), model.encode(wanted[None]))
    assert len(model.generate(frames, num_beams=1)) == 2
    with pytest.raises(DataError, match="different shapes"):
        model.generate([frames, frames[:1]])
