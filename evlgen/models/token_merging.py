"""Token merging: balanced bipartite soft matching as pure functions on tensors.

Bolya et al., *Token Merging: Your ViT but Faster*, ICLR 2023 (arXiv 2210.09461), section 3. Tokens at even
positions (set A) are matched with tokens at odd positions (set B); the r best matches are merged.

What merges with what is one tensor, the *merge map* [B, N]: for each input token the position of the output
token it ended in. Merging is a sum or mean over the tokens with equal entries, un-merging a look-up, and two
merges in a row are
``second.gather(1, first)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evlgen.common.precision import without_autocast

_MOST_SCORES = 2**26  # similarities at once: 256 MiB; the published 64 images of 257 tokens have 2**20


def limit_r(num_tokens: int, r: int, num_protected: int = 1) -> int:
    """The number of pairs that can merge: ``r``, but at most half of the tokens that are not protected."""
    return max(0, min(int(r), (num_tokens - num_protected) // 2))


def merge_schedule(r: int | Sequence[float], num_layers: int) -> list[int]:
    """How many pairs each layer merges.

    Args:
        r: the same number for every layer; or one number per layer; or ``[r, inflection]`` as in the ToMe
            paper (appendix on schedules): r on average, rising over the layers for inflection > 0 (from 0 to
            2r at 1), falling for inflection < 0. A list of two numbers is a pair per layer only where there
            are two layers and both are whole numbers.
        num_layers: the number of layers.

    Raises:
        ValueError: a negative r, a list of another length, or an inflection outside -1..1.
    """
    if isinstance(r, int):
        rs = [r] * num_layers
    elif len(r) == num_layers and all(isinstance(x, int) for x in r):
        rs = [int(x) for x in r]
    elif len(r) == 2 and isinstance(r[0], int):
        mean, inflection = r
        if not -1 <= inflection <= 1:
            raise ValueError(f"the inflection of r={list(r)} must lie between -1 and 1")
        first = int(mean * (1 - inflection))
        step = 2 * (mean - first) / (num_layers - 1) if num_layers > 1 else 0.0
        rs = [int(first + step * i) for i in range(num_layers)]
    else:
        raise ValueError(
            f"r={list(r)} has {len(r)} entries for {num_layers} layers; give one number, one per layer, or "
            "[r, inflection]"
        )
    if min(rs, default=0) < 0:
        raise ValueError(f"r={r} must not be negative")
    return rs


@torch.no_grad()
def match_tokens(metric: Tensor, r: int, num_protected: int = 1) -> tuple[Tensor, int]:
    """Finds the r pairs of most similar tokens.

    The output order is: the tokens of A that stay, in their order, then the tokens of B, in theirs.

    Of equal similarities the first decides, by position. Similarities that differ by no more than float32's
    rounding (some 1e-7) are equal on paper only: which of such pairs merge may differ between processors,
    and every pair that merges is as good as the best up to that rounding. They are not rounded to a coarser
    grid, which would move the borders between them and change the published results.

    Args:
        metric: [B, N, d], any floating type; similarity is the cosine, computed in float32.
        r: pairs to merge; limited by `limit_r`.
        num_protected: 1 keeps the class token (position 0) from merging, 0 protects nothing.

    Returns:
        The merge map [B, N] (int64) and the number of output tokens, N - r.
    """
    batch, num_tokens, _ = metric.shape
    r = limit_r(num_tokens, r, num_protected)
    if r == 0:
        return torch.arange(num_tokens, device=metric.device).expand(batch, -1), num_tokens

    with without_autocast(metric.device):
        metric = torch.nn.functional.normalize(metric.float(), dim=-1)
        best_score, best_b = _best_matches(metric[:, ::2], metric[:, 1::2])  # [B, A]
    if num_protected:
        best_score[:, 0] = -torch.inf
    order = best_score.argsort(dim=-1, descending=True, stable=True)
    num_a = order.shape[1]
    num_kept = num_a - r

    kept = torch.ones_like(best_b).scatter_(1, order[:, :r], 0)  # [B, A], 0 where merged
    map_a = torch.where(kept.bool(), kept.cumsum(1) - 1, best_b + num_kept)
    map_b = torch.arange(num_kept, num_tokens - r, device=metric.device).expand(batch, -1)
    merge_map = torch.empty(batch, num_tokens, dtype=torch.long, device=metric.device)
    merge_map[:, ::2] = map_a
    merge_map[:, 1::2] = map_b
    return merge_map, num_tokens - r


def _best_matches(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The highest product of each row [B, A, d] with rows [B, B', d], and which that is: [B, A] both. All
    products at once grow with the square of the tokens; so many that they need memory are computed in parts.
    """
    per_row = a.shape[0] * b.shape[1]
    if per_row * a.shape[1] <= _MOST_SCORES:
        score, place = torch.bmm(a, b.transpose(1, 2)).max(dim=-1)
        return score, place
    parts = a.split(max(1, _MOST_SCORES // per_row), dim=1)
    found = [torch.bmm(part, b.transpose(1, 2)).max(dim=-1) for part in parts]
    return torch.cat([best.values for best in found], 1), torch.cat([best.indices for best in found], 1)


class _Merge(torch.autograd.Function):
    """Sums or means of rows that share an output row.

    Most groups have one member, so: copy one member of each group, then fix the few rows that have more.
    Adding every row to zeros and scaling all of them, with autograd's general backward, costs several times
    as much on a CPU.
    """

    @staticmethod
    def forward(ctx, x: Tensor, merge_map: Tensor, num_out: int, mean: bool) -> Tensor:
        batch, num_tokens, channels = x.shape
        image = torch.arange(batch, device=x.device).unsqueeze(1)
        position = torch.arange(num_tokens, device=x.device).expand(batch, -1)
        first = position.new_full((batch, num_out), num_tokens).scatter_reduce_(
            1, merge_map, position, "amin"
        )
        is_other = first.gather(1, merge_map) != position
        others = is_other.int().argsort(dim=1, descending=True, stable=True)[:, : num_tokens - num_out]

        rows = x.reshape(-1, channels)
        out = rows.index_select(0, (first + image * num_tokens).flatten())
        other_rows = (
            others + image * num_tokens
        ).flatten()  # the input rows that are not first of their group
        group = merge_map.gather(1, others)
        group_rows = (group + image * num_out).flatten()  # the output rows they go to
        out.index_add_(0, group_rows, rows.index_select(0, other_rows))
        share = None
        if mean:
            share = token_counts(merge_map, num_out).gather(1, group).to(x.dtype).reciprocal().view(-1, 1)
            out.index_copy_(0, group_rows, out.index_select(0, group_rows) * share)
        first_rows = (first.gather(1, group) + image * num_tokens).flatten() if mean else None
        index = (merge_map + image * num_out).flatten()
        ctx.save_for_backward(index, other_rows, first_rows, group_rows, share)
        return out.view(batch, num_out, channels)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        index, other_rows, first_rows, group_rows, share = ctx.saved_tensors
        batch, _, channels = grad.shape
        rows = grad.reshape(-1, channels)
        out = rows.index_select(0, index)
        if share is not None:
            scaled = rows.index_select(0, group_rows) * share
            out.index_copy_(0, other_rows, scaled).index_copy_(0, first_rows, scaled)
        return out.view(batch, -1, channels), None, None, None


def merge_sum(x: Tensor, merge_map: Tensor, num_out: int) -> Tensor:
    """Sums the tokens that share an output token: [B, N, C] -> [B, num_out, C]. Differentiable in x.

    Every output token must have at least one member, as in the maps of `match_tokens`.
    """
    return x if num_out == x.shape[1] else _Merge.apply(x, merge_map, num_out, False)


def merge_mean(x: Tensor, merge_map: Tensor, num_out: int) -> Tensor:
    """Means over the tokens that share an output token: [B, N, C] -> [B, num_out, C]. Differentiable in x.

    Every output token must have at least one member, as in the maps of `match_tokens`.
    """
    return x if num_out == x.shape[1] else _Merge.apply(x, merge_map, num_out, True)


def token_sizes(sizes: Tensor | None, merge_map: Tensor, num_out: int) -> Tensor:
    """How many of the first input's tokens each output token stands for, after one merge more.

    Args:
        sizes: the same of the tokens that merge, [B, N] (int64); None where nothing merged before: all 1.

    Returns:
        [B, num_out] (int64).
    """
    if sizes is None:
        return token_counts(merge_map, num_out)
    return sizes.new_zeros(sizes.shape[0], num_out).scatter_add_(1, merge_map, sizes)


def merge_weighted_mean(x: Tensor, sizes: Tensor | None, merge_map: Tensor, num_out: int) -> Tensor:
    """``sum(x * size) / sum(size)`` over the tokens that share an output token: [B, N, C] -> [B, num_out, C].

    The mean of the ToMe paper (section 3, "tracking token size"): over every token that merged, however many
    merges ago. Differentiable in x.

    Args:
        sizes: how many tokens each token stands for, [B, N] (`token_sizes`); None: all 1, `merge_mean`.
    """
    if sizes is None or num_out == x.shape[1]:
        return merge_mean(x, merge_map, num_out)
    # a token that nothing merged into has a share of exactly 1 and stays what it was
    exact = torch.promote_types(x.dtype, torch.float32)
    shares = sizes.to(exact) / token_sizes(sizes, merge_map, num_out).gather(1, merge_map)
    return merge_sum(x * shares.unsqueeze(-1).to(x.dtype), merge_map, num_out)


def token_counts(merge_map: Tensor, num_out: int) -> Tensor:
    """How many input tokens each output token stands for: [B, num_out] (int64)."""
    counts = torch.zeros(merge_map.shape[0], num_out, dtype=torch.long, device=merge_map.device)
    return counts.scatter_add_(1, merge_map, torch.ones_like(merge_map))


def unmerge(x: Tensor, merge_map: Tensor) -> Tensor:
    """Gives every input position its output token's value: [B, num_out, C] -> [B, N, C]."""
    return x.gather(1, merge_map.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def compose_maps(first: Tensor, second: Tensor) -> Tensor:
    """The merge map of two merges in a row: [B, N] into [B, M] -> [B, N]."""
    return second.gather(1, first)
