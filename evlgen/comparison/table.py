"""The table of a report: the same rows for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evlgen.common.safe_text import Lines, message_lines, printable
from evlgen.report.metrics import shown_value, table_metrics

Report = Mapping[str, Any]


def quality_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the final metrics: means, with the standard deviation where there are several
    seeds."""
    names = table_metrics(report["metrics"])
    rows = [
        [c["label"], *(_spread(c["summary"]["final"].get(name), shown_value) for name in names), status(c)]
        for c in report["configurations"]
    ]
    return ["configuration", *names, "status"], rows


_IMAGE_USE = {
    "image_worth": "worth of the image, nats per token",
    "eval_loss": "loss",
    "exchanged_loss": "with exchanged images",
    "train_loss": "in training",
    "common_fraction": "common part of the soft prompts",
}


def image_use_table(report: Report) -> tuple[list[str], list[list[str]]] | None:
    """Titles and rows of how much the images are used at the end; None where that was not measured."""
    found = [c["summary"].get("image_use", {}) for c in report["configurations"]]
    names = [name for name in _IMAGE_USE if any(name in use for use in found)]
    if not names:
        return None
    rows = [
        [c["label"], *(_spread(use.get(name), lambda x: f"{x:.3f}") for name in names)]
        for c, use in zip(report["configurations"], found, strict=True)
    ]
    return ["configuration", *(_IMAGE_USE[name] for name in names)], rows


def cost_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of sizes, times and memory, with units."""
    gpu = any(c["summary"]["peak_gpu_bytes"] for c in report["configurations"])
    titles = [
        *("configuration", "trained / all parameters, M", "soft prompts", "training, s", "samples"),
        *("samples/s", "peak memory, GB", *(["peak GPU memory, GB"] if gpu else []), "wall-clock, s"),
    ]
    return titles, [[c["label"], *_costs(c["summary"], gpu)] for c in report["configurations"]]


def _costs(summary: Mapping[str, Any], gpu: bool) -> list[str]:
    def seconds(x: float) -> str:
        return f"{x:,.1f}" if x < 100 else f"{x:,.0f}"

    def gigabytes(x: float) -> str:
        return f"{x / 1e9:.2f}"

    return [
        f"{_millions(summary['trainable_parameters'])} / {_millions(summary['total_parameters'])}",
        "–" if summary["soft_prompts"] is None else str(summary["soft_prompts"]),
        _spread(summary["seconds"], seconds),
        _spread(summary["samples"], lambda x: f"{x:,.0f}"),
        _spread(summary["samples_per_s"], seconds),
        _spread(summary["peak_rss_bytes"], gigabytes),
        *([_spread(summary["peak_gpu_bytes"], gigabytes)] if gpu else []),
        _spread(summary["wall_seconds"], seconds),
    ]


def status(configuration: Mapping[str, Any]) -> str:
    """``finished``, or what the runs of a configuration are: ``2 finished, 1 failed``."""
    states = [run["status"] for run in configuration["runs"]]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    if len(counts) == 1:
        return states[0]
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def best_rows(report: Report) -> dict[str, int]:
    """metric -> the row with the highest mean, where there is more than one to choose from."""
    out = {}
    for name in table_metrics(report["metrics"]):
        found = {
            i: c["summary"]["final"][name]["mean"]
            for i, c in enumerate(report["configurations"])
            if c["summary"]["final"].get(name)
        }
        if len(found) > 1:
            out[name] = max(found, key=found.__getitem__)
    return out


def as_text(report: Report) -> str:
    """The tables for a terminal, and why runs failed."""
    use = image_use_table(report)
    tables = [quality_table(report), *([] if use is None else [use]), cost_table(report)]
    lines = [line for table in tables for line in ["", *_lines(*table)]]
    return "\n".join([*lines[1:], *_spaced(errors(report))])


def _lines(titles: list[str], rows: list[list[str]]) -> list[str]:
    titles, *rows = ([printable(cell) for cell in row] for row in [titles, *rows])
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    shown = [
        "  ".join(
            f"{cell:<{width}}" if i == 0 or titles[i] == "status" else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [titles, *rows]
    ]
    return [shown[0], "  ".join("-" * width for width in widths), *shown[1:]]


def _spaced(lines: Sequence[str]) -> list[str]:
    return ["", *lines] if lines else []


def errors(report: Report) -> list[Lines]:
    """Why each run failed that did."""
    return [
        message_lines(f"{configuration['label']}, seed {run['seed']}: {run['error']}".splitlines())
        for configuration in report["configurations"]
        for run in configuration["runs"]
        if run["error"]
    ]


def _millions(count: int | None) -> str:
    if count is None:
        return "–"
    return f"{count / 1e6:.3g}" if count < 1e8 else f"{count / 1e6:,.0f}"


def _spread(value: Mapping[str, float | None] | None, show: Any) -> str:
    if value is None:
        return "–"
    return show(value["mean"]) + ("" if value["std"] is None else f" ± {show(value['std'])}")
