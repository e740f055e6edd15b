"""What came of the runs, as plain values: the content of ``report.json``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from evlgen.comparison.plan import Configuration, Settings, differing_keys
from evlgen.comparison.stages import Run, StageRun
from evlgen.config.machine import machine, without_folders
from evlgen.report.metrics import image_use_of, metric_names, metrics_of
from evlgen.runners.log_fields import IMAGE_USE

_ALIKE = 3  # numbers of trained weights that differ by less than this factor need no note
_SIZES = ("trainable_parameters", "total_parameters", "soft_prompts")
_PEAKS = ("peak_rss_bytes", "peak_gpu_bytes")


def collect(
    runs: Sequence[Run], configurations: Sequence[Configuration], settings: Settings, command: str
) -> dict[str, Any]:
    """The report of all runs as they stand.

    Returns:
        ``configurations``, each with ``label``, ``differs`` (its values of the keys that are not the same
        everywhere), ``runs`` (one for each seed: ``curve``, ``loss``, ``final``, ``seconds``, ...) and their
        ``summary`` (mean and standard deviation over the finished ones); beside them ``metrics``, ``budget``,
        ``seeds``, ``evaluation``, ``command``, ``machine``, ``notes``.
    """
    shown = [
        _configuration(configuration, [run for run in runs if run.configuration is configuration], differs)
        for configuration, differs in zip(configurations, differing_keys(configurations), strict=True)
    ]
    all_runs = [run for configuration in shown for run in configuration["runs"]]
    names = metric_names([point for run in all_runs for point in run["curve"]])
    devices = {d for run in runs for s in run.stages if (d := s.facts().get("device"))}
    return {
        "command": without_folders(command),
        "budget": None if settings.budget is None else str(settings.budget),
        "evaluation": {
            "split": settings.split,
            "samples": settings.samples,
            "every": None if settings.evaluate_every is None else str(settings.evaluate_every),
        },
        "seeds": list(settings.seeds),
        "machine": {**machine(), "devices": sorted(devices)},
        "metrics": names,
        "main_metric": names[0] if names else None,
        "notes": notes(runs),
        "configurations": shown,
    }


def _configuration(
    configuration: Configuration, runs: Sequence[Run], differs: Mapping[str, Any]
) -> dict[str, Any]:
    found = [run_report(run) for run in runs]
    return {
        "name": configuration.name,
        "label": configuration.label,
        "value": configuration.value,
        "files": [without_folders(stage.cfg_path) for stage in configuration.stages],
        "differs": {key: _without_folders(value) for key, value in differs.items()},
        "summary": summary(found),
        "runs": found,
    }


def run_report(run: Run) -> dict[str, Any]:
    """One run: what its stages took together, and its curves over all of them."""
    efforts = [stage.effort() for stage in run.stages]
    seconds, samples, iterations = (sum(values) for values in zip(*efforts, strict=True))
    facts = [stage.facts() for stage in run.stages]
    curve, loss = _curves(run.stages)
    attempts = [stage.attempts() for stage in run.stages]
    is_finished = run.current() is None
    error = run.error
    state = "finished" if is_finished else "failed" if error else run.state
    return {
        "seed": run.seed,
        "status": state,
        "error": without_folders(error) if error and not is_finished else None,
        "seconds": seconds,
        "samples": samples,
        "iterations": iterations,
        "stage_seconds": [effort[0] for effort in efforts],
        "samples_per_s": samples / seconds if seconds else None,
        "wall_seconds": sum(a["wall_seconds"] for a in attempts),
        "starts": sum(a["starts"] for a in attempts),
        **{key: facts[-1].get(key) for key in _SIZES},
        **{key: max((f[key] for f in facts if f.get(key)), default=None) for key in _PEAKS},
        "data": facts[-1].get("data"),
        "final": metrics_of(curve[-1]) if curve and is_finished else {},
        "image_use": image_use_of(curve[-1]) if curve and is_finished else {},
        "curve": curve,
        "loss": loss,
        "captions": [{k: v for k, v in row.items() if k != "picture"} for row in run.stages[-1].shown()],
    }


def _curves(stages: Sequence[StageRun]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Evaluations and losses by seconds, samples and iterations since the first stage began."""
    curve, loss = [], []
    before: tuple[float, ...] = (0.0, 0, 0)
    for number, stage in enumerate(stages, start=1):
        for record in stage.evaluations():
            curve.append(
                {
                    **_at(record, before, number),
                    "slot": record["label"],
                    **metrics_of(record),
                    **image_use_of(record),
                }
            )
        for record in stage.steps():
            loss.append({**_at(record, before, number), "loss": record["loss"]})
        before = tuple(a + b for a, b in zip(before, stage.effort(), strict=True))
    return curve, loss


def _at(record: Mapping[str, Any], before: Sequence[float], stage: int) -> dict[str, Any]:
    return {
        "stage": stage,
        "seconds": before[0] + record["trained_seconds"],
        "samples": before[1] + record["trained_samples"],
        "iteration": before[2] + record["iteration"],
    }


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of each number over the finished runs; ``finished`` and ``all`` count."""
    finished = [run for run in runs if run["status"] == "finished"]
    numbers = ("seconds", "samples", "iterations", "samples_per_s", "wall_seconds", *_PEAKS)
    out: dict[str, Any] = {"finished": len(finished), "all": len(runs)}
    out |= {key: next((run[key] for run in runs if run[key] is not None), None) for key in _SIZES}
    out |= {key: mean_and_deviation([run[key] for run in finished]) for key in numbers}
    names = metric_names([run["final"] for run in finished])
    out["final"] = {name: mean_and_deviation([run["final"].get(name) for run in finished]) for name in names}
    use = {
        name: mean_and_deviation([run.get("image_use", {}).get(name) for run in finished])
        for name in IMAGE_USE
    }
    out["image_use"] = {name: value for name, value in use.items() if value is not None}
    return out


def mean_and_deviation(values: Sequence[float | None]) -> dict[str, float | None] | None:
    """``mean`` and ``std`` (of a sample: over n - 1; None of a single value), or None of nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": statistics.fmean(known), "std": statistics.stdev(known) if len(known) > 1 else None}


def mean_curve(runs: Sequence[Mapping[str, Any]], metric: str, over: str) -> list[dict[str, float]]:
    """A metric's curve, averaged over seeds at each evaluation that all of them have reached.

    Args:
        over: ``seconds`` or ``samples``.

    Returns:
        points of ``x``, ``mean``, ``low`` and ``high``.
    """
    curves = [
        {(p["stage"], p["slot"]): p for p in run["curve"] if metric in p} for run in runs if run["curve"]
    ]
    curves = [curve for curve in curves if curve]
    points = []
    for slot in curves[0] if curves else ():
        if all(slot in curve for curve in curves):
            at = [curve[slot] for curve in curves]
            values = [p[metric] for p in at]
            x = statistics.fmean(p[over] for p in at)
            mean, low, high = statistics.fmean(values), min(values), max(values)
            points.append({"x": x, "mean": mean, "low": low, "high": high})
    return points


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader must know to read the numbers rightly."""
    found = []
    data = {str(sorted(d.items())) for run in runs for s in run.stages[-1:] if (d := s.facts().get("data"))}
    if len(data) > 1:
        found.append(
            "The runs did not see the same batches: number of samples, batch size or ratios of their data "
            "differ."
        )
    sizes = [n for run in runs if (n := run.stages[-1].facts().get("trainable_parameters"))]
    if sizes and max(sizes) > _ALIKE * min(sizes):
        found.append(
            f"The sizes differ: the largest trains {max(sizes) / min(sizes):.0f} times as many weights as "
            "the smallest. A connector that is only named has its own default sizes; to compare kinds, give "
            "sizes too, such as --grid 'model.connector={name: qformer, num_layers: 3, hidden_size: 128, "
            "num_attention_heads: 4}'."
        )
    stages = [stage for run in runs for stage in run.stages]
    if any(stage.stage.config["run"]["cache_vision"] for stage in stages):
        found.append(
            "run.cache_vision: the first run that needs an encoder's tokens encodes the images, as part of "
            "its wall-clock time, not of its training time; the others read them."
        )
    short = {
        run.configuration.label: (warm_up, iterations)
        for run in runs
        for stage in run.stages
        if stage.is_done()
        and (warm_up := stage.stage.config["run"]["warmup_steps"]) > (iterations := stage.effort()[2]) / 2
    }
    for label, (warm_up, iterations) in short.items():
        found.append(
            f"{label}: run.warmup_steps is {warm_up}, much of the {iterations} iterations that the "
            "budget was enough for. Lower it for so small a budget."
        )
    return found


def _without_folders(value: Any) -> Any:
    return without_folders(value) if isinstance(value, str) else value
