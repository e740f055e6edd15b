"""A step of several batches that is left in the middle: all that its batches changed goes back, as they will
come again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from evlgen.runners.skipped import SkippedSamples
from evlgen.runners.training_state import TrainingState, random_state, set_random_state


def training_buffers(model: nn.Module) -> list[Tensor]:
    """What batches change of a model besides its gradients: buffers of its modules in training, such as
    running statistics."""
    training = [module for module in model.modules() if module.training]
    return [buffer for module in training for buffer in module.buffers(recurse=False)]


def way_back(state: TrainingState, skipped: SkippedSamples, buffers: Sequence[Tensor]) -> Callable[[], None]:
    """What puts the counters, the samples that were skipped, the random generators and the buffers back to
    where they are now."""
    iteration, skipped_so_far, drawn = state.iteration, skipped.to_json(), random_state()
    kept = [buffer.clone() for buffer in buffers]

    def restore() -> None:
        state.iteration = iteration
        skipped.restore(skipped_so_far)
        set_random_state(*drawn)
        for buffer, value in zip(buffers, kept, strict=True):
            buffer.copy_(value)

    return restore
