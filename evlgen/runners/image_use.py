"""How much a model uses its images, measured on held-out samples at every evaluation.

A connector can collapse: its soft prompts become one vector that carries the style of the texts, the same for
every image. The training loss falls all the same. Two numbers show it: what the loss loses when each text is
read with another sample's image, and how much of the soft prompts is common to all images.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from evlgen.common.errors import EVLGenError
from evlgen.models.base_model import BaseModel
from evlgen.runners.data import batch_size
from evlgen.runners.log_fields import IMAGE_USE

logger = logging.getLogger(__name__)

MIN_WORTH = 0.01  # nats per token; an image worth less is ignored
MAX_COMMON = (
    0.99  # fraction of the soft prompts' mean square; above it an image has to be worth the following
)
MIN_WORTH_OF_NEARLY_CONSTANT = 0.1  # learned places are a large part that is common and does no harm


@dataclasses.dataclass(frozen=True)
class ImageUse:
    """What an evaluation found.

    Attributes:
        loss: of the held-out texts in eval mode, nats per token.
        exchanged_loss: the same, every text with the image (or video) of another sample.
        worth_error: standard error of `worth`.
        common_fraction: how much of the soft prompts' mean square is the mean over images at each place; None
            where the model has no soft prompts, or not the same number for all images.
        num_samples: samples measured.
    """

    loss: float
    exchanged_loss: float
    worth_error: float
    common_fraction: float | None
    num_samples: int

    @property
    def worth(self) -> float:
        """What the right image is worth, nats per token."""
        return self.exchanged_loss - self.loss

    @property
    def is_ignored(self) -> bool:
        """Whether the model ignores its images."""
        is_nearly_constant = (self.common_fraction or 0.0) > MAX_COMMON
        least = MIN_WORTH_OF_NEARLY_CONSTANT if is_nearly_constant else MIN_WORTH
        return self.worth < max(least, 2 * self.worth_error)

    def fields(self, train_loss: float | None) -> dict[str, float]:
        """`IMAGE_USE` of a log record, those that are known."""
        values = (self.loss, self.exchanged_loss, self.worth, self.common_fraction, train_loss)
        return {name: value for name, value in zip(IMAGE_USE, values, strict=True) if value is not None}

    def line(self, train_loss: float | None) -> str:
        """A line for the log."""
        trained = "" if train_loss is None else f" (in training {train_loss:.4f})"
        return (
            f"loss {self.loss:.4f}{trained}, with exchanged images {self.exchanged_loss:.4f}: "
            f"the image is worth {self.worth:.4f} nats per token{self._common('; ')}"
        )

    def warning(self) -> str:
        """What to tell the user where `is_ignored`."""
        return (
            "the model ignores the image: with another sample's image its loss changes by "
            f"{self.worth:.4f} nats per token{self._common(', and ')}. "
            "Train longer; if that does not change it, see docs/training-on-real-parts.md."
        )

    def _common(self, joint: str) -> str:
        if self.common_fraction is None:
            return ""
        return f"{joint}{100 * self.common_fraction:.1f} % of the soft prompts is common to all images"


class ImageUseMeter:
    """Adds up batches of held-out samples for an `ImageUse`.

    Args:
        max_samples: how many samples are measured at most, on each process.
    """

    def __init__(self, max_samples: int) -> None:
        self.max_samples = max_samples
        self.count = 0
        self._rows: list[tuple[float, float, int]] = []  # loss, loss with another image, tokens; of a sample
        self._mean: Tensor | None = None  # sum of soft prompts over samples, [M, C], float64
        self._square = 0.0
        self._prompts = 0
        self._previous: tuple[Hashable, Tensor] | None = None  # the last sample's image key and soft prompts

    @property
    def is_full(self) -> bool:
        return self.count >= self.max_samples

    @torch.no_grad()
    def add(self, model: BaseModel, samples: dict[str, Any]) -> None:
        """Measures a batch.

        Args:
            model: in eval mode.
            samples: as the model's `forward` reads them, one text for each image.
        """
        try:
            self._add(model, samples)
        except EVLGenError as error:  # texts that cannot be learned, such as a question beyond all limits
            logger.warning("a batch is left out of the measure of how much images are used: %s", error)

    def _add(self, model: BaseModel, samples: dict[str, Any]) -> None:
        batch = batch_size(samples)
        keys = list(samples.get("image_id", range(self.count, self.count + batch)))
        self.count += batch
        if not hasattr(model, "sample_losses"):
            self._add_whole(model, samples, keys)
            return
        prompts = model.soft_prompts(samples)
        others = self._others(keys, prompts)
        self._remember(prompts)
        self._previous = (keys[-1], prompts[-1:])
        if others is None:
            return
        right, exchanged = (model.sample_losses(samples, p) for p in (prompts, others))
        columns = (right["losses"], exchanged["losses"], right["num_tokens"])
        self._rows += zip(*(column.tolist() for column in columns), strict=True)

    def _add_whole(self, model: BaseModel, samples: dict[str, Any], keys: Sequence[Hashable]) -> None:
        """Of a model that gives the loss of a batch only, such as BLIP-2's first stage."""
        order = exchange(keys)
        name = next((name for name in ("visual_tokens", "image") if name in samples), None)
        if order is None or name is None:
            return
        right, exchanged = (model(s) for s in (samples, {**samples, name: samples[name][order]}))
        weight = int(right.get("num_tokens", len(keys)))
        self._rows.append((float(right["loss"]) * weight, float(exchanged["loss"]) * weight, weight))

    def _others(self, keys: Sequence[Hashable], prompts: Tensor) -> Tensor | None:
        """For each sample the soft prompts of another image; None where there is no other."""
        order = exchange(keys)
        if order is not None:
            return prompts[order]
        if (
            self._previous is None
            or self._previous[0] in keys
            or self._previous[1].shape[1:] != prompts.shape[1:]
        ):
            return None
        return self._previous[1].expand_as(prompts)

    def _remember(self, prompts: Tensor) -> None:
        values = prompts.float()
        total = values.sum(0).cpu().double()
        if self._mean is None:
            self._mean = torch.zeros_like(total)
        if total.shape != self._mean.shape:
            self._square = math.nan
            return
        self._mean += total
        self._square += values.square().sum().item()
        self._prompts += len(prompts)

    def over_processes(self) -> ImageUse | None:
        """What all processes found together; None where nothing could be measured."""
        parts = gather_object([self._rows])
        rows = torch.tensor([row for part in parts for row in part], dtype=torch.float64).reshape(-1, 3)
        common = common_fraction(gather_object([(self._mean, self._square, self._prompts)]))
        if not len(rows) or not rows.isfinite().all():
            return None
        right, exchanged, tokens = rows.T
        num_tokens = tokens.sum()
        worth = (exchanged - right).sum() / num_tokens
        residual = exchanged - right - worth * tokens
        return ImageUse(
            loss=(right.sum() / num_tokens).item(),
            exchanged_loss=(exchanged.sum() / num_tokens).item(),
            worth_error=(residual.square().sum().sqrt() / num_tokens).item(),
            common_fraction=common,
            num_samples=len(rows),
        )


def exchange(keys: Sequence[Hashable]) -> list[int] | None:
    """For each sample of a batch the index of one of another image; None where the batch has no other.

    Samples are put in the order of their images and shifted by the size of the largest group, so that no
    sample keeps its image where no image has more than half of the samples.

    Args:
        keys: what each sample's image is known by.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    shift = max(map(len, groups.values()), default=0)
    if not keys or 2 * shift > len(keys):
        return None
    ordered = [index for group in groups.values() for index in group]
    out = [0] * len(keys)
    for place, index in enumerate(ordered):
        out[index] = ordered[(place + shift) % len(ordered)]
    return out


def common_fraction(parts: Sequence[tuple[Tensor | None, float, int]]) -> float | None:
    """How much of the soft prompts' mean square is the mean over images at each place.

    Args:
        parts: of each process the sum of soft prompts [M, C], the sum of their squares, and their number.
    """
    known = [(total, square, count) for total, square, count in parts if total is not None]
    if not known or len({total.shape for total, _, _ in known}) > 1:
        return None
    total, square, count = (sum(values) for values in zip(*known, strict=True))
    if count < 2 or not square > 0 or not math.isfinite(square):
        return None
    return (total / count).square().sum().item() / (square / count)
