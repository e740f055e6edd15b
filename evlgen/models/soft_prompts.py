"""What keeps soft prompts apart from one another: a learned vector at each place, and an image's part that
cannot become constant.

A frozen language model needs two things from soft prompts: in what style to write, which is the same for
every image, and what the image shows. The style is learned within some twenty iterations, and until then the
part that depends on the image is noise. A connector that has the same weights for both can remove that noise
and become constant (docs/training-on-real-parts.md). So here style has weights of its own, and the image's
part is standardised over the batch, which removes its mean and the gradient that would make it constant.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

PLACES_LR_SCALE = 10.0
_EPS = 1e-6
_MOMENTUM = 0.1  # of the running statistics, as of torch's batch norms
MIN_IMAGES = 8  # of fewer images a batch says too little about how images differ


class SoftPromptHead(nn.Module):
    """``place + gain * standardised(prompt)``.

    Soft prompts are standardised in each channel over the images and places of a batch (batch normalisation;
    Ioffe and Szegedy, 2015), of all processes together; in eval mode by the running statistics. Batches that
    are accumulated are standardised each by itself. A batch of fewer than `MIN_IMAGES` images is standardised
    by the running statistics in training too: its own would take away what distinguishes its images.

    Args:
        num_places: soft prompts of one image.
        channels: of the word embeddings.
        embedding_rms: root mean square of the word embeddings, at which places start.
        scale: the image's part at the start, as a fraction of ``embedding_rms``.
    """

    def __init__(self, num_places: int, channels: int, embedding_rms: float, scale: float) -> None:
        super().__init__()
        self.places = nn.Parameter(embedding_rms * torch.randn(num_places, channels))
        self.gain = nn.Parameter(torch.full((channels,), scale * embedding_rms))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))

    def forward(self, prompts: Tensor) -> Tensor:
        """[B, M, C] -> [B, M, C], float32. Another M than ``num_places``, as of the frames of a video in a
        row, stretches the places over it."""
        rows = prompts.float().flatten(0, 1)  # [B * M, C]
        mean, variance = self.mean, self.variance
        if self.training and torch.is_grad_enabled():
            own_mean, own_variance, num_rows = batch_statistics(rows)
            num_images = num_rows / prompts.shape[1]
            self._remember(own_mean.detach(), own_variance.detach(), num_images)
            if num_images >= MIN_IMAGES:
                mean, variance = own_mean, own_variance
            else:  # a copy: what is remembered changes before the backward pass of accumulated batches
                mean, variance = self.mean.clone(), self.variance.clone()
        part = (rows - mean) * ((variance + _EPS).rsqrt() * self.gain)
        return part.view(prompts.shape) + self.places_for(prompts.shape[1])

    def lr_scales(self) -> dict[str, float]:
        """Places learn the style of the texts, faster than the rest learns what images show."""
        return {"places": PLACES_LR_SCALE}

    def places_for(self, count: int) -> Tensor:
        """What is added to ``count`` soft prompts of an image, [count, C]."""
        known = len(self.places)
        if count == known:
            return self.places
        # a product, whose gradient is the same every time, which that of indexing is not on a GPU
        nearest = nearest_places(known, count, self.places.device)
        return F.one_hot(nearest, known).to(self.places.dtype) @ self.places

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, num_images: float) -> None:
        finite = mean.isfinite().all() & variance.isfinite().all()  # the runner leaves other steps out
        self.num_batches += finite
        is_small = num_images < MIN_IMAGES
        momentum = _MOMENTUM * num_images / MIN_IMAGES if is_small else _MOMENTUM
        weight = (1 / self.num_batches.clamp(min=1)).clamp(min=momentum)  # a plain mean of the first batches
        if is_small:  # how images differ shows between batches
            variance = variance + (1 - weight) * (mean - self.mean).square()
        self.mean.copy_(torch.where(finite, torch.lerp(self.mean, mean, weight), self.mean))
        self.variance.copy_(torch.where(finite, torch.lerp(self.variance, variance, weight), self.variance))


def nearest_places(known: int, count: int, device: torch.device | None = None) -> Tensor:
    """Which of the ``known`` places each of ``count`` soft prompts takes, [count]. A multiple of them are
    frames that stand one after the other, each with all of its places."""
    order = torch.arange(count, device=device)
    return order % known if count % known == 0 else order * known // count


def batch_statistics(rows: Tensor) -> tuple[Tensor, Tensor, int]:
    """The mean and variance of each channel, of the rows [N, C] of all processes together, differentiable,
    and how many rows these are."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        mean = rows.mean(0)
        return mean, (rows - mean).square().mean(0), len(rows)
    count = torch.full((1,), float(len(rows)), device=rows.device)
    dist.all_reduce(count)
    mean = _Sum.apply(rows.sum(0)) / count
    return mean, _Sum.apply((rows - mean).square().sum(0)) / count, int(count)


class _Sum(torch.autograd.Function):
    """The sum of all processes' tensors. Its gradient is the sum of theirs, as each process uses it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad
