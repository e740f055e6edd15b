"""Candidate answers about images and videos are ranked as by one loss after the other."""

from __future__ import annotations

import pytest
import torch

from evlgen.common.errors import ConfigError, DataError
from evlgen.common.registry import registry
from evlgen.config.config import load_model_config
from evlgen.models.blip2_stage1 import Blip2Stage1

PROMPT = "Question: {} Short answer:"
QUESTIONS = ["what color is the circle?", "how many stars are there?"]
ANSWERS = ["red", "two", "a blue square", "no", "left of the star"]


@pytest.fixture(scope="module", params=["evlgen_opt", "evlgen_video_opt"])
def model(request):
    """The bundled models, of images and of videos."""
    cls = registry.get_model_class(request.param)
    return cls.from_config(load_model_config(request.param, "shapes", {"language": {"precision": "fp32"}}))


@pytest.fixture
def samples(model):
    size = model.vision.image_size
    shape = (2, 3, 2, size, size) if model.temporal else (2, 3, size, size)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return {"image": image, "text_input": QUESTIONS}


@torch.no_grad()
def likeliest(model, samples, lists):
    """By the loss of each answer by itself."""
    best = []
    for row, answers in enumerate(lists):
        losses = []
        for answer in answers:
            one = {"image": samples["image"][row : row + 1], "text_input": [PROMPT.format(QUESTIONS[row])]}
            out = model({**one, "text_output": [answer]})
            losses.append(out["loss"].item() * out["num_tokens"])
        best.append(answers[losses.index(min(losses))])
    return best


def test_the_answer_of_the_smallest_loss_is_taken(model, samples):
    expected = likeliest(model, samples, [ANSWERS, ANSWERS])
    assert model.rank_answers(samples, ANSWERS, PROMPT) == expected
    assert model.rank_answers(samples, ANSWERS, PROMPT, num_candidates=len(ANSWERS)) == expected


def test_each_question_may_have_candidates_of_its_own(model, samples):
    lists = [["two", "no"], ["a blue square", "left of the star", "red"]]
    assert model.rank_answers(samples, lists, PROMPT) == likeliest(model, samples, lists)


def test_images_are_read_once(model, samples, monkeypatch):
    reads = []
    encode = type(model).encode
    monkeypatch.setattr(
        type(model), "encode", lambda self, image: reads.append(len(image)) or encode(self, image)
    )
    model.rank_answers(samples, ANSWERS, PROMPT)
    assert reads == [2]


def test_visual_tokens_serve_in_place_of_images(model, samples):
    kept = {"visual_tokens": model.encode(samples["image"]), "text_input": QUESTIONS}
    assert model.rank_answers(kept, ANSWERS, PROMPT) == model.rank_answers(samples, ANSWERS, PROMPT)


def test_what_cannot_be_ranked_is_named(model, samples):
    for candidates in ([], [["red"], []]):
        with pytest.raises(DataError, match="there are no candidate answers to rank"):
            model.rank_answers(samples, candidates)
    with pytest.raises(ConfigError, match="3 lists of candidate answers for 2 images"):
        model.rank_answers(samples, [["red"]] * 3)


def test_a_first_stage_ranks_nothing():
    with pytest.raises(ConfigError, match="BLIP-2's first stage answers no questions"):
        Blip2Stage1.__new__(Blip2Stage1).rank_answers({}, ANSWERS)
