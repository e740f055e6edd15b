"""Retrieval: the texts of an image and the image of a text, among all of a split."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evlgen.batch import Batch
from evlgen.common.errors import ConfigError, DataError
from evlgen.common.registry import registry
from evlgen.config.run_config import RunConfig
from evlgen.datasets.base_dataset import BaseDataset
from evlgen.files.io import write_atomically
from evlgen.models.base_model import BaseModel
from evlgen.models.blip2_stage1 import Blip2Stage1
from evlgen.runners.gathering import gather_records, gather_rows
from evlgen.tasks.base_task import BaseTask

logger = logging.getLogger(__name__)

TEXTS_AT_ONCE = 256
RECALLS = (1, 5, 10)


class _Image(NamedTuple):
    """An image that this process has read."""

    image_id: int | str
    instance_id: str
    features: Tensor  # [M, E]
    tokens: Tensor  # [N, C], of the encoder, on the CPU


@registry.register_task("retrieval")
class RetrievalTask(BaseTask):
    """Trains BLIP-2's first stage, and scores how well it finds texts and images of a split.

    Each image is compared with all texts by their features. The best ``run.k_test`` texts of an image, and
    the best images of a text, are then ordered by image-text matching: the logit of *fits* plus the cosine.
    What is not among the best counts as not found. With ``k_test: 0`` the cosine alone decides.

    Result files: ``metrics.json`` and ``retrieval.json``: the rank of each image's first text and of each
    text's image, from 1; null: not among the best.

    The encoder's tokens of all images that a process reads are kept in its memory: for 5,000 images of
    224 pixels and ViT-g in half precision 3.6 GB.
    """

    WRITES = False

    def __init__(self, run: RunConfig) -> None:
        super().__init__(run)
        self._images: list[_Image] = []

    def check_split(self, model: BaseModel, dataset: BaseDataset, split: str) -> None:
        self._first_stage(model)

    def before_evaluation(self, dataset: BaseDataset, split: str) -> None:
        self._images = []

    @torch.no_grad()
    def valid_step(self, model: BaseModel, samples: Batch) -> list[dict[str, Any]]:
        """No results yet: they need all samples; see `finish_evaluation`.

        Raises:
            ConfigError: the model is another than BLIP-2's first stage.
        """
        model = self._first_stage(model)
        self.check_keys(samples, ("image_id", "instance_id"))
        samples = model.encoded(samples)
        tokens = model.image_tokens(samples)
        features = model.extract_features({"visual_tokens": tokens}, mode="image").image_embeds_proj
        parts = zip(samples["image_id"], samples["instance_id"], features, tokens.cpu(), strict=True)
        self._images += [_Image(*part) for part in parts]
        return []

    @torch.no_grad()
    def finish_evaluation(
        self, model: BaseModel, results: list[dict[str, Any]], dataset: BaseDataset
    ) -> list[dict[str, Any]]:
        """One result for each image that this process has read: ``rank`` among the texts, ``caption`` (the
        text found first), and its scores by text, ``texts`` and ``scores``."""
        images, self._images = self._images, []
        everyone = gather_records([[image.image_id, image.instance_id] for image in images])
        everyone = sorted(everyone, key=lambda pair: int(pair[1]))
        texts, owners = self._texts([image_id for image_id, _ in everyone], dataset)
        if not everyone:
            return []
        assert isinstance(model, Blip2Stage1)
        features = torch.cat(list(self._text_features(model, texts)))
        own = [
            model.similarities(image.features[None].to(features.device), features)[0].cpu()
            for image in images
        ]
        similarity = torch.stack(own) if own else torch.empty(0, len(texts))
        best_images = self._best_images(similarity)
        owner, numbers = numbered(owners)
        rows = []
        for row, image in enumerate(images):
            to_text = best(similarity[row], self.run.k_test)
            to_image = best_images[row]
            scores = self._scores(model, image, texts, similarity[row], to_text | to_image)
            order = torch.where(to_text, scores, -torch.inf)
            right = owner == numbers.get(image.image_id, -1)
            rows.append(
                {
                    "image_id": image.image_id,
                    "instance_id": image.instance_id,
                    "caption": texts[int(order.argmax())],
                    "rank": rank(order, right),
                    "texts": to_image.nonzero()[:, 0],
                    "scores": scores[to_image],
                }
            )
        return rows

    def after_evaluation(
        self, results: list[dict[str, Any]], dataset: BaseDataset, split: str, folder: Path
    ) -> dict[str, float]:
        """Recalls in percent: ``txt_r1``, ``txt_r5``, ``txt_r10`` of texts by images and their mean
        ``txt_r_mean``; ``img_..`` of images by texts; ``r_mean`` of both. ``agg_metrics`` is ``txt_r_mean``,
        as in LAVIS."""
        if not results:
            return {}
        results = sorted(results, key=lambda r: int(r["instance_id"]))
        texts, owners = self._texts([r["image_id"] for r in results], dataset)
        found = ranks_of_images(results, owners)
        metrics = recalls([r["rank"] for r in results], found)
        write_atomically(folder / "metrics.json", json.dumps(metrics, indent=1))
        images = [{key: r[key] for key in ("image_id", "rank", "caption")} for r in results]
        rows = [
            {"text": t, "image_id": i, "rank": place}
            for t, i, place in zip(texts, owners, found, strict=True)
        ]
        content = {"images": images, "texts": rows}
        write_atomically(folder / "retrieval.json", json.dumps(content, ensure_ascii=False, indent=0))
        return metrics

    def _first_stage(self, model: BaseModel) -> Blip2Stage1:
        if not isinstance(model, Blip2Stage1):
            raise ConfigError(
                f"task '{self.run.task}' compares features of images and texts, which {type(model).__name__} "
                "does not have. Take model.arch: blip2."
            )
        return model

    def _texts(
        self, image_ids: Sequence[int | str], dataset: BaseDataset
    ) -> tuple[list[str], list[int | str]]:
        """The texts of images as the model reads them, and the image of each.

        Raises:
            DataError: an image has none.
        """
        references = self.references_of(dataset)
        if bare := [i for i in image_ids if not references.get(i)]:
            raise DataError(
                f"{len(bare)} of {len(image_ids)} images have no texts to be found by, such as {bare[0]!r}. "
                f"Task '{self.run.task}' needs captions in the annotation."
            )
        process = getattr(dataset, "text_processor", None) or (lambda text: text)
        pairs = [(process(text), image_id) for image_id in image_ids for text in references[image_id]]
        return [text for text, _ in pairs], [image_id for _, image_id in pairs]

    def _text_features(self, model: Blip2Stage1, texts: list[str]) -> Iterator[Tensor]:
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            samples: Batch = {"text_input": texts[start : start + TEXTS_AT_ONCE]}
            yield model.extract_features(samples, mode="text").text_embeds_proj[:, 0]

    def _best_images(self, own: Tensor) -> Tensor:
        """[own images, texts], bool: for which texts an image is among the best of all processes' images."""
        k = self.run.k_test
        if not k:
            return torch.ones_like(own, dtype=torch.bool)
        values = own.topk(min(k, len(own)), dim=0).values  # the best of all are among the best of each
        everyone = gather_rows(values)
        return own >= everyone.topk(min(k, len(everyone)), dim=0).values[-1]

    def _scores(
        self, model: Blip2Stage1, image: _Image, texts: list[str], similarity: Tensor, chosen: Tensor
    ) -> Tensor:
        """The scores of an image with its chosen texts, [texts]; of the others the similarity."""
        if not self.run.k_test:
            return similarity
        scores = similarity.clone()
        for part in chosen.nonzero()[:, 0].split(TEXTS_AT_ONCE):
            samples: Batch = {
                "visual_tokens": image.tokens[None],
                "text_input": [texts[index] for index in part.tolist()],
            }
            scores[part] += model.match(samples)[:, 1].cpu()
        return scores


def best(similarity: Tensor, k: int) -> Tensor:
    """Which of [T] similarities are among the k highest, bool; all of them where k is 0. Equal ones are in or
    out together with the k-th."""
    if not 0 < k < len(similarity):
        return torch.ones_like(similarity, dtype=torch.bool)
    return similarity >= similarity.topk(k).values[-1]


def rank(scores: Tensor, right: Tensor) -> int | None:
    """The place of the first right one, from 1; None where its score is minus infinity. A wrong one with the
    same score comes before it, so that a model that finds all alike finds nothing.

    Args:
        scores: [T].
        right: [T], bool.
    """
    top = scores[right].max()
    before = ~(scores[~right] < top)  # what is not a number is never below
    return None if top == -torch.inf else int(before.sum()) + 1


def numbered(owners: Sequence[int | str]) -> tuple[Tensor, dict[int | str, int]]:
    """The image of each text as a number, [T], and the number of each image."""
    numbers = {image_id: number for number, image_id in enumerate(dict.fromkeys(owners))}
    return torch.tensor([numbers[image_id] for image_id in owners]), numbers


def ranks_of_images(results: Sequence[dict[str, Any]], owners: Sequence[int | str]) -> list[int | None]:
    """The place of each text's image among the images, as `rank` counts.

    Args:
        results: of all images, each with ``texts`` (numbers of texts it is among the best images of) and
            ``scores`` with them.
        owners: the image of each text.
    """
    own = torch.full((len(owners),), -torch.inf)
    owner, numbers = numbered(owners)
    for result in results:
        mine = owner[result["texts"]] == numbers.get(result["image_id"], -1)
        own[result["texts"][mine]] = result["scores"][mine]
    before = torch.zeros(len(owners), dtype=torch.long)
    for result in results:
        texts, scores = result["texts"], result["scores"]
        before[texts] += (~(scores < own[texts])).long()
    # its own score is counted among those that are as high
    return [int(n) if s > -torch.inf else None for n, s in zip(before, own, strict=True)]


def recalls(texts: Sequence[int | None], images: Sequence[int | None]) -> dict[str, float]:
    """R@1, R@5, R@10 and their means, percent, under LAVIS's names.

    Args:
        texts: the place of each image's first text, from 1.
        images: the place of each text's image.
    """
    metrics: dict[str, float] = {}
    for name, places in (("txt", texts), ("img", images)):
        found = [100 * sum(p is not None and p <= k for p in places) / len(places) for k in RECALLS]
        metrics |= {f"{name}_r{k}": value for k, value in zip(RECALLS, found, strict=True)}
        metrics[f"{name}_r_mean"] = sum(found) / len(found)
    metrics["r_mean"] = (metrics["txt_r_mean"] + metrics["img_r_mean"]) / 2
    metrics["agg_metrics"] = metrics["txt_r_mean"]
    return metrics
