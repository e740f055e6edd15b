"""What merges into what, from a model: maps, counts, images as the model sees them, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.config.config import load_model_config
from evlgen.datasets.shapes.world import draw, scene
from evlgen.models.connectors.base import Connector
from evlgen.visualization.merging import find_merging, layer_numbers

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


def image(index: int = 3) -> Image.Image:
    return Image.fromarray(draw(scene("test", index)))


def build(connector: dict | None = None, **vision):
    """The bundled model with another encoder, with random weights, or another connector."""
    cfg = load_model_config("evlgen_opt", "shapes")
    kwargs = {**SMALL, **vision.pop("kwargs", {})}
    cfg.checkpoint = None
    cfg.vision = {**cfg.vision, "pretrained": False, "kwargs": kwargs, **vision}
    cfg.connector = connector or cfg.connector
    torch.manual_seed(0)
    return registry.get_model_class("evlgen_opt").from_config(cfg)


@pytest.fixture(scope="module")
def bundled():
    return registry.get_model_class("evlgen_opt").from_pretrained("shapes")


def plain_groups(layer_maps: list[list[int]]) -> list[list[int]]:
    """After each layer, the token each first token is in, followed one by one."""
    groups = [list(range(len(layer_maps[0])))]
    for layer_map in layer_maps:
        groups.append([layer_map[token] for token in groups[-1]])
    return groups


def seen_maps(model, call) -> list[list[int]]:
    """The map of each layer of the connector by itself, watched from outside."""
    maps = []
    hooks = [
        layer.register_forward_hook(lambda _m, _a, out: maps.append(out[1][0].tolist()))
        for layer in model.connector.layers
    ]
    call()
    for hook in hooks:
        hook.remove()
    return maps


def test_the_groups_of_a_layer_are_the_maps_of_all_layers_up_to_it(bundled):
    found = []
    maps = seen_maps(bundled, lambda: found.append(find_merging(bundled, [image()])))
    wanted = plain_groups(maps)
    stages = found[0].stages
    assert [stage.name for stage in stages] == ["tokens", "layer 1", "layer 2", "layer 3"]
    assert [stage.num_tokens for stage in stages] == [65, 49, 33, 17]
    for stage, groups in zip(stages, wanted, strict=True):
        assert stage.groups.shape == (1, 8, 8)
        assert [*stage.prefix[0], *stage.groups[0].flat] == groups


def test_as_many_regions_as_soft_prompts_with_the_class_token(bundled):
    for index in range(3):
        end = find_merging(bundled, [image(index)], "last").stages[-1]
        assert end.num_tokens == bundled.connector.num_soft_prompts(65)
        assert end.prefix.tolist() == [[0]] and 0 not in end.groups
        assert len(np.unique(end.groups)) == 16


def test_the_image_is_what_the_model_sees(bundled):
    photo = image().resize((100, 50))
    seen = find_merging(bundled, [photo]).images
    assert np.array_equal(seen[0], np.asarray(photo.resize((64, 64), Image.Resampling.BICUBIC)))


def test_layers_are_chosen_and_the_last_is_always_there(bundled):
    names = [stage.name for stage in find_merging(bundled, [image()], "2").stages]
    assert names == ["tokens", "layer 2", "layer 3"]
    assert layer_numbers("1,6,12", 12) == [1, 6, 12]
    assert layer_numbers([2], 12) == [2, 12]
    assert layer_numbers("last", 12) == [12]
    assert layer_numbers("1,", 12) == [1, 12]
    for wrong in ("0", "13", "two", "-1", [0]):
        with pytest.raises(ConfigError, match="no layer of this connector, which merges in 12"):
            layer_numbers(wrong, 12)


def test_an_encoder_without_a_class_token_is_all_patches():
    model = build(kwargs={"class_token": False, "global_pool": "avg"})
    end = find_merging(model, [image()]).stages[-1]
    assert end.prefix.shape == (1, 0) and end.groups.shape == (1, 8, 8)
    assert len(np.unique(end.groups)) == end.num_tokens == model.connector.num_soft_prompts(64)


def test_registers_stand_before_the_patches():
    model = build(kwargs={"reg_tokens": 3})
    found = find_merging(model, [image()])
    assert found.has_class_token and found.stages[-1].prefix.shape == (1, 4)
    everything = np.concatenate([found.stages[-1].prefix.ravel(), found.stages[-1].groups.ravel()])
    assert len(np.unique(everything)) == found.stages[-1].num_tokens
    alone = build(kwargs={"reg_tokens": 3, "class_token": False, "global_pool": "avg"})
    assert not find_merging(alone, [image()]).has_class_token


def test_merging_in_the_encoder_comes_first():
    model = build(tome_r=5)
    found = []
    maps = seen_maps(model, lambda: found.append(find_merging(model, [image()])))
    inner = model.vision.merging.merge_map[0].tolist()
    wanted = [inner, *([m[i] for i in inner] for m in plain_groups(maps)[1:])]
    assert [stage.name for stage in found[0].stages] == ["tokens", "encoder", "layer 1", "layer 2", "layer 3"]
    assert [stage.num_tokens for stage in found[0].stages][:2] == [65, 55]
    for stage, groups in zip(found[0].stages[1:], wanted, strict=True):
        assert [*stage.prefix[0], *stage.groups[0].flat] == groups


@pytest.mark.parametrize("form", ["average", "mean"])
def test_frames_that_are_averaged_have_the_same_regions(form):
    model = build(temporal={"form": form})
    found = find_merging(model, [image(1), image(2), image(3)])
    end = found.stages[-1]
    assert found.images.shape == (3, 64, 64, 3) and not found.spans_frames
    assert end.groups.shape == (3, 8, 8) and (end.groups == end.groups[0]).all()
    assert len(np.unique(end.groups)) == 16


def test_frames_in_a_row_have_their_own_regions():
    model = build(temporal={"form": "concat"})
    found = []
    frames = [image(1), image(2)]
    maps = seen_maps(model, lambda: found.append(find_merging(model, frames)))
    end, wanted = found[0].stages[-1], plain_groups(maps)[-1]
    assert found[0].spans_frames and end.num_tokens == model.connector.num_soft_prompts(130)
    for frame in range(2):
        assert [*end.prefix[frame], *end.groups[frame].flat] == wanted[65 * frame : 65 * (frame + 1)]


def test_a_video_for_a_model_of_images_is_refused(bundled):
    with pytest.raises(ConfigError, match=r"model of images, and 2 frames .* model.vision.temporal"):
        find_merging(bundled, [image(), image()])


class Mean(Connector):
    def forward(self, tokens):
        return tokens.mean(1, keepdim=True)


def test_a_connector_that_does_not_merge_is_named_with_those_that_do():
    model = build()
    model.connector = Mean()
    with pytest.raises(ConfigError, match=r"model.connector: Mean does not merge .*: .*tomeformer"):
        find_merging(model, [image()])


class Halves(Connector):
    """Merges, in one step, the tokens at even and those at odd positions."""

    def forward_details(self, tokens):
        return {"merge_map": torch.arange(tokens.shape[1]).remainder(2).unsqueeze(0)}


def test_a_connector_that_tells_only_the_end_is_drawn_at_the_end():
    model = build()
    model.connector = Halves()
    found = find_merging(model, [image()])
    assert [(stage.name, stage.num_tokens) for stage in found.stages] == [("tokens", 65), ("end", 2)]
    assert found.stages[1].groups[0, 0].tolist() == [1, 0] * 4 and found.stages[1].prefix.tolist() == [[0]]


def test_the_model_is_left_in_the_mode_it_was_in():
    model = build().train()
    model.connector.dropout.p = 0.5
    first, again = (find_merging(model, [image()]).stages[-1].groups for _ in range(2))
    assert model.training and np.array_equal(first, again)
