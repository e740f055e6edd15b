"""Scores of generated captions against references, as COCO's evaluation computes them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from evlgen.common.errors import DataError
from evlgen.common.registry import registry
from evlgen.tasks.metrics.base import ImageId, MetricResult, MetricUnavailable, Tokenised
from evlgen.tasks.metrics.java import find_java
from evlgen.tasks.metrics.tokenizer import TokenizerName, tokenize_captions

logger = logging.getLogger(__name__)

DEFAULT_METRICS = ("bleu", "meteor", "rouge_l", "cider", "spice")
_NAMED_IDS = 5


@dataclass(frozen=True)
class Scores:
    """What `score_captions` found.

    Attributes:
        values: over all images, by the names pycocoevalcap uses: Bleu_1 to Bleu_4, METEOR, ROUGE_L, CIDEr,
            SPICE, and those of registered metrics. 1 is 100 of the usual tables.
        left_out: name -> why that metric could not be computed, and what would help.
        per_image: name -> image id -> value.
        tokenizer: "java" or "python".
        num_images: how many images were scored.
    """

    values: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)
    per_image: dict[str, dict[ImageId, float]] = field(default_factory=dict)
    tokenizer: TokenizerName = "python"
    num_images: int = 0

    @property
    def agg_metrics(self) -> float | None:
        """CIDEr + BLEU-4, by which LAVIS picks the best checkpoint; None where one of them is missing."""
        if "CIDEr" not in self.values or "Bleu_4" not in self.values:
            return None
        return self.values["CIDEr"] + self.values["Bleu_4"]


def begin_metrics(names: Sequence[str] | None = None) -> dict[str, Any]:
    """Metrics for `score_captions`, by name, whose programs start while captions are still being written.

    Args:
        names: registered names; None for BLEU, METEOR, ROUGE-L, CIDEr and SPICE.

    Raises:
        RegistryError: a metric is not registered.
    """
    names = DEFAULT_METRICS if names is None else names
    metrics = {name: registry.get_metric_class(name)() for name in names}
    for metric in metrics.values():
        if hasattr(metric, "begin"):
            metric.begin()
    return metrics


def score_captions(
    references: Mapping[ImageId, Sequence[str]],
    candidates: Mapping[ImageId, str],
    metrics: Sequence[str] | Mapping[str, Any] | None = None,
) -> Scores:
    """Scores one caption per image against that image's references.

    Both are tokenised once, by pycocoevalcap's Java program where Java runs and by our equal one elsewhere. A
    metric that cannot run on this machine is left out with the reason. CIDEr's document frequencies come from
    exactly these images.

    Args:
        references: id -> human captions, at least one.
        candidates: id -> generated caption, for the same ids. May be empty text, may hold any character.
        metrics: registered names, or what `begin_metrics` gave; None for BLEU, METEOR, ROUGE-L, CIDEr and
            SPICE.

    Raises:
        DataError: ids of references and candidates differ, there is nothing to score, or something is not
            text.
        RegistryError: a metric is not registered.
    """
    parts = metrics if isinstance(metrics, Mapping) else begin_metrics(metrics)
    _check(references, candidates)
    ordered = {image: references[image] for image in candidates}
    reference_tokens, candidate_tokens, tokenizer = tokenize_captions(ordered, candidates)
    scores = Scores(values={}, tokenizer=tokenizer, num_images=len(candidates))
    tokens = (reference_tokens, candidate_tokens)
    with ThreadPoolExecutor(len(parts) or 1) as pool:  # Java's programs, beside the others
        java = {name: pool.submit(_compute, m, *tokens) for name, m in parts.items() if _needs_java(m)}
        results = {name: _compute(metric, *tokens) for name, metric in parts.items() if name not in java}
        results.update({name: result.result() for name, result in java.items()})
    for name, metric in parts.items():
        result = results[name]
        if isinstance(result, MetricUnavailable):
            scores.left_out.update(dict.fromkeys(metric.names, str(result)))
            logger.info("%s is left out: %s.", name, result)
        else:
            scores.values.update(result.values)
            scores.per_image.update(result.per_image)
    return scores


def _compute(metric: Any, references: Tokenised, candidates: Tokenised) -> MetricResult | MetricUnavailable:
    """What a metric found, or why it cannot be computed here."""
    try:
        # A registered metric may be any class with `names` and `compute`.
        if hasattr(metric, "unavailable"):
            reason = metric.unavailable()
        else:
            java = find_java() if _needs_java(metric) else None
            reason = java if isinstance(java, str) else None
        if reason is not None:
            return MetricUnavailable(reason)
        result = metric.compute(references, candidates)
    except MetricUnavailable as error:
        return error
    return result if isinstance(result, MetricResult) else MetricResult(dict(result))


def _needs_java(metric: Any) -> bool:
    return getattr(metric, "needs_java", False)


def _check(references: Mapping[ImageId, Sequence[str]], candidates: Mapping[ImageId, str]) -> None:
    without_candidate = [image for image in references if image not in candidates]
    without_reference = [image for image in candidates if image not in references]
    hint = _type_hint(without_candidate, without_reference)
    if without_candidate:
        raise DataError(
            f"{_ids(without_candidate)} no generated caption.{hint or ' Score exactly the captioned images.'}"
        )
    if without_reference:
        raise DataError(
            f"{_ids(without_reference)} no reference captions.{hint or ' Add them or leave the images out.'}"
        )
    if not candidates:
        raise DataError("there are no captions to score: references and candidates are empty.")
    for image, captions in references.items():
        if (
            isinstance(captions, str)
            or not captions
            or not all(isinstance(caption, str) for caption in captions)
        ):
            raise DataError(
                f"references of image {image!r} must be a list of at least one text, not {captions!r:.80}."
            )
    for image, caption in candidates.items():
        if not isinstance(caption, str):
            raise DataError(f"the generated caption of image {image!r} must be text, not {caption!r:.80}.")


def _ids(images: Sequence[ImageId]) -> str:
    named = ", ".join(repr(image) for image in images[:_NAMED_IDS])
    more = f" and {len(images) - _NAMED_IDS} more" if len(images) > _NAMED_IDS else ""
    return f"image {named} has" if len(images) == 1 else f"{len(images)} images ({named}{more}) have"


def _type_hint(one: Sequence[ImageId], other: Sequence[ImageId]) -> str:
    if {str(image) for image in one} & {str(image) for image in other}:
        return " The ids are numbers on one side and text on the other: make them the same type."
    return ""
