"""Contrast of images with texts, over the batch and over the batches of all processes.

Li et al., *BLIP-2*, 2023 (arXiv 2301.12597), section 3.2; the hard negatives are of Li et al., *Align before
Fuse*, 2021 (arXiv 2107.07651), section 3.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def similarities(image_features: Tensor, text_features: Tensor) -> Tensor:
    """The cosine of a text with the query of an image that is nearest to it.

    Args:
        image_features: [B, M, E], of length 1.
        text_features: [K, E], of length 1.

    Returns:
        [B, K].
    """
    return (image_features @ text_features.T).amax(1)


def positives(own: Tensor, everyone: Tensor, offset: int) -> Tensor:
    """Which of all pairs show the image of each of one's own.

    Args:
        own: [B], a key of each image.
        everyone: [K], those of all processes, one's own from ``offset`` on.

    Returns:
        [B, K], bool.
    """
    pair = torch.arange(len(own), device=own.device) + offset
    return (own[:, None] == everyone) | (pair[:, None] == torch.arange(len(everyone), device=own.device))


def contrastive_loss(similarity: Tensor, positive: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy [B, K] -> scalar; several positives of a row share its target."""
    target = positive / positive.sum(1, keepdim=True)
    return F.cross_entropy(similarity, target.to(similarity.dtype), label_smoothing=label_smoothing)


@torch.no_grad()
def hard_negatives(similarity: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """One wrong partner for each row, drawn by torch's global generator: the more similar, the likelier.

    Args:
        similarity: [B, K].
        positive: [B, K], true for right partners, which are never drawn.

    Returns:
        [B], column indices; [B], false for rows that have right partners only (their index means nothing).
    """
    found = ~positive.all(1)
    weights = similarity.float().masked_fill(positive, -torch.inf).softmax(1)
    weights = torch.where(found[:, None], weights, torch.ones_like(weights))
    return torch.multinomial(weights, 1).squeeze(1), found


def image_keys(ids: Sequence[object], device: torch.device) -> Tensor:
    """A number for each image's id, the same on every process, [B]."""
    digests = [hashlib.blake2b(str(i).encode(), digest_size=8).digest() for i in ids]
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], device=device)


class GlobalBatch:
    """The batches of all processes, one behind the other, of as many samples as each has.

    Args:
        batch: B, samples of this process's batch.
        device: where it is.
        alone: whether other processes are left out.

    Attributes:
        offset: where one's own samples begin among all.
        is_alone: whether there are no others.
    """

    def __init__(self, batch: int, device: torch.device, alone: bool = False) -> None:
        self.is_alone = alone or not (dist.is_available() and dist.is_initialized())
        self.is_alone = self.is_alone or dist.get_world_size() == 1
        self._own = batch
        self.sizes, self.offset = [batch], 0
        if not self.is_alone:
            self.sizes = _gathered(torch.tensor([batch], device=device)).tolist()
            self.offset = sum(self.sizes[: dist.get_rank()])

    def gather(self, x: Tensor) -> Tensor:
        """[B, ...] -> [samples of all processes, ...]; alike in all but B everywhere. Gradients come back to
        the process whose samples they are of, summed over all processes."""
        if self.is_alone:
            return x
        largest = max(self.sizes)
        padding = x.new_zeros(largest - len(x), *x.shape[1:])
        parts = _Gather.apply(torch.cat([x, padding])).split(largest)
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])

    def weight(self, count: int, device: torch.device) -> Tensor | float:
        """What to multiply one's own mean over ``count`` things with, where processes weigh by their samples
        (`BaseModel.forward`), so that it becomes the mean over the things of all processes."""
        if self.is_alone:
            return 1.0
        total = torch.tensor(float(count), device=device)
        dist.all_reduce(total)
        return count / self._own * sum(self.sizes) / total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.size = len(x)
        return _gathered(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()  # what comes in may be somebody else's
        dist.all_reduce(grad)
        return grad[dist.get_rank() * ctx.size :][: ctx.size]


def _gathered(x: Tensor) -> Tensor:
    """[B, ...] -> [processes x B, ...]."""
    out = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    dist.all_gather(list(out.split(len(x))), x.contiguous())
    return out
