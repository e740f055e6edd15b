"""How much a model uses its images, measured on held-out samples at every evaluation.

A connector can collapse: its soft prompts become one vector that carries the style of the texts, the same for
every image. The training loss falls all the same. Two numbers show it: what the loss loses when each text is
read with another sample's image, and how much of the soft prompts is common to all images.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Hashable, Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor

from evlgen.batch import Batch
from evlgen.common.errors import EVLGenError
from evlgen.loaders.data import batch_size
from evlgen.models.base_model import BaseModel
from evlgen.models.protocols import HasPromptHead, HasSoftPrompts, offers
from evlgen.runners.gathering import gather_records
from evlgen.runners.log_fields import IMAGE_USE
from evlgen.runners.training_state import kept_random_state

logger = logging.getLogger(__name__)

MIN_WORTH = 0.01  # nats per token; an image worth less is ignored
MAX_COMMON = 0.99  # fraction of the soft prompts' mean square; above it they are nearly constant
MIN_SAMPLES = 32  # of fewer samples a small worth proves nothing


@dataclasses.dataclass(frozen=True)
class ImageUse:
    """What an evaluation found.

    Attributes:
        loss: of the held-out texts in eval mode, nats per token; NaN where no text was measured.
        exchanged_loss: the same, every text with the image (or video) of another sample.
        worth_error: standard error of `worth`.
        common_fraction: how much of the soft prompts' mean square is the mean over images at each place,
            learned places (`model.soft_prompts`) apart; None where the model has no soft prompts, or not the
            same number for all images, or there is one image only.
        num_samples: samples whose losses were measured.
        num_left_out: samples with a loss that is not finite.
    """

    loss: float
    exchanged_loss: float
    worth_error: float
    common_fraction: float | None
    num_samples: int
    num_left_out: int = 0

    @property
    def worth(self) -> float:
        """What the right image is worth, nats per token."""
        return self.exchanged_loss - self.loss

    @property
    def is_ignored(self) -> bool:
        """Whether the model ignores its images, as far as the samples tell."""
        if not self.num_samples:
            return self._is_nearly_constant
        return self.worth < MIN_WORTH if self._are_too_few else self.worth < self._least

    @property
    def _least(self) -> float:
        """What an image must be worth to be more than chance."""
        return max(MIN_WORTH, 2 * self.worth_error)

    @property
    def _are_too_few(self) -> bool:
        return self.num_samples < MIN_SAMPLES and 2 * self.worth_error > MIN_WORTH

    @property
    def _is_nearly_constant(self) -> bool:
        return (self.common_fraction or 0.0) > MAX_COMMON

    def fields(self, train_loss: float | None) -> dict[str, float]:
        """`IMAGE_USE` of a log record, those that are known."""
        values = (self.loss, self.exchanged_loss, self.worth, self.common_fraction, train_loss)
        pairs = zip(IMAGE_USE, values, strict=True)
        return {name: value for name, value in pairs if value is not None and not math.isnan(value)}

    def line(self, train_loss: float | None) -> str:
        """A line for the log.

        Args:
            train_loss: the running mean of the training loss.
        """
        left_out = (
            f"; {self.num_left_out} samples with a loss that is not finite" if self.num_left_out else ""
        )
        if not self.num_samples:
            return self._common().capitalize() + left_out
        trained = "" if train_loss is None else f" (in training, a running mean: {train_loss:.4f})"
        return (
            f"loss {self.loss:.4f}{trained}, with exchanged images {self.exchanged_loss:.4f}: "
            f"the image is worth {self.worth:.4f} nats per token{self._common('; ')}{left_out}"
        )

    def warning(self) -> str:
        """What to tell the user; empty where nothing is wrong."""
        remedy = "Train longer; if that does not change it, see docs/training-on-real-parts.md."
        if self.is_ignored:
            change = f"with another sample's image its loss changes by {self.worth:.4f} nats per token"
            what = f"{change}{self._common(', and ')}" if self.num_samples else self._common()
            return f"the model ignores the image: {what}. {remedy}"
        if self._is_nearly_constant:
            return f"the soft prompts are nearly constant:{self._common(' ')}. {remedy}"
        if self.num_samples and self._are_too_few and self.worth < self._least:
            return (
                f"whether the model uses the image cannot be told from {self.num_samples} samples: it is "
                f"worth {self.worth:.4f} nats per token, give or take {2 * self.worth_error:.4f}. Evaluate "
                "more (run.max_eval_samples, run.image_use_samples)."
            )
        return ""

    def _common(self, joint: str = "") -> str:
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
        self._has_failed = False
        self._rows: list[tuple[float, float, int]] = []  # loss, loss with another image, tokens; of a sample
        self._mean: Tensor | None = None  # sum of soft prompts over samples, [M, C], float64
        self._square = 0.0
        self._prompts = 0
        self._images: set[Hashable] = set()  # those whose soft prompts were looked at
        self._seen: dict[Hashable, Tensor] = {}  # soft prompts [1, M, C] of the last two images
        self._waiting: list[tuple[list[Hashable], Batch, Tensor]] = []  # batches for which no other was seen

    def measure(
        self,
        model: BaseModel,
        samples: Batch,
        held_out: Callable[[Batch], Batch | None],
    ) -> Batch:
        """Measures a batch, unless there are enough. An evaluation never ends here: what fails is left out
        and logged once.

        Args:
            model: in eval mode.
            samples: of an evaluation.
            held_out: from them to those whose texts are known; see `BaseTask.held_out`.

        Returns:
            The samples with what need not be computed again.
        """
        if self._has_failed or self.count >= self.max_samples:
            return samples
        try:
            with kept_random_state():  # a loss may draw, such as the negatives of BLIP-2's first stage
                samples = {**samples, **_kept(model.encoded(samples))}
                learned = held_out(samples)
                if learned is not None:
                    self.add(model, learned)
                elif offers(model, HasSoftPrompts) and "images" not in samples:
                    self._images.update(self._count(samples))
                    self._remember(model, model.soft_prompts(samples))
        except EVLGenError as error:  # texts that cannot be learned, such as a question beyond all limits
            logger.warning("a batch is left out of the measure of how much images are used: %s", error)
        except Exception as error:  # a task or model of somebody's own may not have what is asked here
            self._has_failed = True
            logger.warning(
                "how much images are used cannot be measured: %s: %s. run.image_use_samples: 0 turns the "
                "measure off.",
                type(error).__name__,
                error,
            )
        return samples

    @torch.no_grad()
    def add(self, model: BaseModel, samples: Batch) -> None:
        """Measures samples as the model's `forward` reads them, one text for each image. The model is in eval
        mode."""
        keys = self._count(samples)
        if not offers(model, HasSoftPrompts):
            self._add_whole(model, samples, keys)
            return
        self._images.update(keys)
        prompts = model.soft_prompts(samples)
        self._remember(model, prompts)
        if isinstance(prompts, Tensor):  # images of different numbers of tiles are exchanged in a batch only
            for place in (0, -1):
                self._seen.pop(keys[place], None)
                self._seen[keys[place]] = prompts[place][None]
            self._seen = dict(list(self._seen.items())[-2:])
        batches, self._waiting = [*self._waiting, (keys, samples, prompts)], []
        for keys, samples, prompts in batches:
            others = self._others(keys, prompts)
            if others is not None:
                right, exchanged = (model.sample_losses(samples, p) for p in (prompts, others))
                columns = (right["losses"], exchanged["losses"], right["num_tokens"])
                self._rows += zip(*(column.tolist() for column in columns), strict=True)
            elif isinstance(prompts, Tensor):
                self._waiting.append((keys, samples, prompts))

    def _count(self, samples: Batch) -> list[Hashable]:
        """Counts a batch's samples; what the image of each is known by."""
        first = self.count
        self.count += batch_size(samples)
        return list(samples.get("image_id", range(first, self.count)))

    def _add_whole(self, model: BaseModel, samples: Batch, keys: Sequence[Hashable]) -> None:
        """Of a model that gives the loss of a batch only, such as BLIP-2's first stage, whose loss of writing
        the text is the one in nats per token."""
        order = exchange(keys)
        name = next((name for name in ("visual_tokens", "image") if name in samples), None)
        if order is None or name is None:
            return
        right, exchanged = (model(s) for s in (samples, {**samples, name: samples[name][order]}))
        loss = "loss_lm" if "loss_lm" in right else "loss"
        weight = int(right.get("num_tokens", len(keys)))
        self._rows.append((float(right[loss]) * weight, float(exchanged[loss]) * weight, weight))

    def _others(self, keys: Sequence[Hashable], prompts: Tensor) -> Tensor | None:
        """For each sample the soft prompts of another image, of its batch or else one that was seen; None
        where there is no other."""
        order = exchange(keys)
        if order is not None:
            return prompts[order]
        for key, other in self._seen.items():
            if isinstance(prompts, Tensor) and key not in keys and other.shape[1:] == prompts.shape[1:]:
                return other.expand_as(prompts)
        return None

    @torch.no_grad()
    def _remember(self, model: object, prompts: Tensor) -> None:
        if not isinstance(prompts, Tensor):
            self._square = math.nan
            return
        values = prompts.float()
        if offers(model, HasPromptHead) and model.prompt_head is not None:
            values = values - model.prompt_head.places_for(prompts.shape[1])
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
        parts = gather_records([[list(row) for row in self._rows]])
        measured = torch.tensor([row for part in parts for row in part], dtype=torch.float64).reshape(-1, 3)
        images = set().union(*gather_object([self._images]))
        found = gather_object([(self._mean, self._square, self._prompts)])
        common = common_fraction(found) if len(images) > 1 else None  # all of one image is common to it
        rows = measured[measured.isfinite().all(1)]
        left_out = len(measured) - len(rows)
        if not len(rows):
            is_nothing_known = common is None and not left_out
            return None if is_nothing_known else ImageUse(math.nan, math.nan, math.nan, common, 0, left_out)
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
            num_left_out=left_out,
        )


def _kept(encoded: Batch) -> Batch:
    """What of encoded samples need not be computed again."""
    return {"visual_tokens": encoded["visual_tokens"]} if "visual_tokens" in encoded else {}


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
