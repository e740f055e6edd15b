"""The figures of a report, drawn by matplotlib without a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evlgen.comparison.results import mean_curve
from evlgen.report.plots import COLOURS, GREY, grid, log_scale, look, printable_label, smoothed, styled, thin

Report = Mapping[str, Any]


def plotted_metrics(report: Report) -> list[str]:
    """The one or two metrics that have curves."""
    names = report["metrics"]
    return [n for n in names if n in ("CIDEr", "true_captions", "accuracy")][:2] or list(names[:1])


def quality_figure(report: Report) -> Figure | None:
    """Each metric against seconds of training and against samples seen; None where no run was scored more
    than once."""
    metrics = plotted_metrics(report)
    if not metrics or max(len(run["curve"]) for c in report["configurations"] for run in c["runs"]) < 2:
        return None
    with styled():
        figure, axes = _grid(len(metrics), 2, report)
        for row, metric in zip(axes, metrics, strict=True):
            for axis, over, label in zip(
                row, ("seconds", "samples"), ("training time, s", "samples seen"), strict=True
            ):
                _draw_curves(axis, report, metric, over)
                axis.set_xlabel(label)
                axis.set_ylabel(metric)
        return figure


def image_use_figure(report: Report) -> Figure | None:
    """What the image is worth, and the common part of the soft prompts, against seconds of training; None
    where that was not measured more than once."""
    names = {
        "image_worth": "worth of the image, nats per token",
        "common_fraction": "common part of the prompts",
    }
    runs = [run for c in report["configurations"] for run in c["runs"]]
    if not any(sum("image_worth" in point for point in run["curve"]) > 1 for run in runs):
        return None
    with styled():
        figure, axes = _grid(1, 2, report)
        for axis, (name, label) in zip(axes[0], names.items(), strict=True):
            _draw_curves(axis, report, name, "seconds")
            axis.set_xlabel("training time, s")
            axis.set_ylabel(label)
            axis.axhline(0.0 if name == "image_worth" else 1.0, color=GREY, lw=0.8, ls=":")
        return figure


def loss_figure(report: Report) -> Figure | None:
    """The training loss against seconds and samples; None where nothing was trained."""
    runs = [run for c in report["configurations"] for run in c["runs"]]
    if not any(run["loss"] for run in runs):
        return None
    with styled():
        figure, axes = _grid(1, 2, report)
        for axis, over, label in zip(
            axes[0], ("seconds", "samples"), ("training time, s", "samples seen"), strict=True
        ):
            lowest, highest = math.inf, 0.0
            for number, configuration in enumerate(report["configurations"]):
                for seed, run in enumerate(configuration["runs"]):
                    # of a run in stages the last one: the loss of another stage is another loss
                    last = [p for p in run["loss"] if p["stage"] == len(run["stage_seconds"])]
                    x, y = smoothed([p[over] for p in last], [p["loss"] for p in last])
                    colour, _, dashes = look(number)
                    axis.plot(x, y, dashes, color=colour, lw=1.6, alpha=1.0 if seed == 0 else 0.45)
                    lowest, highest = min([lowest, *y]), max([highest, *y])
            if highest > 5 * max(lowest, 1e-9):
                log_scale(axis)
            axis.set_xlim(left=0)
            axis.set_xlabel(label)
            axis.set_ylabel("training loss")
            thin(axis)
        return figure


def sweep_figure(report: Report, key: str) -> Figure | None:
    """Quality and training time against the values of one key, as figure 3 of the paper; None where no run
    ended."""
    done = [c for c in report["configurations"] if c["summary"]["finished"]]
    if not done:
        return None
    values = [printable_label(c["value"]) for c in done]
    numeric = all(_is_number(value) for value in values)
    x = [float(value) for value in values] if numeric else list(range(len(values)))
    metrics = plotted_metrics(report)
    with styled():
        figure = Figure(figsize=(5.4 * (len(metrics) + 1), 3.9), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(metrics) + 1, squeeze=False)[0]
        for axis, metric in zip(axes, metrics, strict=False):
            _draw_against(axis, x, [c["summary"]["final"].get(metric) for c in done], COLOURS[0], "o")
            axis.set_ylabel(metric)
            axis.set_title("quality at the end", loc="left")
        _draw_time(axes[-1], x, report, done)
        for axis in axes:
            axis.set_xlabel(printable_label(key))
            axis.set_xticks(x, values)
        return figure


def _draw_time(axis: Axes, x: Sequence[float], report: Report, done: Sequence[Mapping[str, Any]]) -> None:
    """Training time; under a budget of time, which is the same for all, that of one sample."""
    if str(report["budget"] or "").endswith(" s"):
        rates = [c["summary"]["samples_per_s"] for c in done]
        times = [r and {"mean": 1e3 / r["mean"], "std": _relative(r, 1e3 / r["mean"])} for r in rates]
        axis.set_ylabel("training time per sample, ms")
    else:
        times = [c["summary"]["seconds"] for c in done]
        axis.set_ylabel("training time, s")
    _draw_against(axis, x, times, COLOURS[1], "s")
    axis.set_ylim(bottom=0)
    axis.set_title("training time (and share of the slowest)", loc="left")
    slowest = max((time["mean"] for time in times if time), default=1.0)
    for place, time in zip(x, times, strict=True):
        if time:
            below = time["mean"] - (time["std"] or 0.0)
            axis.annotate(
                f"{100 * time['mean'] / slowest:.0f} %",
                (place, below),
                xytext=(0, -18),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=GREY,
            )


def _relative(rate: Mapping[str, Any], value: float) -> float | None:
    return None if rate["std"] is None else value * rate["std"] / rate["mean"]


def _draw_against(axis: Axes, x: Sequence[float], points: Sequence[Any], colour: str, marker: str) -> None:
    known = [(place, point) for place, point in zip(x, points, strict=True) if point is not None]
    means = [point["mean"] for _, point in known]
    spread = [point["std"] or 0.0 for _, point in known]
    axis.plot([place for place, _ in known], means, color=colour, marker=marker, lw=2, ms=6)
    if any(spread):
        axis.errorbar(
            [place for place, _ in known], means, spread, fmt="none", ecolor=colour, capsize=4, lw=1.2
        )
    axis.margins(x=0.08, y=0.15)


def _draw_curves(axis: Axes, report: Report, metric: str, over: str) -> None:
    for number, configuration in enumerate(report["configurations"]):
        points = mean_curve(configuration["runs"], metric, over)
        if not points:
            continue
        colour, marker, dashes = look(number)
        x, y = [p["x"] for p in points], [p["mean"] for p in points]
        axis.plot(x, y, dashes, color=colour, marker=marker, lw=2, ms=5)
        if len(configuration["runs"]) > 1:
            low, high = [p["low"] for p in points], [p["high"] for p in points]
            axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    axis.set_xlim(left=0)
    axis.margins(y=0.08)
    thin(axis)


def _grid(rows: int, columns: int, report: Report) -> tuple[Figure, Any]:
    return grid(rows, columns, [c["label"] for c in report["configurations"]])


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
