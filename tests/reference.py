"""Slow, obvious versions of what the package computes fast: what the tests compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from evlgen.models.connectors import ConnectorInputs


def textbook_matching(metric: Tensor, r: int, class_token: bool = True):
    """Bipartite soft matching as the paper's pseudocode does it (Bolya et al., 2023, appendix D).

    Returns:
        a function that merges x [B, N, C] by ``scatter_reduce``, mode ``mean`` or ``sum``.
    """
    tokens = metric.shape[1]
    r = min(r, (tokens - int(class_token)) // 2)
    if r <= 0:
        return lambda x, mode="mean": x
    with torch.no_grad():
        metric = metric / metric.norm(dim=-1, keepdim=True)
        a, b = metric[..., ::2, :], metric[..., 1::2, :]
        scores = a @ b.transpose(-1, -2)
        if class_token:
            scores[..., 0, :] = -torch.inf
        best, partner = scores.max(dim=-1)
        order = best.argsort(dim=-1, descending=True)[..., None]
        kept = order[..., r:, :]
        merged = order[..., :r, :]
        partner = partner[..., None].gather(dim=-2, index=merged)
        kept = kept.sort(dim=-2)[0]

    def merge(x: Tensor, mode: str = "mean") -> Tensor:
        a, b = x[..., ::2, :], x[..., 1::2, :]
        batch, num_a, channels = a.shape
        stay = a.gather(dim=-2, index=kept.expand(batch, num_a - r, channels))
        move = a.gather(dim=-2, index=merged.expand(batch, r, channels))
        b = b.scatter_reduce(-2, partner.expand(batch, r, channels), move, reduce=mode)
        return torch.cat([stay, b], dim=1)

    return merge


def plain_matching(metric: Tensor, r: int, class_token: bool = True) -> list[list[list[int]]]:
    """The same in plain Python loops: for each image, the input tokens of each output token, in output
    order."""
    out = []
    for image in metric.double():
        image = image / image.norm(dim=-1, keepdim=True)
        tokens = len(image)
        limit = max(0, min(r, (tokens - int(class_token)) // 2))
        pairs = []
        for i in range(0, tokens, 2):
            if tokens < 2 or (class_token and i == 0):
                continue
            similarity = [(image[i] @ image[j]).item() for j in range(1, tokens, 2)]
            best = max(range(len(similarity)), key=similarity.__getitem__)
            pairs.append((similarity[best], i, 2 * best + 1))
        pairs.sort(reverse=True)
        merged = {i: j for _, i, j in pairs[:limit]}
        groups = [[i] for i in range(0, tokens, 2) if i not in merged]
        if limit == 0:
            groups = [[i] for i in range(tokens)]
        else:
            groups += [[j, *(i for i, to in merged.items() if to == j)] for j in range(1, tokens, 2)]
        out.append(groups)
    return out


def new_connector(kind, vision_dim: int, language_dim: int, **given):
    """A connector of this class; ``given``: its settings, and further fields of `ConnectorInputs`."""
    fields = ("num_tokens", "num_prefix_tokens", "embedding_rms")
    inputs = {name: given.pop(name) for name in fields if name in given}
    return kind(ConnectorInputs(vision_dim, language_dim, **inputs), **given)
