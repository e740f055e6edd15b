"""What every registered connector promises: it learns on frozen backbones, alone, and counts its prompts."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from evlgen.common.registry import registry
from evlgen.config.config import load_model_config
from evlgen.datasets.shapes.captions import captions
from evlgen.datasets.shapes.world import draw, scene
from evlgen.processors.image import BlipImageEvalProcessor

COUNT, STEPS = 6, 8
BERT = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}

# Every registered connector has its section here, small; one that is new fails until it has.
SECTIONS = {
    "c_abstractor": {"grid": 3, "depth": 1, "hidden_size": 64},
    "linear": {},
    "mlp": {"hidden_size": 96},
    "pixel_shuffle": {"factor": 2},
    "pool": {"grid": 4},
    "qformer": {"num_query_token": 8, **BERT},
    "resampler": {"num_latents": 8, **BERT},
    "tomeformer": {"r": 16, **BERT},
}
VARIANTS = [
    ("linear", {"keep_prefix": False}),
    ("pixel_shuffle", {"factor": 3}),
    ("pool", {"grid": 3, "keep_prefix": True}),
    ("tomeformer", {"merge": "size_weighted", "proportional_attention": True}),
    ("tomeformer", {"residual": True}),
]
OWN = [
    name
    for name in registry.list_connectors()
    if registry.get_connector_class(name).__module__.startswith("evlgen.")  # not those of other tests
]
SMALL_VIT = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 4}
# a vision encoder without a class token, one with registers beside it, and nets whose feature maps are tokens
ENCODERS = {
    "siglip": ("vit_base_patch16_siglip_224", 0, SMALL_VIT),
    "registers": ("vit_small_patch14_reg4_dinov2", 5, SMALL_VIT),
    "efficientnet": ("tf_efficientnet_lite0", 0, {"out_indices": 2}),
    "convnext": ("convnext_atto", 0, {"out_indices": 1}),
    "mobilenet": ("mobilenetv4_conv_small", 0, {"out_indices": 2}),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name: str, changes: dict | None = None, **sections):
    torch.manual_seed(0)
    connector = {"name": name, **SECTIONS[name], **(changes or {})}
    cfg = load_model_config(
        "evlgen_opt", "shapes", overrides={"checkpoint": None, "connector": connector, **sections}
    )
    return registry.get_model_class("evlgen_opt").from_config(cfg)


@pytest.fixture(scope="module")
def samples():
    process = BlipImageEvalProcessor(image_size=64)
    scenes = [scene("train", i) for i in range(COUNT)]
    return {
        "image": torch.stack([process(Image.fromarray(draw(s))) for s in scenes]),
        "text_input": [captions(s)[i % 5] for i, s in enumerate(scenes)],
    }


@pytest.fixture(
    scope="module",
    params=[*((name, {}) for name in OWN), *VARIANTS],
    ids=lambda p: "-".join([p[0], *p[1]]),
)
def trained(request, samples):
    """A model after a few steps, its weights before them, and the losses."""
    model = build(*request.param)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.0)
    model.train()
    losses = []
    for _ in range(STEPS):
        loss = model(samples)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), before, losses


def test_the_loss_falls(trained):
    losses = trained[2]
    assert losses[-1] < 0.8 * losses[0]


def test_only_the_connector_and_its_norm_change_and_all_of_them(trained):
    model, before, _ = trained
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {k.partition(".")[0] for k in changed} == {"connector", "ln_vision"}
    own = {k for k, p in model.named_parameters() if p.requires_grad}
    assert changed <= own
    assert {k.partition(".")[0] for k in own} == {"connector", "ln_vision"}
    without = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without  # distributed training waits for the gradient of every weight


def test_soft_prompts_are_as_many_as_declared_and_of_the_language_models_width(trained, samples):
    model = trained[0]
    prompts = model.soft_prompts(samples)
    assert model.vision.num_tokens == 65
    assert prompts.shape == (COUNT, model.connector.num_soft_prompts(65), model.language.embed_dim)
    assert prompts.dtype == torch.float32 and prompts.isfinite().all()


def test_an_image_alone_gives_what_it_gives_in_a_batch(trained, samples):
    model = trained[0]
    with torch.no_grad():
        together = model.soft_prompts(samples)
        whole = model(samples)
        losses = []
        for i in range(3):
            one = {key: value[i : i + 1] for key, value in samples.items()}
            torch.testing.assert_close(model.soft_prompts(one)[0], together[i], atol=1e-5, rtol=1e-4)
        losses = [model({k: v[i : i + 1] for k, v in samples.items()}) for i in range(COUNT)]
    # captions of other lengths in the batch pad this one, and change nothing
    assert len({out["num_tokens"] for out in losses}) > 1
    mean = sum(out["loss"] * out["num_tokens"] for out in losses) / sum(out["num_tokens"] for out in losses)
    torch.testing.assert_close(whole["loss"], mean, atol=1e-4, rtol=1e-4)


def test_evaluation_is_deterministic(trained, samples):
    model = trained[0]
    assert torch.equal(model.soft_prompts(samples), model.soft_prompts(samples))
    options = {"num_beams": 1, "max_length": 3}
    assert model.generate(samples, **options) == model.generate(samples, **options)


def test_it_computes_in_bfloat16_near_float32(trained, samples):
    model = trained[0]
    with torch.no_grad():
        exact = model(samples)["loss"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(samples)["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, atol=0.05, rtol=0.02)


def test_what_is_saved_is_what_was_trained(trained, samples, tmp_path):
    model = trained[0]
    again = type(model).from_pretrained(model.save_pretrained(tmp_path / "saved"))
    assert again.cfg.connector == model.cfg.connector
    assert torch.equal(again.soft_prompts(samples), model.soft_prompts(samples))


@pytest.mark.parametrize("name", OWN)
def test_soft_prompts_start_at_the_scale_of_the_word_embeddings(name, samples):
    model = build(name)
    rms = model.soft_prompts(samples).square().mean().sqrt().item()
    assert 0.75 < rms / model.language.embedding_rms() < 1.35


@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in OWN), *VARIANTS])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_it_reads_encoders_with_other_tokens_before_the_patches(encoder, name, changes):
    timm_name, num_prefix, kwargs = ENCODERS[encoder]
    vision = {"name": timm_name, "image_size": 32, "pretrained": False, "kwargs": kwargs}
    model = build(name, changes, vision=vision)
    assert model.vision.num_prefix_tokens == num_prefix
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = model.soft_prompts({"image": image})
    assert prompts.shape == (2, model.connector.num_soft_prompts(16 + num_prefix), model.language.embed_dim)
    assert model({"image": image, "text_input": ["a red circle"] * 2})["loss"].isfinite()


@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in OWN), *VARIANTS])
def test_it_reads_the_frames_of_a_video_in_a_row(name, changes, samples):
    model = build(name, changes, vision={"temporal": {"form": "concat"}})
    videos = torch.stack([samples["image"][:3], samples["image"][3:6]]).transpose(1, 2)  # [B, 3, T, H, W]
    prompts = model.soft_prompts({"image": videos})
    assert prompts.shape == (2, model.connector.num_soft_prompts(3 * 65), model.language.embed_dim)
