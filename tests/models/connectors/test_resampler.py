"""The perceiver resampler: its numbers, and what it does and does not see."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from reference import new_connector

from evlgen.common.errors import ConfigError
from evlgen.models.connectors import Resampler

SMALL = {"num_latents": 3, "num_layers": 2, "num_attention_heads": 2, "hidden_size": 16}


def small(**changes) -> Resampler:
    torch.manual_seed(0)
    connector = new_connector(Resampler, 12, 20, **{"num_tokens": 10, **SMALL, **changes}).double()
    for name, weight in connector.named_parameters():
        if "norm" in name:  # away from 1 and 0, so that a norm left out shows
            torch.nn.init.normal_(weight, mean=1.0)
    return connector


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def slow_layer(layer, latents: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Flamingo's layer (appendix A.1.1) on one image, a latent and a head at a time."""
    queries = layer.latents_norm(latents)
    read = torch.cat([layer.tokens_norm(x), queries])
    width = latents.shape[1]
    size = width // layer.num_heads
    keys, values = (read @ layer.key_value.weight.T).split(width, dim=1)
    rows = []
    for query in queries @ layer.query.weight.T:
        heads = []
        for start in range(0, width, size):
            part = slice(start, start + size)
            weights = [math.exp(query[part] @ key[part] / math.sqrt(size)) for key in keys]
            parts = zip(weights, values, strict=True)
            heads.append(sum(w * value[part] for w, value in parts) / sum(weights))
        rows.append(torch.cat(heads))
    latents = latents + torch.stack(rows) @ layer.attention_out.weight.T
    hidden = F.gelu(layer.ff_norm(latents) @ layer.up.weight.T)
    return latents + hidden @ layer.down.weight.T


def test_equals_the_paper_step_by_step():
    connector, x = small(), tokens(2, 10, 12)
    with torch.no_grad():
        for got, image in zip(connector(x), connector.proj_in(x), strict=True):
            latents = connector.latents
            for layer in connector.layers:
                latents = slow_layer(layer, latents, image)
            torch.testing.assert_close(got, connector.proj_out(connector.out_norm(latents)))


@pytest.mark.parametrize("count", [1, 10, 33])
def test_soft_prompts_are_the_latents_whatever_the_tokens(count):
    connector = small()
    assert connector(tokens(2, count, 12)).shape == (2, 3, 20)
    assert connector.num_soft_prompts(count) == 3


def test_the_order_of_tokens_is_not_seen():
    connector, x = small(), tokens(2, 10, 12)
    torch.testing.assert_close(connector(x.flip(1)), connector(x))


@pytest.mark.parametrize("frames", [2, 4, 7])
def test_the_order_of_frames_is_seen_where_they_have_embeddings(frames):
    x = tokens(1, frames * 10, 12)
    swapped = x.unflatten(1, (frames, 10)).flip(1).flatten(1, 2)
    torch.testing.assert_close(small()(swapped), small()(x))
    connector = small(num_frames=4)
    assert (connector(swapped) - connector(x)).abs().max() > 1e-4


def test_each_frame_has_its_embedding_and_more_frames_stretch_them():
    connector = small(num_frames=4)
    table = connector.frame_embeddings
    x = torch.zeros(1, 20, 16, dtype=torch.float64)
    assert torch.equal(connector._with_frames(x)[0], table[:2].repeat_interleave(10, 0))
    seven = connector._with_frames(torch.zeros(1, 70, 16, dtype=torch.float64))[0, ::10]
    torch.testing.assert_close(seven[::2], table)
    torch.testing.assert_close(seven[1], (table[0] + table[1]) / 2)


def test_sizes_follow_the_vision_encoder_and_four_times_that_by_default():
    connector = new_connector(Resampler, 24, 20)
    assert connector.latents.shape == (32, 24)
    assert len(connector.layers) == 6
    assert connector.layers[0].up.weight.shape == (96, 24)


def test_soft_prompts_start_at_the_scale_of_the_word_embeddings():
    torch.manual_seed(0)
    connector = new_connector(Resampler, 64, 256, embedding_rms=0.03, num_layers=2)
    rms = connector(torch.randn(4, 17, 64)).square().mean().sqrt().item()
    assert rms == pytest.approx(0.03, rel=0.15)


def test_every_weight_gets_a_gradient():
    connector = small(num_frames=2)
    connector(tokens(2, 20, 12)).square().sum().backward()
    assert not [name for name, p in connector.named_parameters() if not p.grad.any()]


def test_torch_compile_gives_the_same():
    connector, x = small(), tokens(2, 10, 12)
    torch._dynamo.reset()
    compiled = torch.compile(connector, backend="aot_eager")
    torch.testing.assert_close(compiled(x), connector(x))


def test_impossible_and_absurd_sizes_are_named():
    with pytest.raises(ConfigError, match="model.connector.hidden_size 16 is no multiple of num_attention"):
        small(num_attention_heads=3)
    with pytest.raises(ConfigError, match="model.connector: as configured it has .* weights"):
        small(num_latents=10**12)
