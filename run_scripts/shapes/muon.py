"""Muon: momentum whose matrices are made orthogonal before they are applied.

Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024
(kellerjordan.github.io/posts/muon); the Newton-Schulz coefficients are from there. It is why the language
model fits the budget: after 400 steps it is where AdamW is not after 800. PyTorch's own computes in bfloat16,
    which CPUs without it do slowly; this one in float32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """For the weight matrices of hidden layers only; embeddings, biases and norms belong to AdamW."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, weight_decay: float = 0.05, momentum: float = 0.95
    ):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in same_shape.values():
                self._step_together(parameters, group)

    def _step_together(self, parameters: list[Tensor], group: dict) -> None:
        """All matrices of one shape in one batch of products."""
        updates = orthogonal(torch.stack([self._nesterov(p, group["momentum"]) for p in parameters]))
        rows, columns = parameters[0].shape
        rate = group["lr"] * max(1.0, rows / columns) ** 0.5
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        average = state.setdefault("average", torch.zeros_like(parameter))
        average.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """[K, rows, columns] -> about the nearest (semi-)orthogonal matrices: singular values of roughly 0.7 to
    1.2."""
    upright = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if upright else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if upright else x
