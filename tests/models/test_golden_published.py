"""EVLGen with OPT from its YAML and a published checkpoint, gives the published numbers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from evlgen.common.registry import registry
from evlgen.models.published.checkpoints import to_own_names, to_published_names


@pytest.fixture(scope="module", params=["evlgen_opt", "evlgen_video_opt"])
def folder(golden, request):
    return golden / request.param


@pytest.fixture(scope="module")
def expected(folder):
    return load_file(folder / "expected.safetensors")


@pytest.fixture(scope="module")
def texts(folder):
    return json.loads((folder / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model(folder):
    return registry.get_model_class(folder.name).from_config(folder / "model.yaml")


def assert_near(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Equal within a tolerance relative to the largest value."""
    assert got.shape == wanted.shape
    assert ((got - wanted).abs().max() / wanted.abs().max()).item() < tolerance


def test_image_embeddings(model, expected):
    assert_near(model.visual_tokens(expected["image"]), expected["image_embeds"], 1e-5)


@pytest.mark.parametrize("folder", ["evlgen_video_opt"], indirect=True)
def test_tokens_of_each_frame(model, expected):
    frames = expected["image"].transpose(1, 2).flatten(0, 1)
    tokens = model.encode_frames(frames, num_frames=4)
    assert_near(tokens.unflatten(0, (3, 4)), expected["vision_tokens_per_frame"], 1e-5)


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
        gradient, wanted = published[name.removeprefix("grad.")], expected[name]
        if name.endswith("temporal_merge.key.bias"):  # a softmax does not see it: both are rounding
            scale = expected[name.replace("bias", "weight")].abs().max()
            assert max(gradient.abs().max(), wanted.abs().max()) < 1e-5 * scale
        else:
            assert_near(gradient, wanted, 1e-4)


@pytest.mark.parametrize(
    ("key", "prompt", "options"),
    [
        ("beams1_max12", None, {"num_beams": 1, "max_length": 11}),
        ("beams5_max12", None, {"num_beams": 5, "max_length": 11}),
        ("prompted_beams1_max8", "a photo of", {"num_beams": 1, "max_length": 7}),
    ],
)
def test_generated_texts(model, expected, texts, key, prompt, options):
    samples = {"image": expected["image"], **({} if prompt is None else {"prompt": prompt})}
    assert model.generate(samples, **options) == texts["generated"][key]


@pytest.mark.parametrize("folder", ["evlgen_opt"], indirect=True)  # the published code of videos crashes here
@pytest.mark.parametrize(("beams", "length_penalty"), [(1, 0), (5, -1)])
def test_answers(model, expected, texts, beams, length_penalty):
    samples = {"image": expected["image"], "text_input": texts["questions"]}
    answers = model.predict_answers(
        samples,
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
