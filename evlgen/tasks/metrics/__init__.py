"""Caption metrics. Importing this package registers BLEU, METEOR, ROUGE-L, CIDEr and SPICE; it is cheap,
pycocoevalcap is imported when a score is computed.

A metric of your own::

    @registry.register_metric("length")
    class Length(CaptionMetric):
        names = ("Length",)

        def compute(self, references, candidates):
            return {"Length": sum(len(line.split()) for (line,) in candidates.values()) / len(candidates)}
"""

from __future__ import annotations

from evlgen.tasks.metrics import meteor, ngram_metrics, spice  # noqa: F401  (they register themselves)
from evlgen.tasks.metrics.base import CaptionMetric, ImageId, MetricResult, MetricUnavailable
from evlgen.tasks.metrics.captioning import DEFAULT_METRICS, BegunMetrics, Scores, score_captions

__all__ = [
    "DEFAULT_METRICS",
    "BegunMetrics",
    "CaptionMetric",
    "ImageId",
    "MetricResult",
    "MetricUnavailable",
    "Scores",
    "score_captions",
]
