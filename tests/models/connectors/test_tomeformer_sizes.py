"""Merging weighted by size and proportional attention equal the slow forms; the default pays for neither."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import new_connector, plain_matching
from torch import Tensor

from evlgen.common.errors import ConfigError
from evlgen.config.config import load_model_config
from evlgen.models.connectors import TomeFormer, tomeformer
from evlgen.models.token_merging import (
    compose_maps,
    match_tokens,
    merge_mean,
    merge_sum,
    merge_weighted_mean,
    token_counts,
    token_sizes,
)

SMALL = {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
OPTIONS = [
    {"merge": merge, "proportional_attention": proportional}
    for merge in ("mean", "size_weighted")
    for proportional in (False, True)
]


def small(**changes) -> TomeFormer:
    torch.manual_seed(0)
    connector = new_connector(TomeFormer, vision_dim=24, language_dim=40, **{"r": 5, **SMALL, **changes})
    for layer in connector.layers:  # far from uniform attention, so that its weights matter
        torch.nn.init.normal_(layer.qkv.weight, std=0.4)
        torch.nn.init.normal_(layer.attention_out.weight, std=0.4)
    return connector.eval()


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def slow_soft_prompts(connector: TomeFormer, visual: Tensor, merge: str, proportional: bool) -> Tensor:
    """One image [N, C]: a token that stands for n is n equal keys, and weighs n in a mean."""
    x = connector._embed(visual[None])[0]
    counts = [1] * len(x)
    for layer, r in zip(connector.layers, connector.r, strict=True):
        q, k, v = layer.qkv(x).chunk(3, dim=-1)
        copies = torch.tensor(counts if proportional else [1] * len(x))
        heads = []
        for part in torch.arange(q.shape[1]).chunk(layer.num_heads):
            keys, values = (y[:, part].repeat_interleave(copies, 0) for y in (k, v))
            weights = (q[:, part] @ keys.T / len(part) ** 0.5).softmax(-1)
            heads.append(weights @ values)
        x = layer.attention_norm(x + layer.attention_out(torch.cat(heads, -1)))
        metric = k.unflatten(-1, (layer.num_heads, -1)).mean(1)
        groups = plain_matching(metric.detach()[None], r, bool(connector.num_protected))[0]
        merged = []
        for group in groups:
            weights = [counts[i] if merge == "size_weighted" else 1 for i in group]
            merged.append(sum(w * x[i] for w, i in zip(weights, group, strict=True)) / sum(weights))
        x = torch.stack(merged)
        counts = [sum(counts[i] for i in group) for group in groups]
        x = layer.out_norm(x + layer.down(F.gelu(layer.up(x))))
    return connector.proj_out(x)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("num_prefix", [0, 1])
def test_soft_prompts_and_gradients_equal_the_slow_form(options, num_prefix):
    connector = small(num_prefix_tokens=num_prefix, **options).double()
    x = tokens(2, 23, 24).requires_grad_()
    weight = tokens(2, connector.num_soft_prompts(23), 40)
    wanted = [*connector.parameters(), x]

    got = connector(x)
    expected = torch.stack([slow_soft_prompts(connector, image, **_named(options)) for image in x])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(connector.forward_details(x)["soft_prompts"], got)
    grads, slow_grads = (
        torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True) for out in (got, expected)
    )
    for grad, slow in zip(grads, slow_grads, strict=True):
        torch.testing.assert_close(grad, slow)


def _named(options: dict) -> dict:
    return {"merge": options["merge"], "proportional": options["proportional_attention"]}


def test_the_options_are_told_apart_only_after_a_merge():
    x = tokens(2, 23, 24).float()
    outputs = [small(**options)(x) for options in OPTIONS]
    for i, one in enumerate(outputs):
        assert all((one - other).abs().max() > 1e-3 for other in outputs[:i])
    plain = small(r=0)(x)
    assert all(torch.equal(small(r=0, **options)(x), plain) for options in OPTIONS)


def test_details_say_how_many_tokens_each_soft_prompt_stands_for():
    details = small(merge="size_weighted", proportional_attention=True).forward_details(
        tokens(2, 23, 24).float()
    )
    assert details["token_counts"].shape == (2, 8)
    assert torch.equal(details["token_counts"], token_counts(details["merge_map"], 8))
    assert details["token_counts"].sum(1).tolist() == [23, 23]


def test_the_default_counts_nothing(monkeypatch):
    def refuse(*_):
        raise AssertionError("not on the default's way")

    for name in ("token_sizes", "merge_weighted_mean", "proportional_attention"):
        monkeypatch.setattr(tomeformer, name, refuse)
    small()(tokens(1, 23, 24).float())
    with pytest.raises(AssertionError):
        small(merge="size_weighted")(tokens(1, 23, 24).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_trains_with_dropout_in_every_type(dtype):
    connector = small(merge="size_weighted", proportional_attention=True).to(dtype).train()
    out = connector(tokens(2, 23, 24).to(dtype))
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in connector.parameters())


def test_torch_compile_gives_the_same():
    connector, x = small(merge="size_weighted", proportional_attention=True), tokens(2, 23, 24).float()
    torch._dynamo.reset()
    compiled = torch.compile(connector, backend="aot_eager")
    torch.testing.assert_close(compiled(x), connector(x))


def test_weighted_means_in_a_row_are_the_mean_over_all_that_merged():
    x = tokens(3, 33, 6)
    merged, sizes, merge_map = x, None, torch.arange(33).expand(3, -1)
    for _ in range(3):
        layer_map, num_out = match_tokens(merged, 8)
        merged = merge_weighted_mean(merged, sizes, layer_map, num_out)
        sizes = token_sizes(sizes, layer_map, num_out)
        merge_map = compose_maps(merge_map, layer_map)
    assert torch.equal(sizes, token_counts(merge_map, num_out))
    torch.testing.assert_close(merged, merge_mean(x, merge_map, num_out))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weighted_means_are_sums_over_sizes_and_lone_tokens_stay_what_they_were(dtype):
    x = tokens(2, 17, 5).to(dtype)
    sizes = torch.randint(1, 300, (2, 17), generator=torch.Generator().manual_seed(2))
    merge_map, num_out = match_tokens(x, 4)
    got = merge_weighted_mean(x, sizes, merge_map, num_out)
    exact = merge_sum(x.double() * sizes.unsqueeze(-1), merge_map, num_out)
    exact = exact / token_sizes(sizes, merge_map, num_out).unsqueeze(-1)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-2
    torch.testing.assert_close(got.double(), exact, atol=tolerance, rtol=tolerance)
    for b in range(2):
        for position, to in enumerate(merge_map[b].tolist()):
            if token_counts(merge_map, num_out)[b, to] == 1:
                assert torch.equal(got[b, to], x[b, position])


def test_the_gradient_of_the_weighted_mean_is_the_finite_differences():
    x = tokens(2, 9, 3).requires_grad_()
    sizes = torch.randint(1, 9, (2, 9), generator=torch.Generator().manual_seed(3))
    merge_map, num_out = match_tokens(x, 3)
    assert torch.autograd.gradcheck(lambda t: merge_weighted_mean(t, sizes, merge_map, num_out), x)


def test_another_way_to_merge_is_named():
    overrides = {"connector": {"name": "tomeformer", "merge": "size_weigthed"}}
    with pytest.raises(ConfigError, match="model.connector.merge.*Did you mean 'size_weighted'"):
        load_model_config("evlgen_opt", "shapes", overrides=overrides)
