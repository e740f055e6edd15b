"""The average of the weights over the steps, which is evaluated and saved in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evlgen.common.errors import CheckpointError
from evlgen.models.base_model import BaseModel
from evlgen.runners.dtensor import by_kind, part_of

if TYPE_CHECKING:
    from evlgen.runners.listener import TrainingRun


class WeightAverage:
    """The exponential moving average of all numbers that a checkpoint holds: trained weights and running
    statistics.

    After each step it goes 1 - ``decay`` of the way to the weights. After the first n steps ``decay`` is at
    most (1 + n) / (10 + n), or the average would stay near where the weights began.

    Sources: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM Journal on
    Control and Optimization 30(4), 1992; the bound is that of TensorFlow's ``ExponentialMovingAverage``.

    Args:
        model: what is trained; the average begins with its weights.
        decay: from 0, the weights themselves, to below 1.

    Attributes:
        means: the average, by weight. After `exchange`, the weights as they are trained.
    """

    def __init__(self, model: BaseModel, decay: float) -> None:
        self.decay = decay
        self._weights = _numbers(model)  # views: what is written into them the model has
        self.means = {name: weight.clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """To be called after optimizer step ``step``, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        kinds = (by_kind([*tensors.values()]) for tensors in (self.means, self._weights))
        for means, weights in zip(*kinds, strict=True):
            torch._foreach_lerp_(means, weights, 1 - decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """The average goes into the model, and the model's weights here; the second time back."""
        for name, weight in self._weights.items():
            trained = weight.clone()
            weight.copy_(self.means[name])
            self.means[name].copy_(trained)

    def trained(self) -> dict[str, Tensor]:
        """The weights as they are trained, of which `means` are the average."""
        return {**self._weights}

    @torch.no_grad()
    def begin(self) -> None:
        """The average is now what the model's weights are."""
        for name, weight in self._weights.items():
            self.means[name].copy_(weight)


@contextlib.contextmanager
def averaged(runner: TrainingRun) -> Iterator[None]:
    """Inside the block the model computes with the average, where there is one: it is what is saved of it."""
    if runner.average is None:
        yield
        return
    runner.checkpointer.wait_for_copy()
    runner.average.exchange()
    try:
        yield
    finally:
        runner.average.exchange()


@torch.no_grad()
def load_trained(model: BaseModel, tensors: Mapping[str, Tensor]) -> None:
    """Gives the model the weights of `WeightAverage.trained`.

    Raises:
        CheckpointError: they are of another model.
    """
    weights = _numbers(model)
    for name, value in tensors.items():
        weight = weights.get(name)
        if weight is None or weight.shape != value.shape:
            raise CheckpointError(
                f"its trained weights are of another model: {name} has no place in this one"
            )
        weight.copy_(part_of(value, weight))


def _numbers(model: BaseModel) -> dict[str, Tensor]:
    return {name: value for name, value in model.trained_state_dict().items() if value.is_floating_point()}
