"""Self-critical training: a captioner samples captions and learns from how well people's captions agree."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from evlgen.batch import Batch
from evlgen.common.errors import ConfigError, DataError
from evlgen.common.registry import registry
from evlgen.datasets.base_dataset import BaseDataset
from evlgen.models.protocols import WritesTokens, offering
from evlgen.tasks.captioning import CaptioningTask
from evlgen.tasks.metrics.cider_reward import CiderReward

if TYPE_CHECKING:
    from evlgen.runners.distribution import Distribution

# Drawn from all tokens: what is learned is the probability of what was drawn.
FREELY = {"use_nucleus_sampling": True, "top_p": 1.0, "top_k": None, "min_length": 0}

logger = logging.getLogger(__name__)


@registry.register_task("captioning_scst")
class SelfCriticalCaptioningTask(CaptioningTask):
    """Captioning, learned from CIDEr in place of people's words; for a model that captions already.

    Of each image ``run.scst_samples`` captions are sampled, and each is made likelier by how much its
    CIDEr-D is above a baseline, or less likely by how much below (REINFORCE): Rennie et al., *Self-Critical
    Sequence Training for Image Captioning*, CVPR 2017. The baseline (``run.scst_baseline``) is ``greedy``,
    the reward of the caption that a greedy search writes, as there; or ``mean``, that of the image's other
    samples: Luo, *A Better Variant of Self-Critical Sequence Training*, 2020. Document frequencies are those
    of the training captions, counted once. Evaluation is `CaptioningTask`'s.

    The gradient is exact where ``run.scst_temperature`` is 1: captions are drawn from all tokens, up to
    ``run.max_len`` of them (``min_len`` and the penalties are for evaluation), and what is learned is the
    probability of the very tokens that were drawn, whatever their text would be cut into again. A caption
    that ``max_len`` cut is rewarded as it stands and has no end to learn. Dropout is off in sampling and in
    learning, or the one would draw from another model than the other learns.

    A sample is an image with an ``image_id``; its own caption is not looked at. A dataset that has one
    sample for each caption of an image shows the image as often.
    """

    LEARNS_WRITING = True

    def before_training(self, datasets: Mapping[str, BaseDataset], distribution: Distribution) -> None:
        """Counts the words of all training captions.

        Raises:
            DataError: a dataset has no captions by image.
        """
        references: dict[Hashable, Sequence[str]] = {}
        for name, dataset in datasets.items():
            own = dataset.references()
            if not own:
                raise DataError(
                    f"run.task captioning_scst: the training data of '{name}' has no captions by image "
                    "(references()), which it is rewarded by. Train on a captioning dataset."
                )
            references |= {(name, image): captions for image, captions in own.items()}
        self._names = list(datasets)
        logger.info("counting the n-grams of the captions of %d images, for the reward", len(references))
        self._reward = CiderReward(references)
        self._distribution = distribution

    def train_step(self, model: nn.Module, samples: Batch) -> dict[str, Any]:
        """``loss``, whose gradient is that of the expected reward, negated; its value says nothing.
        ``reward``: mean of the samples; ``baseline``."""
        image_keys = self._image_keys(samples)
        was_training = model.training
        model.eval()
        with self._distribution.writing() as writer:
            read = writer.encoded(self._read(samples))
            writes = offering(writer, WritesTokens)
            tokens = writes.generate_tokens(
                read,
                num_captions=self.run.scst_samples,
                max_length=self.max_len,
                temperature=self.run.scst_temperature,
                **FREELY,
            )
            rewards, baselines = self._rewards(image_keys, writes.texts(tokens), self._greedy(writes, read))
        advantages = (rewards - baselines) / self.run.scst_samples
        losses = model(
            {
                **read,
                "text_tokens": tokens,
                "num_texts": [self.run.scst_samples] * len(image_keys),
                "text_weights": advantages.flatten(),
            }
        )
        model.train(was_training)
        device = losses["loss"].device
        means = {"reward": rewards.mean(), "baseline": baselines.mean()}
        return {**losses, **{name: value.to(device, non_blocking=True) for name, value in means.items()}}

    def _read(self, samples: Batch) -> Batch:
        """What a caption is written from."""
        read = cast(Batch, {key: samples[key] for key in ("image", "visual_tokens") if key in samples})
        return read if self.run.prompt is None else {**read, "prompt": self.run.prompt}

    def _image_keys(self, samples: Batch) -> list[Hashable]:
        """What the reward knows a batch's images by."""
        if "image_id" not in samples:
            raise ConfigError(
                "run.task captioning_scst: the training samples have no image_id, by which their captions "
                "are found. Train on a captioning dataset."
            )
        names = samples["dataset"] if len(self._names) > 1 else self._names * len(samples["image_id"])
        image_keys: list[Hashable] = list(zip(names, samples["image_id"], strict=True))
        for name, image in zip(names, samples["image_id"], strict=True):
            if (name, image) not in self._reward:
                raise DataError(
                    f"run.task captioning_scst: '{name}' has no captions of image_id {image!r} among its "
                    "references(), so nothing can be rewarded. Leave the image out, or caption it."
                )
        return image_keys

    def _greedy(self, writer: WritesTokens, read: Batch) -> list[str]:
        """The greedy caption of each image; empty where they are not compared with."""
        if self.run.scst_baseline == "mean":
            return []
        return writer.texts(writer.generate_tokens(read, num_beams=1, max_length=self.max_len, min_length=0))

    def _rewards(
        self, image_keys: list[Hashable], captions: list[str], greedy: list[str]
    ) -> tuple[Tensor, Tensor]:
        """The rewards of the K samples of each image, and what each is compared with: both [B, K], on the
        CPU."""
        each = self.run.scst_samples
        samples = [captions[i : i + each] for i in range(0, len(captions), each)]
        by_image = [[*own, *greedy[i : i + 1]] for i, own in enumerate(samples)]
        values = torch.tensor(self._reward(image_keys, by_image))  # of all, so that references are read once
        rewards = values[:, :each]
        if greedy:
            return rewards, values[:, each:].expand_as(rewards)
        others = rewards.sum(1, keepdim=True) - rewards
        return rewards, others / (each - 1)
