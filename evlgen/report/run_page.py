"""The page of a run, or of several beside each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from matplotlib.figure import Figure

from evlgen.common.safe_text import printable
from evlgen.config.machine import without_folders
from evlgen.config.yaml_io import dump_yaml
from evlgen.report.metrics import shown_value, table_metrics
from evlgen.report.page import render, yaml_value
from evlgen.report.plots import as_data_address, grid, log_scale, look, smoothed, styled, thin
from evlgen.report.run_folder import RunFolder

_MOST_EVALUATIONS = 6  # columns of captions over training
_IMAGE_USE = {
    "image_worth": "worth of the image, nats per token",
    "common_fraction": "common part of the prompts",
}
_HIDDEN = ("run.output_dir", "env.cache_root", "model.checkpoint")  # folders of a machine


def run_page(runs: Sequence[RunFolder]) -> str:
    """The whole page, as text."""
    names = run_names(runs)
    several = len(runs) > 1
    metrics = _plotted(runs)
    legend = names if several else []
    figures = {
        "loss": _training_figure(runs, legend),
        "scores": _validation_figure(runs, legend, {name: name for name in metrics}),
        "image_use": _validation_figure(
            runs,
            legend,
            _IMAGE_USE,
        ),
    }
    return render(
        "run.html",
        title="Runs" if several else f"Run {names[0]}",
        lead="; ".join(_lead(run, name, several) for run, name in zip(runs, names, strict=True)),
        notes=[note for run, name in zip(runs, names, strict=True) for note in _notes(run, name, several)],
        names=names,
        several=several,
        results=_results(runs, names),
        swatches={
            "results": [number for number, run in enumerate(runs) for _ in run.evaluations]
            if several
            else [],
            "costs": list(range(len(runs))) if several else [],
        },
        costs=_costs(runs, names),
        figures={name: figure and as_data_address(figure) for name, figure in figures.items()},
        metrics=metrics,
        captions=_captions(runs, names),
        extremes=[part for number, run in enumerate(runs) for part in _extremes(run, names[number], several)],
        skipped=[(names[number], run.skipped_by_cause(), run.anomalies()) for number, run in enumerate(runs)],
        configurations=_configurations(runs),
        full=[(names[number], dump_yaml(_without_folders(run.config))) for number, run in enumerate(runs)],
        machines=[_machine(run) for run in runs],
    )


def run_names(runs: Sequence[RunFolder]) -> list[str]:
    """What the runs are called: by their folder and the one above, as far as it takes to tell them apart."""
    names = [f"{run.path.parent.name}/{run.path.name}" for run in runs]
    if len({run.path.parent.name for run in runs}) == len(runs) > 1:
        names = [run.path.parent.name for run in runs]
    seen: dict[str, int] = {}
    for number, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            names[number] = f"{name} ({seen[name]})"
    return names


def _lead(run: RunFolder, name: str, several: bool) -> str:
    model = run.config.get("model") or {}
    parts = (model.get("vision"), model.get("connector"), model.get("language"))
    shown = " + ".join(str(part["name"]) for part in parts if isinstance(part, Mapping) and part.get("name"))
    data = ", ".join(run.config.get("datasets") or {})
    state = run.facts.get("state", "")
    last = max((r["iteration"] for r in run.steps), default=0)
    reached = f"{last:,} iterations" + (f", {state}" if state else "")
    shown = without_folders(shown)
    text = f"{shown or model.get('arch', 'a model')} on {data or 'no data'}: {reached}"
    return f"{name}: {text}" if several else text


def _notes(run: RunFolder, name: str, several: bool) -> list[str]:
    prefix = f"{name}: " if several else ""
    found = []
    if not run.records:
        found.append(f"{prefix}there is no log.jsonl, or nothing in it yet.")
    counts = run.anomalies()
    if counts["not_finite"]:
        found.append(f"{prefix}{counts['not_finite']} steps were left out: loss or gradient not finite.")
    if counts["spikes"]:
        found.append(f"{prefix}the loss jumped {counts['spikes']} times; spikes.jsonl lists the samples.")
    return found


# ---- figures ----


def _plotted(runs: Sequence[RunFolder]) -> list[str]:
    """The metrics that have curves."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    return table_metrics(names)[:4]


def _training_figure(runs: Sequence[RunFolder], names: Sequence[str]) -> Figure | None:
    """Loss, learning rate, gradient norm and speed against iterations."""
    if not any(len(run.steps) > 1 for run in runs):
        return None
    panels = {
        "loss": "training loss",
        "grad_norm": "gradient norm",
        "lr": "learning rate",
        "samples_per_s": "samples/s",
    }
    with styled():
        figure, axes = grid(2, 2, names)
        for axis, (name, label) in zip(axes.flat, panels.items(), strict=True):
            lines = [_line(run.steps, name) for run in runs]
            smooth = name in ("loss", "grad_norm", "samples_per_s")
            _draw(axis, lines, label, smoothed if smooth else lambda x, y: (x, y))
            if name in ("loss", "grad_norm"):
                values = [y for line in lines for _, y in line if y > 0]
                if values and max(values) > 20 * min(values):
                    log_scale(axis)
        return figure


def _validation_figure(
    runs: Sequence[RunFolder], names: Sequence[str], panels: Mapping[str, str]
) -> Figure | None:
    """Numbers of validations against iterations, of each run's first split; None where there are none."""
    points = [run.points(run.splits[0]) if run.splits else [] for run in runs]
    panels = {k: v for k, v in panels.items() if any(_line(of_run, k) for of_run in points)}
    if not panels or max(map(len, points)) < 2:
        return None
    columns = 2 if len(panels) > 1 else 1
    with styled():
        figure, axes = grid(-(-len(panels) // columns), columns, names)
        for axis in list(axes.flat)[len(panels) :]:
            axis.set_axis_off()
        for axis, (name, label) in zip(axes.flat, panels.items(), strict=False):
            lines = [_line(of_run, name) for of_run in points]
            _draw(axis, lines, label, lambda x, y: (x, y), marked=True)
        return figure


def _line(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """A number of records by their iteration."""
    return [(r["iteration"], r[name]) for r in records if _is_finite(r.get(name))]


def _draw(
    axis: Any,
    lines: Sequence[Sequence[tuple[float, float]]],
    label: str,
    shape: Callable[[list[float], list[float]], tuple[list[float], list[float]]],
    marked: bool = False,
) -> None:
    for number, line in enumerate(lines):
        if not line:
            continue
        colour, marker, dashes = look(number)
        x, y = shape([x for x, _ in line], [y for _, y in line])
        axis.plot(x, y, dashes, color=colour, lw=1.8, ms=5, marker=marker if marked else None)
    axis.set_xlabel("iteration")
    axis.set_ylabel(printable(label, 60))
    axis.set_xlim(left=0)
    axis.margins(y=0.08)
    thin(axis, whole=True)


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---- tables ----


def _results(runs: Sequence[RunFolder], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows: of each run and split the latest evaluation, and the best validation."""
    metrics = table_metrics(list(dict.fromkeys(name for run in runs for name in run.metrics)))
    rows = []
    for name, run in zip(names, runs, strict=True):
        for record in run.evaluations:
            what = ", ".join(filter(None, (record["split"], record["label"])))
            use = record.get("image_worth")
            rows.append(
                [
                    name,
                    what,
                    *(shown_value(record[m]) if _is_finite(record.get(m)) else "–" for m in metrics),
                    f"{use:.3f}" if _is_finite(use) else "–",
                    f"{record.get('samples', 0):,}",
                    f"{record.get('skipped', 0):,}",
                ]
            )
    titles = ["run", "split", *metrics, "worth of the image", "samples", "skipped"]
    return titles, rows


def _costs(runs: Sequence[RunFolder], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    titles = ["run", "trained / all parameters, M", "iterations", "samples", "training", "wall-clock"]
    titles += ["starts", "peak memory, GB", "peak GPU memory, GB"]
    rows = []
    for name, run in zip(names, runs, strict=True):
        timed = [r for r in run.records if "trained_seconds" in r]
        last = max(timed, key=lambda r: r["trained_seconds"], default={})
        facts = run.facts
        sizes = [facts.get(key) for key in ("trainable_parameters", "total_parameters")]
        rows.append(
            [
                name,
                " / ".join("–" if size is None else f"{size / 1e6:,.3g}" for size in sizes),
                f"{last.get('iteration') or 0:,}",
                f"{last.get('trained_samples', 0):,}",
                duration(last.get("trained_seconds")),
                duration(facts.get("wall_seconds")),
                str(facts.get("starts", "–")),
                *(_gigabytes(facts.get(key)) for key in ("peak_rss_bytes", "peak_gpu_bytes")),
            ]
        )
    return titles, rows


def duration(seconds: float | None) -> str:
    """``1 h 02 min``, ``3 min 04 s``, ``5.6 s``."""
    if not _is_finite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _gigabytes(size: int | None) -> str:
    return "–" if not size else f"{size / 1e9:.2f}"


def _machine(run: RunFolder) -> list[tuple[str, str]]:
    machine = run.machine
    pairs = [
        ("device", machine.get("device")),
        ("processes", machine.get("processes")),
        ("processor", machine.get("cpu") and f"{machine['cpu']}, {machine.get('cores')} cores"),
        ("memory", machine.get("memory_bytes") and f"{machine['memory_bytes'] / 1e9:.0f} GB"),
        ("software", machine.get("torch") and _software(machine)),
    ]
    return [(name, str(value)) for name, value in pairs if value]


def _software(machine: Mapping[str, Any]) -> str:
    names = {"evlgen": "evlgen", "torch": "PyTorch", "python": "Python"}
    versions = [f"{name} {machine[key]}" for key, name in names.items() if machine.get(key)]
    return ", ".join([*versions, str(machine.get("system", ""))])


# ---- samples ----


def _captions(runs: Sequence[RunFolder], names: Sequence[str]) -> list[dict[str, Any]]:
    """For each sample what was written about it over training: of several runs, at their end."""
    entries: dict[str, dict[str, Any]] = {}
    for number, run in enumerate(runs):
        of_split = [line for line in run.samples if line.get("label")]
        of_split = [line for line in of_split if line["split"] == of_split[0]["split"]] or run.samples[:1]
        shown = of_split[-1:] if len(runs) > 1 else _spread(of_split, _MOST_EVALUATIONS)
        for line in shown:
            at = line["split"] if line["iteration"] is None else f"iteration {line['iteration']}"
            heading = names[number] if len(runs) > 1 else at
            for row in line.get("samples", ()):
                entry = entries.setdefault(str(row["id"]) + row.get("question", ""), _card(row, run))
                entry["texts"].append((number if len(runs) > 1 else None, heading, _written(row)))
    return list(entries.values())


def _spread(lines: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Some of them, the first and the last included."""
    if len(lines) <= count:
        return lines
    return [lines[round(i * (len(lines) - 1) / (count - 1))] for i in range(count)]


def _extremes(run: RunFolder, name: str, several: bool) -> list[dict[str, Any]]:
    """The best and worst samples of a run's last evaluation that has some."""
    line = next((line for line in reversed(run.samples) if line.get("best")), None)
    if line is None:
        return []
    where = f"{name}: " if several else ""
    parts = []
    for kind in ("best", "worst"):
        cards = []
        for row in line[kind]:
            card = _card(row, run)
            card["texts"].append((None, f"{line['metric']} {shown_value(row['score'])}", _written(row)))
            cards.append(card)
        title = f"{where}{kind} of {line['split']}{', ' + line['label'] if line['label'] else ''}"
        parts.append({"title": title, "cards": cards})
    return parts


def _card(row: Mapping[str, Any], run: RunFolder) -> dict[str, Any]:
    image = row.get("image")
    file = _inside(run.path, str(image)) if image else None
    key = f"{row['id']}{': ' + row['question'] if 'question' in row else ''}"
    return {"id": key, "file": file, "reference": row.get("reference", ""), "texts": []}


def _inside(folder: Path, name: str) -> Path | None:
    """A file below a folder: a line of another's file names no others."""
    file = (folder / name).resolve()
    return file if file.is_relative_to(folder) else None


def _written(row: Mapping[str, Any]) -> str:
    return str(row.get("text", ""))


# ---- configuration ----


def _configurations(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """What differs from the defaults: a column for each run, after the default where all have the same."""
    differing = [run.differing() for run in runs]
    keys = [key for key in dict.fromkeys(k for d in differing for k in d) if key not in _HIDDEN]
    columns = [{key: _shown(value) for key, (value, _) in d.items()} for d in differing]
    defaults = {key: _shown(default) for d in differing for key, (_, default) in d.items()}
    for column in columns:  # a run that has the default
        column.update({key: defaults[key] for key in keys if key not in column})
    order = sorted(keys, key=lambda key: len({column[key] for column in columns}) == 1)
    return {"keys": order, "columns": [defaults, *columns]}


def _shown(value: Any) -> str:
    return without_folders(yaml_value(value))


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return without_folders(value) if isinstance(value, str) else value
