"""The optimizer: AdamW, no weight decay on biases and norms."""

from __future__ import annotations

import torch
from torch import nn


def build_optimizer(
    model: nn.Module, lr: float, weight_decay: float, beta2: float = 0.999
) -> torch.optim.AdamW:
    """AdamW over what is trained; vectors and scalars (biases, norms) do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, beta2), fused=True)
