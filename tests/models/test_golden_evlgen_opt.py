"""EVLGen-OPT, built from its YAML and a published checkpoint, equals the published implementation."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from evlgen.common.registry import registry
from evlgen.models.published import to_own_names, to_published_names


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "evlgen_opt"


@pytest.fixture(scope="module")
def expected(folder):
    return load_file(folder / "expected.safetensors")


@pytest.fixture(scope="module")
def texts(folder):
    return json.loads((folder / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model(folder):
    return registry.get_model_class("evlgen_opt").from_config(folder / "model.yaml")


def assert_near(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Equal within a tolerance relative to the largest value."""
    assert got.shape == wanted.shape
    assert ((got - wanted).abs().max() / wanted.abs().max()).item() < tolerance


def test_image_embeddings(model, expected):
    assert_near(model.visual_tokens(expected["image"]), expected["image_embeds"], 1e-5)


def test_hidden_states_of_every_layer_and_soft_prompts(model, expected, texts):
    details = model.connector.forward_details(expected["image_embeds"])
    assert [h.shape[1] for h in details["hidden_states"]] == texts["token_counts"]
    for index, hidden in enumerate(details["hidden_states"]):
        assert_near(hidden, expected[f"connector_hidden_{index}"], 1e-5)
    assert_near(details["soft_prompts"], expected["soft_prompts"], 1e-5)
    assert_near(model.soft_prompts({"image": expected["image"]}), expected["soft_prompts"], 1e-5)
    assert model.connector.num_soft_prompts(17) == texts["token_counts"][-1]


def test_the_merge_map_names_each_tokens_soft_prompt(model, expected):
    merge_map = model.connector.forward_details(expected["image_embeds"])["merge_map"]
    assert merge_map.shape == (3, 17)
    assert all(set(row) == set(range(8)) for row in merge_map.tolist())
    assert (merge_map[:, 0] == 0).all()


def test_loss_and_gradients(model, expected, texts):
    model.zero_grad()
    loss = model({"image": expected["image"], "text_input": texts["texts"]})["loss"]
    assert loss.dtype == torch.float32
    assert abs(loss.item() - texts["loss"]) / texts["loss"] < 1e-5
    loss.backward()
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    published = to_published_names(own)
    names = [name for name in expected if name.startswith("grad.")]
    assert names
    for name in names:
        assert_near(published[name.removeprefix("grad.")], expected[name], 1e-4)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("beams1_max12", {"num_beams": 1, "max_length": 11}),
        ("beams5_max12", {"num_beams": 5, "max_length": 11}),
        ("prompted_beams1_max8", {"num_beams": 1, "max_length": 7, "prompt": "a photo of"}),
    ],
)
def test_generated_texts(model, expected, texts, key, options):
    samples = {"image": expected["image"]}
    if "prompt" in options:
        samples["prompt"] = options.pop("prompt")
    assert model.generate(samples, **options) == texts["generated"][key]


@pytest.mark.parametrize(("beams", "length_penalty"), [(1, 0), (5, -1)])
def test_answers(model, expected, texts, beams, length_penalty):
    answers = model.predict_answers(
        {"image": expected["image"], "text_input": texts["questions"]},
        num_beams=beams,
        max_len=6,
        prompt="Question: {} Short answer:",
        length_penalty=length_penalty,
    )
    assert answers == texts["generated"][f"answers_beams{beams}"]


def test_names_go_both_ways(folder):
    published = {
        k: v
        for k, v in torch.load(folder / "checkpoint_4.pth", weights_only=True)["model"].items()
        if not k.startswith("opt_model.")
    }
    back = to_published_names(to_own_names(published))
    assert back.keys() == published.keys()
    assert all(torch.equal(back[k], published[k]) for k in published)
