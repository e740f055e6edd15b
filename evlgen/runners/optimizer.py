"""The optimizer: AdamW, no weight decay on biases and norms, a learning rate for each part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from evlgen.common.errors import ConfigError, did_you_mean
from evlgen.models.base_model import BaseModel
from evlgen.runners.dtensor import by_kind, multiply, total_norm

if TYPE_CHECKING:
    from evlgen.runners.listener import TrainingRun


def build_optimizer(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    beta2: float = 0.999,
    lr_scale: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:
    """AdamW over what is trained; vectors and scalars (biases, norms) do not decay.

    Args:
        lr_scale: factors on the learning rate by the start of weights' names, ``{"language": 0.1}``; the
            longest that fits counts, else the model's own (`BaseModel.lr_scales`), else 1. Each group of the
            optimizer has its factor as ``lr_scale``.

    Raises:
        ConfigError: no trained weight has such a name.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    factors = {**(model.lr_scales() if isinstance(model, BaseModel) else {}), **(lr_scale or {})}
    for prefix in lr_scale or {}:
        if not any(_starts(name, prefix) for name, _ in named):
            parts = sorted({".".join(name.split(".")[:depth]) for name, _ in named for depth in (1, 2)})
            raise ConfigError(
                f"run.lr_scale.{prefix}: no trained weight's name starts with it."
                f"{did_you_mean(prefix, parts)} Trained parts: {', '.join(p for p in parts if '.' not in p)}."
            )
    by_factor: dict[float, list[nn.Parameter]] = {}
    for name, p in named:
        fitting = [prefix for prefix in factors if _starts(name, prefix)]
        by_factor.setdefault(factors[max(fitting, key=len)] if fitting else 1.0, []).append(p)
    groups = [
        {"params": params, "weight_decay": decay, "lr_scale": factor}
        for factor, trained in by_factor.items()
        for kind in by_kind(trained)
        for decay, params in (
            (weight_decay, [p for p in kind if p.ndim >= 2]),
            (0.0, [p for p in kind if p.ndim < 2]),
        )
        if params
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of the next step, of each group times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def update_weights(runner: TrainingRun, scale: float, loss: float) -> float:
    """Scales and clips the gradient and moves the weights, unless a number is not finite.

    Args:
        scale: of the gradient.
        loss: of the step.

    Returns:
        the gradient's norm before clipping.
    """
    accelerator, max_norm = runner.accelerator, runner.run.max_grad_norm
    accelerator.unscale_gradients()
    gradients = [p.grad for p in runner.trained if p.grad is not None]
    norm = scale * total_norm(gradients)
    factor = scale
    if max_norm and norm > max_norm:
        factor *= max_norm / (norm + 1e-6)
    if factor != 1.0:
        multiply(gradients, factor)
    runner.notify("before_update")
    # fp16's scaler leaves such a step out itself, and learns from it
    if (math.isfinite(norm) and math.isfinite(loss)) or accelerator.scaler is not None:
        runner.optimizer.step()
        if runner.average is not None:
            runner.average.update(runner.state.iteration // runner.run.accum_grad_iters)
    return norm


def _starts(name: str, prefix: str) -> bool:
    return f"{name}.".startswith(f"{prefix}.")
