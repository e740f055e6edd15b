"""BLEU, ROUGE-L and CIDEr by pycocoevalcap: the metrics that need no Java."""

from __future__ import annotations

import logging

from evlgen.common.registry import registry
from evlgen.tasks.metrics.base import CaptionMetric, MetricResult, Tokenised

logger = logging.getLogger(__name__)


@registry.register_metric("bleu")
class Bleu(CaptionMetric):
    """BLEU-1 to BLEU-4 over the corpus, with the closest reference length (Papineni et al., ACL 2002)."""

    names = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4")

    def compute(self, references: Tokenised, candidates: Tokenised) -> MetricResult:
        from pycocoevalcap.bleu.bleu import Bleu as Scorer

        values, per_image = Scorer(4).compute_score(references, candidates, verbose=0)
        return MetricResult(
            {name: float(value) for name, value in zip(self.names, values, strict=True)},
            {
                name: dict(zip(candidates, map(float, scores), strict=True))
                for name, scores in zip(self.names, per_image, strict=True)
            },
        )


@registry.register_metric("rouge_l")
class RougeL(CaptionMetric):
    """ROUGE-L, the longest common subsequence, mean over images (Lin, 2004)."""

    names = ("ROUGE_L",)

    def compute(self, references: Tokenised, candidates: Tokenised) -> MetricResult:
        from pycocoevalcap.rouge.rouge import Rouge as Scorer

        value, per_image = Scorer().compute_score(references, candidates)
        return MetricResult(
            {"ROUGE_L": float(value)}, {"ROUGE_L": dict(zip(candidates, map(float, per_image), strict=True))}
        )


@registry.register_metric("cider")
class Cider(CaptionMetric):
    """CIDEr-D, mean over images, 10 at most (Vedantam et al., CVPR 2015).

    Document frequencies are those of the references given, so the value depends on the set of images; that of
    a single image is 0.
    """

    names = ("CIDEr",)

    def compute(self, references: Tokenised, candidates: Tokenised) -> MetricResult:
        from pycocoevalcap.cider.cider import Cider as Scorer

        if len(candidates) == 1:
            logger.warning(
                "CIDEr of a single image is always 0: every word occurs in every image. Score more images."
            )
        if not any(line for lines in references.values() for line in lines):
            # pycocoevalcap takes the maximum of no document frequency here.
            return MetricResult({"CIDEr": 0.0}, {"CIDEr": dict.fromkeys(candidates, 0.0)})
        value, per_image = Scorer().compute_score(references, candidates)
        return MetricResult(
            {"CIDEr": float(value)}, {"CIDEr": dict(zip(candidates, map(float, per_image), strict=True))}
        )
