"""What stands around a connector's output: places, and a part of the image that cannot become constant."""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from evlgen.common.errors import CheckpointError, ConfigError
from evlgen.common.registry import registry
from evlgen.config.config import load_model_config
from evlgen.datasets.shapes.captions import captions
from evlgen.datasets.shapes.world import draw, scene
from evlgen.models.soft_prompts import SoftPromptHead
from evlgen.processors.image import BlipImageEvalProcessor
from evlgen.runners.image_use import ImageUseMeter
from evlgen.runners.optimizer import build_optimizer


def head(num_places=3, channels=5, rms=0.5, scale=0.4) -> SoftPromptHead:
    torch.manual_seed(0)
    return SoftPromptHead(num_places, channels, rms, scale)


def test_in_training_it_is_batch_norm_plus_places():
    ours, theirs = head(), nn.BatchNorm1d(5, eps=1e-6)
    nn.init.constant_(theirs.weight, 0.2)
    prompts = torch.randn(8, 3, 5, requires_grad=True)
    expected = theirs(prompts.flatten(0, 1)).view(8, 3, 5) + ours.places
    torch.testing.assert_close(ours(prompts), expected)
    weights = torch.randn(8, 3, 5)
    (own,) = torch.autograd.grad((ours(prompts) * weights).sum(), prompts)
    (known,) = torch.autograd.grad((expected * weights).sum(), prompts)
    torch.testing.assert_close(own, known, atol=1e-5, rtol=1e-4)


def test_the_image_part_starts_at_its_share_of_the_word_embeddings_scale_whatever_the_connectors_is():
    for factor in (1e-2, 1.0, 1e2):
        ours = head(num_places=8, channels=64)
        out = ours(factor * torch.randn(32, 8, 64) + 7.0)
        assert (out - ours.places).square().mean().sqrt().item() == pytest.approx(0.2, rel=0.02)
        assert ours.places.square().mean().sqrt().item() == pytest.approx(0.5, rel=0.1)


def test_the_gradient_that_would_make_prompts_constant_does_not_reach_the_connector():
    prompts = torch.randn(8, 3, 5, requires_grad=True)
    head()(prompts).sum().backward()
    assert prompts.grad.abs().max() < 1e-5


def test_in_eval_mode_an_image_is_the_same_alone_and_in_a_batch_and_nothing_is_remembered():
    ours, prompts = head(), torch.randn(6, 3, 5) + 1.0
    ours(prompts)
    ours.eval()
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    together = ours(prompts)
    torch.testing.assert_close(ours(prompts[:1])[0], together[0])
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_the_first_batches_count_alike_in_what_is_remembered():
    ours, batches = head(), torch.randn(4, 8, 3, 5) + 3.0
    for batch in batches:
        ours(batch)
    torch.testing.assert_close(ours.mean, batches.mean((0, 1, 2)))


def _one_of_two(rank: int, address: str, prompts: torch.Tensor) -> list[torch.Tensor]:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timeout)
    try:
        ours = head()
        mine = prompts[:1] if rank == 0 else prompts[1:]  # of other sizes
        weights = prompts.detach().cos()[:1] if rank == 0 else prompts.detach().cos()[1:]
        mine = mine.clone().requires_grad_()
        (ours(mine) * weights).sum().backward()
        dist.all_reduce(ours.places.grad)
        dist.all_reduce(ours.gain.grad)
        return [mine.grad, ours.places.grad, ours.gain.grad, ours.mean, ours.variance]
    finally:
        dist.destroy_process_group()


def test_two_processes_standardise_as_one_with_all_their_images(forks, tmp_path):
    prompts = torch.randn(9, 3, 5, generator=torch.Generator().manual_seed(3)) + 1.0
    address = f"file://{tmp_path / 'meeting'}"
    other = forks.start(_one_of_two, 1, address, prompts)
    got = _one_of_two(0, address, prompts)
    other.join()
    assert other.exitcode == 0
    ours, whole = head(), prompts.clone().requires_grad_()
    (ours(whole) * prompts.cos()).sum().backward()
    expected = [whole.grad[:1], ours.places.grad, ours.gain.grad, ours.mean, ours.variance]
    for own, known in zip(got, expected, strict=True):
        torch.testing.assert_close(own, known, atol=1e-5, rtol=1e-4)


def test_numbers_that_are_not_finite_are_not_remembered():
    ours, prompts = head(), torch.randn(6, 3, 5)
    ours(prompts)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    ours(torch.full((6, 3, 5), float("nan")))
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("size", [1, 3, 16])
def test_what_distinguishes_images_is_as_loud_in_use_whatever_the_batch_size(size):
    """Images that differ much, each with soft prompts that differ little."""
    ours = head(channels=64)
    images = torch.randn(96, 1, 64) + 0.05 * torch.randn(96, 3, 64)
    for _ in range(3):
        for batch in images.split(size):
            last = ours(batch)
    ours.eval()
    used = (ours(images) - ours.places).square().mean().sqrt().item()
    assert used == pytest.approx(0.2, rel=0.15)
    learned = (last - ours.places).square().mean().sqrt().item()
    assert learned == pytest.approx(0.2, rel=0.5 if size == 1 else 0.25)


def test_a_batch_of_one_image_teaches_what_distinguishes_it():
    ours = head()
    ours(torch.randn(8, 3, 5))
    image = torch.randn(1, 3, 5, requires_grad=True)
    ours(image).sum().backward()  # its own mean would have no gradient
    assert image.grad.abs().min() > 1e-3


def test_every_frame_of_a_video_has_the_places_of_an_image():
    ours = head().eval()
    out = ours(torch.zeros(2, 6, 5))
    expected = ours.places.repeat(2, 1) - ours.mean * ours.gain
    torch.testing.assert_close(out[0], expected)


@pytest.fixture(scope="module")
def shapes():
    """Training and held-out scenes: pixels and a caption of each."""
    process = BlipImageEvalProcessor(image_size=64)

    def read(split, count):
        scenes = [scene(split, i) for i in range(count)]
        pixels = torch.stack([process(Image.fromarray(draw(s))) for s in scenes])
        return {"image": pixels, "text_input": [captions(s)[i % 5] for i, s in enumerate(scenes)]}

    return read("train", 128), read("val", 48)


# Deep, narrow, with dropout and a rate far too high: what real parts do at ordinary rates.
DEEP = {
    "name": "tomeformer",
    "num_layers": 12,
    "r": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def build(connector, soft_prompts=None):
    torch.manual_seed(0)
    overrides = {"checkpoint": None, "connector": connector, "soft_prompts": soft_prompts}
    cfg = load_model_config("evlgen_opt", "shapes", overrides=overrides)
    return registry.get_model_class("evlgen_opt").from_config(cfg)


def image_use_after_training(model, train, held_out, steps=80, rate=3e-2):
    tokens = model.encode(train["image"])
    optimizer = build_optimizer(model, rate, 0.05)
    weights = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 5) * group["lr_scale"]
        chosen = torch.randint(len(tokens), (8,), generator=generator)
        texts = [train["text_input"][i] for i in chosen]
        loss = model({"visual_tokens": tokens[chosen], "text_input": texts})["loss"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    model.eval()
    meter = ImageUseMeter(len(held_out["text_input"]))
    meter.add(model, held_out)
    return meter.over_processes()


def test_where_the_published_training_collapses_this_one_uses_the_image(shapes):
    published = image_use_after_training(build(DEEP), *shapes)
    assert published.is_ignored and published.common_fraction > 0.999 and abs(published.worth) < 0.01
    ours = build({**DEEP, **NO_DROPOUT, "residual": True}, {"scale": 0.4})
    found = image_use_after_training(ours, *shapes)
    assert not found.is_ignored and found.worth > 0.3 and found.common_fraction < 0.95


def test_a_checkpoint_keeps_it_and_says_when_the_config_does_not_fit(shapes, tmp_path):
    sizes = {**DEEP, "num_layers": 2, "residual": True}
    model = build(sizes, {"scale": 0.4})
    model.train()
    model(shapes[1])
    model.eval()
    saved = model.save_pretrained(tmp_path / "with")
    again = type(model).from_pretrained(saved)
    torch.testing.assert_close(again.soft_prompts(shapes[1]), model.soft_prompts(shapes[1]))
    with pytest.raises(CheckpointError, match=r"prompt_head\..*Set model.soft_prompts to what"):
        build(sizes).load_checkpoint(saved)
    without = build(sizes).save_pretrained(tmp_path / "without")
    with pytest.raises(CheckpointError, match="trained without .*prompt_head.*Set model.soft_prompts: null"):
        build(sizes, {"scale": 0.4}).load_checkpoint(without)
    plain = build({**sizes, "residual": False}).save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="trained without connector.proj_residual"):
        build(sizes, {"scale": 0.4}).load_checkpoint(plain)


def test_a_checkpoint_of_another_number_of_soft_prompts_gives_its_places(shapes, tmp_path):
    saved = build({"name": "pool", "grid": 2}, {"scale": 0.4}).save_pretrained(tmp_path / "saved")
    known = load_file(saved / "model.safetensors")["prompt_head.places"]
    model = build({"name": "pool", "grid": 3}, {"scale": 0.4})
    model.load_checkpoint(saved)
    assert len(known) == 4 and len(model.prompt_head.places) == 9
    assert torch.equal(model.prompt_head.places, known[[0, 0, 0, 1, 1, 2, 2, 3, 3]])
    model(shapes[1])


def test_places_learn_faster_and_what_starts_from_a_bert_slower():
    model = build({**DEEP, "num_layers": 1}, {"scale": 0.4})
    model.connector.init_lr_scale = 0.1

    def factors(**scales):
        groups = build_optimizer(model, 1.0, 0.0, lr_scale=scales).param_groups
        found = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        return {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}

    by_name = factors()
    assert by_name["prompt_head.places"] == 10.0 and by_name["prompt_head.gain"] == 1.0
    assert by_name["connector.layers.0.qkv.weight"] == by_name["connector.positions.weight"] == 0.1
    assert by_name["connector.proj_in.weight"] == by_name["ln_vision.weight"] == 1.0
    by_name = factors(connector=0.5, **{"connector.layers.0.qkv": 2.0})
    assert by_name["connector.proj_in.weight"] == 0.5 and by_name["ln_vision.weight"] == 1.0
    assert by_name["connector.layers.0.qkv.weight"] == 2.0
    with pytest.raises(ConfigError, match=r"run.lr_scale.conector: no trained .*Did you mean 'connector'"):
        factors(conector=0.5)
