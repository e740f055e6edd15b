"""Token merging equals the published numbers and the slow versions, and keeps its promises at the edges."""

from __future__ import annotations

import pytest
import torch
from reference import plain_matching, textbook_matching
from safetensors.torch import load_file

from evlgen.models import token_merging
from evlgen.models.token_merging import (
    compose_maps,
    match_tokens,
    merge_mean,
    merge_schedule,
    merge_sum,
    token_counts,
    unmerge,
)


@pytest.mark.parametrize("tokens", [8, 17, 50])
@pytest.mark.parametrize("r", [1, 4, 100])
def test_equals_the_published_numbers(golden, tokens, r):
    expected = {
        k.partition(".")[2]: v
        for k, v in load_file(golden / "token_merging.safetensors").items()
        if k.startswith(f"n{tokens}_r{r}.")
    }
    merge_map, num_out = match_tokens(expected["metric"], r)
    mean = merge_mean(expected["x"], merge_map, num_out)
    torch.testing.assert_close(mean, expected["merged_mean"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        merge_sum(expected["x"], merge_map, num_out), expected["merged_sum"], atol=1e-6, rtol=1e-6
    )
    torch.testing.assert_close(unmerge(mean, merge_map), expected["unmerged"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tokens", [1, 2, 3, 12, 13, 65])
@pytest.mark.parametrize("r", [0, 1, 5, 999])
@pytest.mark.parametrize("num_protected", [0, 1])
def test_every_group_is_the_plain_loops_group_in_its_place(tokens, r, num_protected):
    metric = torch.randn(3, tokens, 8, generator=torch.Generator().manual_seed(tokens * 7 + r))
    merge_map, num_out = match_tokens(metric, r, num_protected)
    for row, groups in zip(merge_map.tolist(), plain_matching(metric, r, bool(num_protected)), strict=True):
        assert num_out == len(groups)
        found = [sorted(i for i, to in enumerate(row) if to == out) for out in range(num_out)]
        assert found == [sorted(g) for g in groups]


@pytest.mark.parametrize("tokens", [2, 9, 16])
def test_merging_and_its_gradient_equal_the_textbook_form(tokens):
    generator = torch.Generator().manual_seed(tokens)
    metric = torch.randn(4, tokens, 6, generator=generator)
    x = torch.randn(4, tokens, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, tokens, 5, generator=generator, dtype=torch.float64)
    merge_map, num_out = match_tokens(metric, 3)
    for ours, mode in ((merge_mean, "mean"), (merge_sum, "sum")):
        expected = textbook_matching(metric, 3)(x, mode)
        (expected_grad,) = torch.autograd.grad((expected * weight[:, : expected.shape[1]]).sum(), x)
        got = ours(x, merge_map, num_out)
        (grad,) = torch.autograd.grad((got * weight[:, :num_out]).sum(), x)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(grad, expected_grad)


def test_the_gradient_is_the_finite_differences():
    metric = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    merge_map, num_out = match_tokens(metric, 3)
    assert torch.autograd.gradcheck(lambda t: merge_mean(t, merge_map, num_out), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_works_in_every_floating_type_and_keeps_it(dtype):
    x = torch.randn(2, 17, 8, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    merge_map, num_out = match_tokens(x, 4)
    out = merge_mean(x, merge_map, num_out)
    out.sum().backward()
    assert out.dtype == dtype and out.shape == (2, 13, 8)
    exact = merge_mean(x.detach().double(), merge_map, num_out)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(out.detach().double(), exact, atol=tolerance, rtol=tolerance)
    # each output token hands its gradient to its members in equal parts
    torch.testing.assert_close(
        x.grad.float(),
        (1 / token_counts(merge_map, num_out).gather(1, merge_map).float()).unsqueeze(-1).expand_as(x),
        atol=tolerance,
        rtol=tolerance,
    )


def test_matching_does_not_depend_on_autocast():
    metric = torch.randn(4, 65, 32, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = match_tokens(metric, 12)[0]
    assert torch.equal(under_autocast, match_tokens(metric, 12)[0])


def test_the_class_token_never_merges_even_when_it_is_the_most_similar():
    metric = torch.ones(1, 9, 4)
    metric[0, 2::2] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    merge_map, num_out = match_tokens(metric, 4)
    assert merge_map[0, 0] == 0
    assert token_counts(merge_map, num_out)[0, 0] == 1


def chosen(metric, merge_map, num_out) -> torch.Tensor:
    """The exact similarities of the pairs that a merge map merges, in order, [B, r]."""
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    kept = num_out - metric.shape[1] // 2  # output tokens that are one of A
    found = []
    for tokens, row in zip(unit, merge_map.tolist(), strict=True):
        pairs = [(a, 1 + 2 * (to - kept)) for a, to in enumerate(row) if a % 2 == 0 and to >= kept]
        found.append(sorted(float(tokens[a] @ tokens[b]) for a, b in pairs))
    return torch.tensor(found)


def best_possible(metric, r: int) -> torch.Tensor:
    """The exact similarities of the r best matches, in order, [B, r]; the class token has none."""
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    best = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).amax(-1)[:, 1:]
    return best.sort(descending=True).values[:, :r].flip(-1).float()


@pytest.mark.parametrize("tokens", [8, 17, 50])
def test_rounding_decides_nothing_but_which_of_equally_good_pairs_merge(tokens):
    """Rounding is here noise of its size: what merges is as alike, and the same where similarities differ."""
    generator = torch.Generator().manual_seed(tokens)
    colours = torch.randn(3, 8, generator=generator)
    tied = colours[torch.randint(3, (4, tokens), generator=generator)]  # many similarities of 1
    clear = torch.randn(4, tokens, 8, generator=generator)
    r = tokens // 4
    for metric in (tied, clear):
        first = match_tokens(metric, r)
        for _ in range(50):
            noise = 1e-7 * torch.randn(metric.shape, generator=generator)
            found = match_tokens(metric * (1 + noise), r)
            torch.testing.assert_close(chosen(metric, *found), best_possible(metric, r), atol=1e-6, rtol=0)
            assert metric is tied or torch.equal(found[0], first[0])


def test_of_equal_similarities_the_first_decides():
    merge_map, num_out = match_tokens(torch.ones(1, 9, 4), 2)  # every similarity is exactly 1
    # A is 0, 2, 4, 6, 8 and B is 1, 3, 5, 7: tokens 2 and 4 merge into 1; 0, 6 and 8 stay
    assert (num_out, merge_map.tolist()) == (7, [[0, 3, 3, 4, 3, 5, 1, 6, 2]])


def test_two_maps_in_a_row_are_one():
    x = torch.randn(2, 21, 6, generator=torch.Generator().manual_seed(3))
    first, middle = match_tokens(x, 5)
    merged = merge_sum(x, first, middle)
    second, last = match_tokens(merged, 4)
    once = merge_sum(x, compose_maps(first, second), last)
    torch.testing.assert_close(once, merge_sum(merged, second, last))


def test_schedules():
    assert merge_schedule(19, 3) == [19, 19, 19]
    assert merge_schedule([8, 4, 0], 3) == [8, 4, 0]
    assert merge_schedule([8, -1.0], 5) == [16, 12, 8, 4, 0]
    assert merge_schedule([8, 1.0], 5) == [0, 4, 8, 12, 16]
    assert sum(merge_schedule([8, 0], 12)) == 96
    # the paper's code: from int(r (1 - inflection)) in equal steps to 2 r minus that, each rounded down
    assert merge_schedule([8, 0.3], 12) == [5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 11]


@pytest.mark.parametrize(
    ("r", "named"), [(-1, "negative"), ([1, 2, 3, 4], "4 entries"), ([8, 3.0], "between -1 and 1")]
)
def test_impossible_schedules_are_named(r, named):
    with pytest.raises(ValueError, match=named):
        merge_schedule(r, 3)


def test_torch_compile_gives_the_same():
    def step(x):
        merge_map, num_out = match_tokens(x, 4)
        return merge_mean(x, merge_map, num_out).square()

    x = torch.randn(2, 17, 8, generator=torch.Generator().manual_seed(4))
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), step(x))


def test_matching_in_parts_finds_the_same(monkeypatch):
    metric = torch.randn(3, 65, 8, generator=torch.Generator().manual_seed(0))
    whole, num_out = match_tokens(metric, 20)
    for most in (1, 500, 3 * 32 * 33 - 1):  # a row at a time; some; all but one product
        monkeypatch.setattr(token_merging, "_MOST_SCORES", most)
        parts, num_parts = match_tokens(metric, 20)
        assert num_parts == num_out and torch.equal(parts, whole)
