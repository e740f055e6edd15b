"""Which numbers of an evaluation are its metrics, and which of them come first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evlgen.runners.log_fields import IMAGE_USE

_NO_METRICS = (
    *("time", "type", "split", "label", "iteration", "samples", "skipped", "seconds"),
    *("trained_seconds", "trained_samples", "stage", "slot"),
    *IMAGE_USE,
)
#: In the order in which they are preferred for plots.
PREFERRED = ("CIDEr", "true_captions", "accuracy", "agg_metrics", "SPICE", "METEOR", "ROUGE_L", "Bleu_4")
_SAID_BY_OTHERS = ("Bleu_1", "Bleu_2", "Bleu_3")


def metrics_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line of a run's log, the preferred ones first."""
    found = {
        name: float(value)
        for name, value in record.items()
        if name not in _NO_METRICS and isinstance(value, int | float) and not isinstance(value, bool)
    }
    return {name: found[name] for name in _ordered(found)}


def image_use_of(record: Mapping[str, Any]) -> dict[str, float]:
    """How much the images were used at an evaluation, by a line of a run's log; empty where it was not
    measured."""
    return {name: float(record[name]) for name in IMAGE_USE if name in record}


def metric_names(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """All metrics of some evaluations."""
    return _ordered({name for record in evaluations for name in metrics_of(record)})


def main_metric(evaluations: Sequence[Mapping[str, Any]]) -> str | None:
    """The metric that is shown where there is room for one."""
    return next(iter(metric_names(evaluations[-1:])), None)


def table_metrics(names: Sequence[str]) -> list[str]:
    """Those that a table shows: ``agg_metrics`` is CIDEr and BLEU-4 again."""
    is_caption = "CIDEr" in names
    left_out = (*_SAID_BY_OTHERS, "agg_metrics") if is_caption else _SAID_BY_OTHERS
    return [name for name in names if name not in left_out]


def shown_value(value: float) -> str:
    """A metric as tables show it."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _ordered(names: Any) -> list[str]:
    return sorted(names, key=lambda n: (PREFERRED.index(n) if n in PREFERRED else len(PREFERRED), n))
