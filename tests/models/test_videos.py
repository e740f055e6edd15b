"""Models of videos: what temporal attention promises, and the simpler ways."""

from __future__ import annotations

import pytest
import torch

from evlgen.common.errors import ConfigError, DataError
from evlgen.common.registry import registry
from evlgen.config.config import load_model_config
from evlgen.models.vision.temporal import ATTENTIVE_FORMS, TemporalAttention, temporal_modules

VISION = {
    "name": "vit_tiny_patch16_224",
    "image_size": 32,
    "pretrained": False,
    "kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4},
}
ENCODERS = {
    "vit": VISION,
    "eva with layer scale": {
        **VISION,
        "name": "eva02_tiny_patch14_224",
        "kwargs": {**VISION["kwargs"], "init_values": 0.5},
    },
    "vit with layer scale": {**VISION, "kwargs": {**VISION["kwargs"], "init_values": 0.5}},
}
CONNECTOR = {
    "name": "tomeformer",
    "num_layers": 2,
    "r": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def build(arch: str = "evlgen_video_opt", temporal: dict | None = None, vision: dict = VISION, **section):
    torch.manual_seed(0)
    cfg = {
        "vision": {**vision, "temporal": temporal},
        "connector": CONNECTOR,
        "language": {"name": "evlgen://assets/shapes/language", "precision": "fp32"},
        "checkpoint": None,
        **section,
    }
    cls = registry.get_model_class(arch)
    return cls.from_config(load_model_config(arch, "shapes", cfg))


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def video() -> torch.Tensor:
    return torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(2))


def slow_temporal_attention(module: TemporalAttention, x: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Token by token and head by head."""
    videos = x.unflatten(0, (-1, num_frames))  # [B, T, N, C]
    out = torch.empty_like(videos)
    width = x.shape[-1] // 8
    for b in range(videos.shape[0]):
        for n in range(videos.shape[2]):
            frames = videos[b, :, n]  # [T, C]
            query, key = module.query(frames) * 256**-0.5, module.key(frames)
            for h in range(8):
                part = slice(32 * h, 32 * h + 32)
                weights = (query[:, part] @ key[:, part].T).softmax(-1)
                channels = slice(width * h, width * h + width)
                out[b, :, n, channels] = weights @ frames[:, channels]
    if module.form == "average":
        out = (1 - module.alpha) * videos + module.alpha * out
    else:
        out = videos + module.alpha * out
    return out.flatten(0, 1)


@pytest.mark.parametrize("form", ATTENTIVE_FORMS)
def test_temporal_attention_equals_the_slow_obvious_version(form):
    torch.manual_seed(0)
    module = TemporalAttention(16, form)
    torch.nn.init.constant_(module.alpha, 0.7)
    module.num_frames = 3
    x = torch.randn(6, 5, 16)
    torch.testing.assert_close(module(x), slow_temporal_attention(module, x, 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vision", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("alpha", [-0.5, 0.0, 1.0, 3.0])
def test_a_still_video_is_the_image_for_every_alpha_in_the_average_form(image, alpha, vision):
    model = build(temporal={"form": "average"}, vision=vision)
    of_image = build("evlgen_opt", vision=vision)
    of_image.connector = model.connector
    for module in temporal_modules(model.vision):
        torch.nn.init.constant_(module.alpha, alpha)
    still = image.unsqueeze(2).expand(-1, -1, 4, -1, -1)
    wanted = of_image.visual_tokens(image)
    torch.testing.assert_close(model.visual_tokens(still), wanted, rtol=1e-4, atol=1e-5)
    of_video, of_one_image = model.soft_prompts({"image": still}), of_image.soft_prompts({"image": image})
    torch.testing.assert_close(of_video, of_one_image, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("vision", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("form", ATTENTIVE_FORMS)
def test_with_alpha_0_a_video_is_the_mean_of_its_frames_tokens(video, form, vision):
    model, of_image = build(temporal={"form": form}, vision=vision), build("evlgen_opt", vision=vision)
    frames = torch.stack([of_image.encode(frame) for frame in video.unbind(2)], 1)  # [B, T, N, C]
    torch.testing.assert_close(model.encode(video), frames.mean(1), rtol=1e-5, atol=1e-5)


def test_mean_and_concatenation_of_frames(video):
    of_image = build("evlgen_opt")
    frames = torch.stack([of_image.encode(frame) for frame in video.unbind(2)], 1)
    mean, concat = build(temporal={"form": "mean"}), build(temporal={"form": "concat"})
    torch.testing.assert_close(mean.encode(video), frames.mean(1))
    torch.testing.assert_close(concat.encode(video), frames.flatten(1, 2))
    soft_prompts = concat.soft_prompts({"image": video})
    assert soft_prompts.shape[1] == concat.connector.num_soft_prompts(4 * 17) == 4 * 17 - 2 * 3
    assert not temporal_modules(mean.vision) and not temporal_modules(concat.vision)
    each = build(temporal={"form": "each"})
    each.connector = concat.connector
    rows = [concat.soft_prompts({"image": frame}) for frame in video.unbind(2)]  # a frame is an image
    torch.testing.assert_close(each.soft_prompts({"image": video}), torch.cat(rows, 1), rtol=1e-4, atol=1e-5)
    for model in (mean, concat, each):
        assert model.num_soft_prompts(video[0]) == model.soft_prompts({"image": video}).shape[1]


def test_the_frames_matter_once_alpha_is_not_0(video):
    model = build(temporal={"form": "average"})
    before = model.encode(video)
    for module in temporal_modules(model.vision):
        torch.nn.init.constant_(module.alpha, 0.5)
    assert not torch.allclose(model.encode(video), before, atol=1e-3)


def test_an_image_checkpoint_loads_with_only_the_temporal_weights_new(tmp_path):
    build("evlgen_opt").save_pretrained(tmp_path / "image")
    report = build().load_checkpoint(tmp_path / "image")
    assert not report.unexpected and report.loaded
    kinds = ("alpha", "query.weight", "query.bias", "key.weight", "key.bias")
    wanted = {f"vision.trunk.blocks.{i}.temporal_merge.{kind}" for i in range(2) for kind in kinds}
    assert set(report.missing) == wanted


def test_only_the_temporal_weights_of_a_frozen_encoder_are_trained_and_saved(video, tmp_path):
    model = build(temporal={"form": "residual"}).train()
    assert not model.vision.training and not model.language.training
    assert all(module.training for module in temporal_modules(model.vision))
    model({"image": video, "text_input": ["a circle", "a square"]})["loss"].backward()
    learned = {name for name, p in model.vision.named_parameters() if p.grad is not None}
    assert learned == {name for name, _ in model.vision.named_parameters() if "temporal_merge" in name}
    assert model.vision.trunk.blocks[0].temporal_merge.alpha.grad.abs() > 0
    saved = {name for name in model.trained_state_dict() if name.startswith("vision.")}
    assert saved == {f"vision.{name}" for name in learned}
    torch.nn.init.constant_(model.vision.trunk.blocks[1].temporal_merge.alpha, 0.3)
    again = build(temporal={"form": "residual"})  # the same frozen weights
    again.load_checkpoint(model.save_pretrained(tmp_path / "clips"))
    torch.testing.assert_close(again.encode(video), model.eval().encode(video))


def test_an_image_is_a_video_of_one_frame(image):
    model = build()
    torch.testing.assert_close(model.encode(image), model.encode(image.unsqueeze(2)))
    assert model.generate({"image": image}, num_beams=1, max_length=4) == model.generate(
        {"image": image.unsqueeze(2)}, num_beams=1, max_length=4
    )


def test_questions_about_videos_are_answered_one_by_one_as_in_a_batch(video):
    model = build()
    options = {"prompt": "Question: {} Short answer:", "max_len": 4, "num_beams": 2}
    questions = ["what color is the circle?", "how many?"]
    answers = model.predict_answers({"image": video, "text_input": questions}, **options)
    one_by_one = [
        model.predict_answers({"image": video[i : i + 1], "text_input": [question]}, **options)[0]
        for i, question in enumerate(questions)
    ]
    assert answers == one_by_one and len(answers) == 2


def test_videos_of_different_lengths_follow_each_other(video):
    model = build(temporal={"form": "residual"})
    for module in temporal_modules(model.vision):
        torch.nn.init.constant_(module.alpha, 0.5)
    alone = model.encode(video[:, :, :2])
    model.encode(video)
    torch.testing.assert_close(model.encode(video[:, :, :2]), alone)


def test_frozen_weights_in_bf16_with_temporal_weights_in_fp32(video):
    model = build(vision={**VISION, "precision": "bf16"})
    assert model.encode(video).dtype == torch.bfloat16
    assert {p.dtype for module in temporal_modules(model.vision) for p in module.parameters()} == {
        torch.float32
    }
    model.train()({"image": video, "text_input": ["a circle", "a square"]})["loss"].backward()
    assert model.vision.trunk.blocks[0].temporal_merge.alpha.grad.isfinite()


@pytest.mark.parametrize(
    ("vision", "problem"),
    [
        ({"name": "resnet18", "image_size": 32, "pretrained": False}, "has no such blocks"),
        ({**VISION, "kwargs": {**VISION["kwargs"], "embed_dim": 36}}, "divide into 8 heads"),
    ],
)
def test_encoders_that_cannot_attend_over_frames(vision, problem):
    with pytest.raises(ConfigError, match=problem):
        build(vision=vision)


def test_a_video_for_a_model_of_images_names_the_key(video):
    with pytest.raises(ConfigError, match=r"model\.vision\.temporal"):
        build("evlgen_opt").encode(video)


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((2, 3, 0, 32, 32), "at least one frame"),
        ((3, 32, 32), r"must be \[B, 3, H, W\]"),
        ((2, 1, 32, 32), r"must be \[B, 3, H, W\]"),
        ((2, 3, 48, 48), "reads 32 x 32 pixels"),
    ],
)
def test_images_of_other_shapes_are_named(shape, problem):
    with pytest.raises(DataError, match=problem):
        build().encode(torch.zeros(shape))


def test_as_many_prompts_as_images(image):
    with pytest.raises(ConfigError, match="3 prompts for 2 images"):
        build().generate({"image": image, "prompt": ["a", "b", "c"]})


def test_every_temporal_weight_has_a_gradient_after_images_too(image):
    model = build(temporal={"form": "average"}).train()
    model({"image": image, "text_input": ["a circle", "a square"]})["loss"].backward()
    weights = [p for module in temporal_modules(model.vision) for p in module.parameters()]
    assert all(p.grad is not None for p in weights)  # DistributedDataParallel waits for all of them
