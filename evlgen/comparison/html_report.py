"""The report as one HTML file that needs nothing else. Its text is in ``evlgen/report/templates``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evlgen.comparison.plots import (
    image_use_figure,
    loss_figure,
    plotted_metrics,
    quality_figure,
    sweep_figure,
)
from evlgen.comparison.stages import Run
from evlgen.comparison.table import best_rows, cost_table, errors, image_use_table, quality_table
from evlgen.report.page import render
from evlgen.report.plots import as_data_address

Report = Mapping[str, Any]


def page(report: Report, runs: Sequence[Run], swept: str | None = None) -> str:
    """The whole page.

    Args:
        report: see `results.collect`.
        runs: where images are read from.
        swept: the key of a sweep.
    """
    configurations = report["configurations"]
    figures = {
        "sweep": sweep_figure(report, swept) if swept else None,
        "quality": quality_figure(report),
        "image_use": image_use_figure(report),
        "loss": loss_figure(report),
    }
    files = [" + ".join(c["files"]) for c in configurations]
    return render(
        "comparison.html",
        title=f"Sweep of {swept}" if swept else "Comparison",
        lead=_lead(report),
        notes=report["notes"],
        report=report,
        swept=swept,
        figures={name: figure and as_data_address(figure) for name, figure in figures.items()},
        quality=quality_table(report),
        best=best_rows(report),
        cost=cost_table(report),
        image_use=image_use_table(report),
        errors=errors(report),
        keys=list(dict.fromkeys(key for c in configurations for key in c["differs"])),
        files=files if len(set(files)) > 1 else None,
        metrics=plotted_metrics(report),
        has_stages=any(run["stage_seconds"][1:] for c in configurations for run in c["runs"]),
        captions=_captions(report, runs),
        origin=_origin(report),
    )


def _lead(report: Report) -> str:
    budget = f"{report['budget']} of training each" if report["budget"] else "each trained as its file says"
    seeds = ", ".join(map(str, report["seeds"]))
    samples = report["evaluation"]["samples"]
    part = "all samples" if samples is None else f"the same samples ({samples} at most)"
    return (
        f"{len(report['configurations'])} configurations, {budget}; "
        f"{'seed' if len(report['seeds']) == 1 else 'seeds'} {seeds}; "
        f"scored on {part} of '{report['evaluation']['split']}'. Evaluation and start-up are not part of the "
        "training time."
    )


def _captions(report: Report, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each image what each configuration's first run wrote about it."""
    entries: dict[str, dict[str, Any]] = {}
    for number, configuration in enumerate(report["configurations"]):
        of_it = [run.stages[-1] for run in runs if run.configuration.name == configuration["name"]]
        stage = next((stage for stage in of_it if stage.shown()), None)
        if stage is None:
            continue
        for row in stage.shown():
            file = stage.folder / row["picture"] if row.get("picture") else None
            new = {"id": row["id"], "reference": row["reference"], "file": file, "texts": []}
            entry = entries.setdefault(str(row["id"]), new)
            entry["texts"].append((number, configuration["label"], row["text"]))
    return list(entries.values())


def _origin(report: Report) -> list[tuple[str, str]]:
    machine, evaluation = report["machine"], report["evaluation"]
    devices = [d for d in machine["devices"] if d != "cpu"]
    return [
        ("processor", f"{machine['cpu']}, {machine['cores']} cores"),
        *([("GPU", ", ".join(devices))] if devices else []),
        *([("memory", f"{machine['memory_bytes'] / 1e9:.0f} GB")] if machine["memory_bytes"] else []),
        ("software", f"PyTorch {machine['torch']}, Python {machine['python']}, {machine['system']}"),
        ("evaluated every", evaluation["every"] or "as the project files say"),
        ("runs took turns", "yes" if report.get("interleaved") else "no, one after the other"),
    ]
