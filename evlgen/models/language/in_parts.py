"""The loss of a batch behind a frozen language model, a part of the batch at a time.

What a language model's layers keep for the backward pass is the larger half of what a training step keeps.
Of a frozen one only the gradient of the soft prompts is wanted, and that of adapters if there are any, and
they are known as soon as the loss is. So each part of a batch goes forward and backward before the next one
begins, and the activations of one part are there at a time. The operations are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evlgen.models.language.segments import Row, has_learned, num_positions, num_visuals


class BatchPart(NamedTuple):
    """Neighbours in a batch.

    Attributes:
        samples, images: which they are.
        prompts: where the soft prompts of these images are among all of the batch, one image behind another.
        num_texts: of each of these images; None: each sample has its own images.
    """

    samples: slice
    images: slice
    prompts: slice
    num_texts: list[int] | None


def parts_of(
    samples: Sequence[Row], num_soft: Sequence[int], num_texts: Sequence[int] | None, positions: int
) -> list[BatchPart]:
    """A batch in parts of about equal length, without those that have nothing to learn.

    Args:
        samples: N of them.
        num_soft: soft prompts of each image of all samples, in their order.
        num_texts: how many samples in a row are about the same image; None: each has its own images.
        positions: of a part, about.
    """
    images_of = [1] * len(num_texts) if num_texts else [num_visuals(row) for row in samples]
    samples_of = num_texts or [1] * len(samples)
    # of what stays together, where each begins: in the samples, the images, their soft prompts, and all that
    # is read
    sample, image = _starts(samples_of), _starts(images_of)
    prompts, tokens = _starts(num_soft), _starts(num_positions(row, []) for row in samples)
    prompt, words = [prompts[place] for place in image], [tokens[place] for place in sample]
    read = [sum(both) for both in zip(prompt, words, strict=True)]
    count = num_parts(read[-1], positions)
    shares = [read[-1] * number / count for number in range(count + 1)]
    bounds = [min(range(len(read)), key=lambda place: abs(read[place] - share)) for share in shares]
    parts = [
        BatchPart(
            slice(sample[first], sample[last]),
            slice(image[first], image[last]),
            slice(prompt[first], prompt[last]),
            None if num_texts is None else list(num_texts[first:last]),
        )
        for first, last in pairwise(bounds)
    ]
    return [part for part in parts if any(map(has_learned, samples[part.samples]))]


def num_parts(total: int, positions: int) -> int:
    """How many parts of about so many positions a batch of ``total`` positions has."""
    return max(1, round(total / positions))


def _starts(lengths: Iterable[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def total_loss(
    losses_of: Callable[[Tensor, BatchPart], Tensor],
    prompts: Tensor,
    parts: Sequence[BatchPart],
    trained: Sequence[Tensor],
) -> tuple[Tensor, int]:
    """The sum of the losses of all tokens of a batch.

    Args:
        losses_of: the losses [n] of a part's tokens, from the soft prompts [p, C] of its images.
        prompts: [P, C], those of all images.
        trained: weights that the losses' gradient goes to besides.

    Returns:
        a scalar, float32, and of how many tokens it is the sum.
    """
    return _TotalLoss.apply(losses_of, parts, prompts, *trained)


class _TotalLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        losses_of: Callable[[Tensor, BatchPart], Tensor],
        parts: Sequence[BatchPart],
        prompts: Tensor,
        *trained: Tensor,
    ) -> tuple[Tensor, int]:
        # in float32 at least: a loss is scaled in the backward pass, and float16 lacks room for that
        wide = prompts.detach().to(torch.promote_types(prompts.dtype, torch.float32))
        of_prompts = torch.zeros_like(wide)
        of_trained: list[Tensor | None] = [None] * len(trained)
        sums, count = [], 0
        for part in parts:
            own = wide[part.prompts].detach().requires_grad_()
            with torch.enable_grad():
                losses = losses_of(own, part)
                total = losses.sum()
            gradient, *others = torch.autograd.grad(total, [own, *trained], allow_unused=True)
            if gradient is not None:
                of_prompts[part.prompts] = gradient
            of_trained = [_sum(*both) for both in zip(of_trained, others, strict=True)]
            sums.append(total.detach())
            count += len(losses)
            del losses, total  # with all that they keep
        ctx.save_for_backward(of_prompts, *of_trained)
        ctx.dtype = prompts.dtype
        return torch.stack(sums).sum(), count

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        factor = grads[0]
        prompts, *trained = ctx.saved_tensors
        scaled = [None if gradient is None else gradient * factor.to(gradient.dtype) for gradient in trained]
        return None, None, (prompts * factor).to(ctx.dtype), *scaled


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two gradients, of which a weight that was not used has none."""
    return other if one is None else one if other is None else one + other
