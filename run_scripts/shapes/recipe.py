"""What the training scripts share: the loop, the schedule, storage in half precision and the numbers
for the card."""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from muon import Muon
from safetensors.torch import save_file
from torch import Tensor, nn

logger = logging.getLogger("shapes")


def start(seed: int, threads: int | None) -> None:
    """Plain log lines, fixed seeds, and the number of CPU threads if one is asked for."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if threads:
        torch.set_num_threads(threads)


def adamw(parameters: Iterable[Tensor], lr: float, weight_decay: float = 0.05) -> torch.optim.Optimizer:
    """AdamW that leaves biases and norms undecayed."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.98))


def muon_and_adamw(model: nn.Module, lr: float, adamw_lr: float) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of the layers, AdamW on everything else."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "layer" in name]
    others = [p for name, p in named if not (p.ndim == 2 and "layer" in name)]
    return [Muon(matrices, lr), adamw(others, adamw_lr)]


def train(
    optimizers: list[torch.optim.Optimizer],
    loss_of: Callable[[int], Tensor],
    steps: int,
    warmup: int = 100,
    every: int = 100,
) -> float:
    """Warm-up, then a cosine down to zero; ``loss_of(step)`` gives the loss of a fresh batch.

    Returns:
        Minutes it took.
    """
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group, _ in groups for p in group["params"]]
    warmup = min(warmup, max(1, steps // 5))
    began, recent = time.time(), []
    for step in range(steps):
        share = (
            step / warmup
            if step < warmup
            else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        )
        for group, lr in groups:
            group["lr"] = lr * max(share, 1e-3)
        loss = loss_of(step)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        recent.append(loss.item())
        if (step + 1) % every == 0 or step + 1 == steps:
            rate = (step + 1) / (time.time() - began)
            logger.info(
                "step %d/%d loss %.4f, %.2f steps/s", step + 1, steps, sum(recent) / len(recent), rate
            )
            recent.clear()
    return (time.time() - began) / 60


def save_half(state: dict[str, Tensor], path: Path) -> None:
    """Writes a state dict as float16 safetensors; whoever loads it casts up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().half().contiguous() for name, tensor in state.items()}, path)
    path.chmod(0o644)


def report(path: Path, **numbers: object) -> None:
    """Keeps what a run reached beside its weights, for ``CARD.md``."""
    path.write_text(json.dumps(numbers, indent=2) + "\n")
    logger.info("%s", json.dumps(numbers))
