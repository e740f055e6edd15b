"""What the demo shows of a model, and which files it reads. No browser, and no gradio."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from evlgen.captioning import caption_files
from evlgen.commands import demo
from evlgen.common.errors import DataError
from evlgen.demo.exhibit import END, Exhibit
from evlgen.demo.page import _beside
from evlgen.demo.serve import example_files
from evlgen.demo.uploads import read_upload
from evlgen.models.zoo import load_model
from evlgen.serving.limits import Limits
from evlgen.visualization.figure import describe_stage, draw_stage


@pytest.fixture(scope="module")
def exhibit():
    return Exhibit("shapes", load_model("evlgen_opt", "shapes"))


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return [path for path, _ in example_files(tmp_path_factory.mktemp("examples"))]


def test_captions_are_those_of_the_command_and_their_words_multiply_to_their_probability(exhibit, examples):
    frames = read_upload(examples[0], Limits(), 4)
    (caption,) = exhibit.captions(frames, 5, 30)
    ((_, expected),) = caption_files([examples[0]])
    assert caption.text == expected
    words, chances = zip(*caption.words, strict=True)
    assert words == (*expected.split(), END)
    model = exhibit.model
    ((likelihood,),) = model.language.log_likelihoods(
        model.soft_prompts({"image": exhibit.pixels(frames)}), [model.prompt], [[expected]]
    )
    assert math.prod(chances) == pytest.approx(float(likelihood.exp()), rel=1e-4)
    (cut,) = exhibit.captions(frames, 1, 2)
    assert len(cut.words) == 2 and cut.words[-1][0] != END


def test_every_frame_of_a_video_is_an_image_to_a_model_of_images(exhibit, examples):
    frames = read_upload(examples[3], Limits(), 4)
    assert len(frames) == 4
    captions = exhibit.captions(frames, 1, 30)
    assert captions[1] == exhibit.captions(frames[1:2], 1, 30)[0]
    merging = exhibit.merging(frames)
    assert describe_stage(merging, 1) == "layer 1: 49 tokens, 48 regions + class token"
    first, last = (np.asarray(draw_stage(merging, stage)) for stage in (0, 99))
    assert first.shape == last.shape and (first != last).mean() > 0.3
    assert len(exhibit.answer(frames, [], "how many shapes are there?").split("\n\n")) == 4


def test_a_model_that_chats_reads_what_was_said(exhibit, monkeypatch):
    seen = []
    answer = exhibit.answerer.answer
    monkeypatch.setattr(exhibit.answerer, "answer", lambda asks: seen.extend(asks) or answer(asks))
    monkeypatch.setattr(exhibit, "chats", True)
    frames = [Image.new("RGB", (40, 40), "red")]
    past = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a star"}]
    text = exhibit.answer(frames, past, "and its colour?")
    first = {
        "role": "user",
        "content": [{"type": "image", "image": frames[0]}, {"type": "text", "text": "what is it?"}],
    }
    assert text == exhibit.model.chat([first, past[1], {"role": "user", "content": "and its colour?"}])
    (ask,) = seen
    assert [turn.text for turn in ask.turns] == ["what is it?", "a star", "and its colour?"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.png", b"", "the file is empty"),
        ("a.svg", b"<svg/>", "a.svg is not an image that is read here"),
        ("a.jpg", b"\x89PNG\r\n\x1a\n" + b"x" * 50, "image a.jpg"),
        ("a.mp4", b"x" * 3000, "a.mp4"),
        ("a.gif", b"GIF89a" + b"x" * 50, "broken"),
        ("a.png", b"x" * 3_000_001, "too large: at most 3 MB"),
    ],
)
def test_files_that_are_not_read_are_named_without_their_place(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        read_upload(tmp_path / name, Limits(body_bytes=3_000_000), 4)
    assert str(tmp_path) not in str(caught.value)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    Image.new("L", (2000, 2000)).save(tmp_path / "large.png")
    with pytest.raises(DataError, match="at most 1 megapixels"):
        read_upload(tmp_path / "large.png", Limits(image_pixels=1_000_000), 4)


def test_photographs_are_shown_where_their_parts_are(monkeypatch, tmp_path):
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path))
    assert demo._default_checkpoints() == [None]


def test_of_a_very_long_or_tall_image_a_small_one_is_shown():
    for size, shown in (
        ((64, 64), (256, 256)),
        ((6000, 4000), (768, 512)),
        ((20_000, 1), (2048, 1)),
        ((1, 20_000), (1, 512)),
    ):
        assert _beside([Image.new("RGB", size)]).size == shown
        assert _beside([Image.new("RGB", size)] * 3).size == (3 * shown[0], shown[1])
