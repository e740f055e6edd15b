"""The loss of tokens from hidden states, without the table of all their logits.

With 50,000 words in the vocabulary the logits of a batch, their softmax and its gradient are the largest
tensors of a training step. Behind a frozen output layer only the gradient of the hidden states is needed, and
it is known as soon as a row's logits are: chunks of rows are turned into losses and gradients one after the
other, and nothing of the vocabulary's size is kept. Wijmans et al., *Cut Your Losses in Large-Vocabulary
Language Models*, ICLR 2025, and Liger Kernel (Hsu et al., 2024) do the same in kernels of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evlgen.models.ops import linear

#: Logits at once: 32 MB in float32, which processors' caches still help with; a GPU is busy with it.
_LOGITS_AT_ONCE = 2**23


def token_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """``cross_entropy(linear(hidden, weight, bias).float(), targets, reduction="none")``.

    Args:
        hidden: [n, C].
        weight: [V, C] of the output layer, frozen; ``bias``: [V].
        targets: [n], the tokens.

    Returns:
        [n], float32. Its gradient goes to ``hidden`` alone.
    """
    return _TokenLosses.apply(hidden, weight, bias, targets)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        rows = max(1, _LOGITS_AT_ONCE // len(weight))
        learns = ctx.needs_input_grad[0]
        losses = torch.empty(len(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden) if learns else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = linear(hidden[part], weight, bias).float()  # [rows, V]
            wanted = targets[part, None]
            # the loss by the same operations as cross_entropy's; logits become probabilities in their place
            largest = logits.amax(1, keepdim=True)
            chosen = logits.gather(1, wanted) - largest
            logits.sub_(largest).exp_()
            total = logits.sum(1, keepdim=True)
            losses[part] = (total.log() - chosen)[:, 0]
            if gradient is not None:
                logits.div_(total)
                logits.scatter_add_(1, wanted, -torch.ones_like(chosen))
                gradient[part] = logits.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0][:, None].to(gradient.dtype), None, None, None
