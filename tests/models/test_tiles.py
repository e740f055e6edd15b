"""Images of high resolution in tiles: their grids, what the model reads of them, and what is refused."""

from __future__ import annotations

import json
import random

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from evlgen.assemble import run
from evlgen.common.errors import ConfigError, DataError
from evlgen.common.registry import registry
from evlgen.config.config import Config, load_model_config
from evlgen.config.schema import build_dataclass
from evlgen.models.vision import TimmEncoder
from evlgen.models.zoo import load_preprocess
from evlgen.processors import build_processor
from evlgen.processors.tiles import choose_grid

SIDE = 64
CONNECTOR = {"name": "tomeformer", "num_layers": 2, "r": 12, "init": None}
CONNECTOR |= {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 80,
}


def build(tiles, connector=CONNECTOR, arch="evlgen_opt", **vision):
    torch.manual_seed(0)
    changes = {"vision": {"tiles": tiles, **vision}, "connector": connector, "checkpoint": None}
    return registry.get_model_class(arch).from_config(load_model_config(arch, "shapes", changes)).eval()


def pixels(rows, columns, seed=0):
    return torch.randn(3, rows * SIDE, columns * SIDE, generator=torch.Generator().manual_seed(seed))


#: ``image_grid_pinpoints`` of LLaVA-1.6, as rows and columns: neither a single tile nor four in a row.
LLAVA_16 = [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]


def anyres(size, grids, side):
    """Rows and columns by transformers' own code for LLaVA-NeXT."""
    width, height = size
    rows, columns = select_best_resolution((height, width), [(r * side, c * side) for r, c in grids])
    return rows // side, columns // side


def test_grids_are_those_of_llava_next():
    draw, side = random.Random(0), 336
    shared = 0
    for most in (1, 2, 4, 6):
        grids = [(r, c) for r in range(1, 7) for c in range(1, 7) if r * c <= most]
        grids.sort(key=lambda grid: grid[0] * grid[1])
        for _ in range(200):
            size = draw.randint(1, 2000), draw.randint(1, 2000)
            chosen = choose_grid(*size, side, most)
            assert chosen == anyres(size, grids, side), size
            if most == 4 and chosen in LLAVA_16:
                assert chosen == anyres(size, LLAVA_16, side), size
                shared += 1
    assert shared > 100
    expected = {(672, 336): (1, 2), (300, 700): (3, 1), (1000, 1000): (2, 2), (640, 480): (2, 2)}
    expected |= {(2000, 500): (1, 4), (336, 336): (1, 1), (100, 80): (1, 1)}
    assert {size: choose_grid(*size, side, 4) for size in expected} == expected
    assert [anyres(size, LLAVA_16, side) for size in ((2000, 500), (336, 336))] == [(1, 3), (1, 2)]


@pytest.mark.parametrize("name", ["blip_image_eval", "blip2_image_train", "blip_image_train"])
def test_processors_give_grids_that_follow_proportions(name):
    process = build_processor({"name": name, "image_size": 16, "max_tiles": 4})
    wide, tall, small = (Image.new("RGB", size, "red") for size in ((90, 30), (30, 90), (12, 12)))
    shapes = [tuple(process(image).shape) for image in (wide, tall, small)]
    if name == "blip_image_eval":
        assert shapes == [(3, 16, 48), (3, 48, 16), (3, 16, 16)]
        two = Image.new("RGB", (64, 32), "red")
        two.paste("blue", (32, 0, 64, 32))
        red, blue = process(two)[0, :, :12].mean(), process(two)[0, :, 20:].mean()
        assert tuple(process(two).shape) == (3, 16, 32) and red > blue + 1
    assert all(h % 16 == w % 16 == 0 and h * w <= 4 * 256 for _, h, w in shapes)
    plain = build_processor({"name": name, "image_size": 16})
    assert tuple(plain(wide).shape) == (3, 16, 16)


@torch.no_grad()
@pytest.mark.parametrize("overview", [True, False])
def test_soft_prompts_are_those_of_the_overview_and_of_each_tile(overview):
    model = build({"max": 4, "overview": overview, "row_markers": True})
    image = pixels(2, 2)
    tiles = [image[:, r : r + SIDE, c : c + SIDE] for r in (0, SIDE) for c in (0, SIDE)]
    if overview:
        small = torch.nn.functional.interpolate(image[None], (SIDE, SIDE), mode="bicubic", antialias=True)[0]
        tiles = [small, *tiles]
    each = [model._to_prompts(model.encode(tile[None]))[0] for tile in tiles]
    marker = model.tiling.marker[None]
    expected = torch.cat([*each[:-4], *each[-4:-2], marker, *each[-2:], marker])
    found = model.soft_prompts({"image": image[None]})
    torch.testing.assert_close(found[0], expected)
    assert model.num_soft_prompts(image) == len(expected)
    one = pixels(1, 1)
    alone = torch.cat([model._to_prompts(model.encode(one[None]))[0], marker])
    torch.testing.assert_close(model.soft_prompts({"image": one[None]})[0], alone)


@torch.no_grad()
def test_one_connector_reads_the_tokens_of_all_tiles():
    model = build({"max": 4, "join": "before"}, {**CONNECTOR, "r_per_image": True})
    image = pixels(1, 2)
    views = model.tiling.cut(image)
    tokens = model.encode_frames(views, 1)
    expected = model._to_prompts(tokens.flatten(0, 1)[None])
    found = model.soft_prompts({"image": image[None]})
    assert torch.equal(found, expected) and len(views) == 3
    num_tokens = model.vision.num_tokens
    assert found.shape[1] == 3 * num_tokens - 2 * 3 * 12 == model.num_soft_prompts(image)


@torch.no_grad()
@pytest.mark.parametrize("join", ["after", "before"])
def test_a_batch_of_different_grids_is_its_images(join):
    model = build({"max": 4, "join": join})
    images = [pixels(1, 1), pixels(1, 3, 1), pixels(2, 1, 2)]
    captions = ["a red circle", "two blue stars", "a hill"]
    alone = [
        model.sample_losses({"image": image[None], "text_input": [text]})
        for image, text in zip(images, captions, strict=True)
    ]
    together = model.sample_losses({"image": images, "text_input": captions})
    torch.testing.assert_close(
        together["losses"], torch.cat([one["losses"] for one in alone]), rtol=1e-4, atol=1e-4
    )
    several = {"image": images, "text_input": [*captions, captions[0]], "num_texts": [1, 1, 2]}
    torch.testing.assert_close(model.sample_losses(several)["losses"][:3], together["losses"])
    options = {"num_beams": 2, "max_length": 5}
    texts = model.generate({"image": images}, **options)
    assert texts == [model.generate({"image": image[None]}, **options)[0] for image in images]
    assert len(model.rank_answers({"image": images, "text_input": ["what?"] * 3}, ["red", "blue"])) == 3
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    assert (
        len(model.answer_turns({"messages": [talk, talk], "images": [images[:1], images[1:2]]}, max_length=3))
        == 2
    )


def test_lengths_of_conversations_count_all_tiles():
    changes = {
        "vision": {"tiles": {"max": 4, "row_markers": True}},
        "connector": CONNECTOR,
        "checkpoint": None,
    }
    cfg = load_model_config("evlgen_opt", "shapes", changes)
    cls = registry.get_model_class("evlgen_opt")
    lengths = cls.text_lengths(build_dataclass(cls.CONFIG, OmegaConf.to_container(cfg), path="model"))
    model = build({"max": 4, "row_markers": True})
    for grid in ((1, 1), (2, 2), (3, 1)):
        shape = pixels(*grid).shape
        assert lengths._num_soft(shape) == model.num_soft_prompts(pixels(*grid)) > 0
    talk = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "yes"}]
    assert not model.not_learnable({"messages": [talk], "images": [[pixels(2, 2)]]})
    model.max_sequence_len = 60
    assert model.not_learnable(
        {"messages": [talk, talk], "images": [[pixels(2, 2)], [pixels(1, 1)]]}
    ).keys() == {0}


def test_images_of_any_size_are_read_by_hand():
    model = build({"max": 3})
    assert tuple(load_preprocess(model)[0]["eval"](Image.new("RGB", (300, 90))).shape) == (3, SIDE, 3 * SIDE)
    images = [Image.new("RGB", (200, 64), "red"), Image.new("RGB", (40, 40), "blue")]
    assert len(model.generate(images, num_beams=1, max_length=3)) == 2
    messages = [
        {"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "?"}]}
    ]
    assert isinstance(model.chat(messages, max_length=3), str)


def test_training_on_images_of_different_proportions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = []
    for number in range(12):
        size = (64 + 64 * (number % 3), 64 + 64 * (number % 2))
        Image.new("RGB", size, (20 * number, 0, 0)).save(f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"a red square {number}"})
    (tmp_path / "my.json").write_text(json.dumps(rows))
    connector = json.dumps({**CONNECTOR, "r": 20})
    options = ["model.arch=evlgen_opt", "model.model_type=shapes", "model.checkpoint=null"]
    options += [
        f"model.connector={connector}",
        "run.metrics=[bleu]",
        "run.output_dir=out",
        "run.num_workers=0",
    ]
    options += ["datasets.image_text.annotations={train: my.json, val: my.json}", "run.max_epoch=1"]
    options += ["run.batch_size_train=4", "run.tensorboard=false", "run.num_beams=1", "run.max_len=4"]
    options += ["model.vision.tiles={max: 4, row_markers: true}", "run.precision=fp32"]
    assert "val" in run(Config.load(None, [*options, "run.test_splits=[val]"]))
    before = build({"max": 4, "row_markers": True}).tiling.marker
    model = registry.get_model_class("evlgen_opt").from_pretrained("out/latest/checkpoints/latest")
    assert model.tiling.max == 4 and not torch.equal(model.tiling.marker, before)
    with pytest.raises(ConfigError, match="run.cache_vision .*images have different numbers of tiles"):
        Config.load(None, [*options, "run.cache_vision=true"])
    video = "datasets.image_text.vis_processor.train.name=alpro_video_train"
    with pytest.raises(ConfigError, match="vis_processor.train.name .*'alpro_video_train' gives no tiles"):
        run(Config.load(None, [*options, video]))


class FixedEncoder(TimmEncoder):
    """Reads images of 64 pixels only, whatever it is asked for."""

    def __init__(self, image_size: int = 224, **settings) -> None:
        super().__init__(image_size=SIDE, **settings)


def test_what_tiles_are_not_for_is_named(monkeypatch):
    model = build({"max": 2})
    with pytest.raises(
        DataError, match=r"has shape \[3, 64, 192\], and .* grids of at most 2 tiles of 64 x 64"
    ):
        model.soft_prompts({"image": pixels(1, 3)[None]})
    with pytest.raises(DataError, match=r"has shape \[3, 64, 100\]"):
        model.soft_prompts({"image": pixels(1, 3)[None, :, :, :100]})
    with pytest.raises(ConfigError, match="cuts images into tiles, and a video was given"):
        model.soft_prompts({"image": torch.zeros(1, 3, 2, SIDE, SIDE)})
    with pytest.raises(ConfigError, match="and this is a model of videos"):
        build({"max": 2}, arch="evlgen_video_opt")
    with pytest.raises(ConfigError, match="row_markers: rows have no end"):
        build({"row_markers": True, "join": "before"})
    monkeypatch.setattr("evlgen.models.vision.vision_encoder_class", lambda name: FixedEncoder)
    with pytest.raises(
        ConfigError, match="has fixed positions for images of 64 pixels, which cannot be resampled"
    ):
        build({"max": 2}, image_size=128, pretrained=False)
