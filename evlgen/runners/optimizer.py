"""The optimizer: AdamW, no weight decay on biases and norms."""

from __future__ import annotations

import torch
from torch import nn

from evlgen.runners.spread import by_kind


def build_optimizer(
    model: nn.Module, lr: float, weight_decay: float, beta2: float = 0.999
) -> torch.optim.AdamW:
    """AdamW over what is trained; vectors and scalars (biases, norms) do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": params, "weight_decay": decay}
        for kind in by_kind(trained)
        for decay, params in (
            (weight_decay, [p for p in kind if p.ndim >= 2]),
            (0.0, [p for p in kind if p.ndim < 2]),
        )
        if params
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True)
