"""Scores of generated captions against references, as COCO's evaluation computes them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from evlgen.common.errors import DataError
from evlgen.common.registry import registry
from evlgen.tasks.metrics.base import CaptionMetric, ImageId, MetricResult, MetricUnavailable, Tokenised
from evlgen.tasks.metrics.java import find_java
from evlgen.tasks.metrics.tokenizer import TokenizerName, tokenize_captions

logger = logging.getLogger(__name__)

DEFAULT_METRICS = ("bleu", "meteor", "rouge_l", "cider", "spice")
_NAMED_IDS = 5
_TAKEN_AT_ONCE = 256  # captions; a tokenizer's start takes half a second


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


class BegunMetrics:
    """Metrics that begin while captions are still being written: their programs start, and what is written
    so far is given, in a thread, to those that can take it. The scores are those of `score_captions` without.

    Args:
        names: registered names, or metrics by name; None for BLEU, METEOR, ROUGE-L, CIDEr and SPICE.

    Attributes:
        metrics: name -> metric.

    Raises:
        RegistryError: a metric is not registered.
    """

    def __init__(self, names: Sequence[str] | Mapping[str, Any] | None = None) -> None:
        names = DEFAULT_METRICS if names is None else names
        given = names if isinstance(names, Mapping) else {}
        self.metrics = {n: given[n] if n in given else registry.get_metric_class(n)() for n in names}
        for metric in self.metrics.values():
            if hasattr(metric, "begin"):
                metric.begin()
        self._takers = [m for m in self.metrics.values() if isinstance(m, CaptionMetric) and m.takes()]
        self._written: dict[ImageId, tuple[Sequence[str], str]] = {}  # references and caption, not yet taken
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def take(self, references: Mapping[ImageId, Sequence[str]], captions: Mapping[ImageId, str]) -> None:
        """Takes captions as they are written, and the references of their images at least. Returns at
        once."""
        if not self._takers:
            return
        with self._lock:
            known = {image: text for image, text in captions.items() if image in references}
            self._written.update({image: (references[image], text) for image, text in known.items()})
            if self._thread is None and len(self._written) >= _TAKEN_AT_ONCE:
                # a daemon, so that an evaluation that breaks off can end
                self._thread = threading.Thread(target=self._pass_on, daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Until the metrics have what they were given."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _pass_on(self) -> None:
        """Gives what is written to the metrics, until it is little."""
        while True:
            with self._lock:
                if not self._takers or len(self._written) < _TAKEN_AT_ONCE:
                    self._thread = None
                    return
                written, self._written = self._written, {}
            try:
                references = {image: own for image, (own, _) in written.items()}
                captions = {image: text for image, (_, text) in written.items()}
                *tokens, _ = tokenize_captions(references, captions)
                for metric in self._takers:
                    metric.take(*tokens)
            except Exception:  # it comes again, and is told, where all of it is scored
                logger.debug("captions are not scored while others are written", exc_info=True)
                self._takers = []


def score_captions(
    references: Mapping[ImageId, Sequence[str]],
    candidates: Mapping[ImageId, str],
    metrics: Sequence[str] | Mapping[str, Any] | BegunMetrics | None = None,
) -> Scores:
    """Scores one caption per image against that image's references.

    Both are tokenised once, by pycocoevalcap's Java program where Java runs and by our equal one elsewhere. A
    metric that cannot run on this machine is left out with the reason. CIDEr's document frequencies come from
    exactly these images.

    Args:
        references: id -> human captions, at least one.
        candidates: id -> generated caption, for the same ids. May be empty text, may hold any character.
        metrics: registered names, metrics by name, or metrics that have begun; None for BLEU, METEOR,
            ROUGE-L, CIDEr and SPICE.

    Raises:
        DataError: ids of references and candidates differ, there is nothing to score, or something is not
            text.
        RegistryError: a metric is not registered.
    """
    begun = metrics if isinstance(metrics, BegunMetrics) else BegunMetrics(metrics)
    _check(references, candidates)
    begun.wait()
    parts = begun.metrics
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
