"""The table of a report: the same rows for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evlgen.comparison.metrics import shown_value, table_metrics

Report = Mapping[str, Any]


def columns(report: Report) -> list[str]:
    """The titles, with units."""
    gpu = any(c["summary"]["peak_gpu_bytes"] for c in report["configurations"])
    return [
        "configuration",
        *table_metrics(report["metrics"]),
        "trained parameters, M",
        "all parameters, M",
        "soft prompts",
        "training, s",
        "samples",
        "samples/s",
        "peak memory, GB",
        *(["peak GPU memory, GB"] if gpu else []),
        "wall-clock, s",
        "status",
    ]


def rows(report: Report) -> list[list[str]]:
    """One row for each configuration: means, with the standard deviation where there are several seeds."""
    gpu = "peak GPU memory, GB" in columns(report)
    return [
        [
            configuration["label"],
            *(
                _spread(configuration["summary"]["final"].get(name), shown_value)
                for name in table_metrics(report["metrics"])
            ),
            *_numbers(configuration["summary"], gpu),
            status(configuration),
        ]
        for configuration in report["configurations"]
    ]


def _numbers(summary: Mapping[str, Any], gpu: bool) -> list[str]:
    def seconds(x: float) -> str:
        return f"{x:,.1f}" if x < 100 else f"{x:,.0f}"

    def gigabytes(x: float) -> str:
        return f"{x / 1e9:.2f}"

    return [
        _millions(summary["trainable_parameters"]),
        _millions(summary["total_parameters"]),
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
    """The table for a terminal, without the columns that are the same in every row."""
    titles, content = columns(report), rows(report)
    wanted = [
        i
        for i, title in enumerate(titles)
        if i == 0 or title == "status" or title in report["metrics"] or len({row[i] for row in content}) > 1
    ]
    lines = [[row[i] for i in wanted] for row in [titles, *content]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(wanted))]
    shown = [
        "  ".join(
            f"{cell:<{w}}" if i in (0, len(wanted) - 1) else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([shown[0], "  ".join("-" * w for w in widths), *shown[1:], *errors(report)])


def errors(report: Report) -> list[str]:
    """A line for each run that failed."""
    return [
        f"{configuration['label']}, seed {run['seed']}: {run['error']}"
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
