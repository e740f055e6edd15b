"""Means, curves, tables and the page, from numbers that can be reckoned by hand."""

from __future__ import annotations

import math
import re
from html import escape

import pytest

from evlgen.common.safe_text import printable
from evlgen.comparison.html_report import page
from evlgen.comparison.plots import image_use_figure, loss_figure, quality_figure, sweep_figure
from evlgen.comparison.results import mean_and_deviation, mean_curve, summary
from evlgen.comparison.table import as_text, best_rows, cost_table, image_use_table, quality_table
from evlgen.report.metrics import image_use_of, metric_names, metrics_of, table_metrics
from evlgen.report.plots import as_png


def run_of(seed: int, values: list[float], status: str = "finished") -> dict:
    """A run that was evaluated after 10, 20, .. seconds; seed 2 was a second slower."""
    slow = 1.0 if seed == 2 else 0.0
    curve = [
        {"stage": 1, "slot": f"epoch{i}", "seconds": 10 * i + slow, "samples": 100 * i, "CIDEr": value}
        for i, value in enumerate(values, start=1)
    ]
    loss = [{"stage": 1, "seconds": x, "samples": 10 * x, "loss": 3.0 / x} for x in range(1, 30)]
    return {
        **{
            "seed": seed,
            "status": status,
            "error": None if status == "finished" else "RuntimeError: <b>no</b>",
        },
        **{
            "seconds": 10.0 * len(values) + slow,
            "samples": 100 * len(values),
            "iterations": 10 * len(values),
        },
        **{"stage_seconds": [1.0], "samples_per_s": 10.0, "wall_seconds": 99.0, "starts": 1},
        **{"trainable_parameters": 1_500_000, "total_parameters": 188_000_000, "soft_prompts": 29},
        **{"peak_rss_bytes": 2_000_000_000, "peak_gpu_bytes": None, "data": {}},
        "final": {"CIDEr": values[-1]} if status == "finished" else {},
        **{"curve": curve, "loss": loss, "captions": []},
    }


def report_of(*configurations: tuple[str, list[dict]]) -> dict:
    return {
        **{
            "command": "python -m evlgen compare",
            "budget": "20 s",
            "seeds": [1, 2],
            "notes": ["a note & more"],
        },
        "evaluation": {"split": "val", "samples": 8, "every": "10 s"},
        "machine": {
            **{"cpu": "a processor", "cores": 2, "memory_bytes": None, "python": "3", "torch": "2"},
            **{"system": "Linux", "devices": ["cpu"]},
        },
        **{"metrics": ["CIDEr"], "main_metric": "CIDEr"},
        "configurations": [
            {
                **{"name": label, "label": label, "value": str(4 * i), "files": ["a.yaml"]},
                **{"differs": {"model.connector.r": i}, "summary": summary(runs), "runs": runs},
            }
            for i, (label, runs) in enumerate(configurations)
        ],
    }


@pytest.fixture
def report() -> dict:
    return report_of(
        ("first", [run_of(1, [0.2, 0.6]), run_of(2, [0.4, 1.0])]),
        ("second <i>", [run_of(1, [0.1, 0.7]), run_of(2, [0.3], "failed")]),
    )


def test_deviation_is_that_of_a_sample_and_unknown_for_one_value():
    assert mean_and_deviation([0.6, 1.0]) == {"mean": 0.8, "std": pytest.approx(math.sqrt(0.08))}
    assert mean_and_deviation([None, 3.0]) == {"mean": 3.0, "std": None}
    assert mean_and_deviation([None]) is None


def test_summaries_are_of_the_runs_that_finished():
    found = summary([run_of(1, [0.1, 0.7]), run_of(2, [0.3], "failed")])
    assert (found["finished"], found["all"]) == (1, 2)
    assert found["final"] == {"CIDEr": {"mean": 0.7, "std": None}}
    assert found["seconds"] == {"mean": 20.0, "std": None}
    nothing = summary([run_of(1, [0.1], "failed")])
    assert nothing["final"] == {} and nothing["seconds"] is None
    assert nothing["trainable_parameters"] == 1_500_000


def test_a_curve_is_the_mean_at_evaluations_that_every_seed_has_reached():
    runs = [run_of(1, [0.2, 0.6, 0.9]), run_of(2, [0.4, 1.0])]
    assert mean_curve(runs, "CIDEr", "seconds") == [
        {"x": 10.5, "mean": pytest.approx(0.3), "low": 0.2, "high": 0.4},
        {"x": 20.5, "mean": pytest.approx(0.8), "low": 0.6, "high": 1.0},
    ]
    assert [p["x"] for p in mean_curve(runs, "CIDEr", "samples")] == [100, 200]
    assert mean_curve(runs, "SPICE", "seconds") == []


def test_of_a_log_line_only_metrics_are_metrics_the_preferred_ones_first():
    record = {"type": "evaluation", "seconds": 1.0, "samples": 3, "trained_seconds": 2.0, "iteration": 4}
    assert metrics_of({**record, "Bleu_4": 0.1, "mine": 1, "CIDEr": 2.0, "split": "val", "ok": True}) == {
        "CIDEr": 2.0,
        "Bleu_4": 0.1,
        "mine": 1.0,
    }
    names = metric_names([{"Bleu_1": 1.0, "agg_metrics": 1.0}, {"CIDEr": 1.0, "Bleu_4": 0.5}])
    assert names == ["CIDEr", "agg_metrics", "Bleu_4", "Bleu_1"]
    assert table_metrics(names) == ["CIDEr", "Bleu_4"]
    assert table_metrics(["accuracy", "agg_metrics"]) == ["accuracy", "agg_metrics"]


def test_tables_have_means_and_deviations_and_say_what_failed(report):
    assert quality_table(report) == (
        ["configuration", "CIDEr", "status"],
        [["first", "0.800 ± 0.283", "finished"], ["second <i>", "0.700", "1 finished, 1 failed"]],
    )
    titles, rows = cost_table(report)
    assert dict(zip(titles, rows[0], strict=True)) == {
        "configuration": "first",
        "trained / all parameters, M": "1.5 / 188",
        "soft prompts": "29",
        "training, s": "20.5 ± 0.7",
        "samples": "200 ± 0",
        "samples/s": "10.0 ± 0.0",
        "peak memory, GB": "2.00 ± 0.00",
        "wall-clock, s": "99.0 ± 0.0",
    }
    assert best_rows(report) == {"CIDEr": 0}
    assert "second <i>, seed 2: RuntimeError: <b>no</b>" in as_text(report)


def test_the_page_escapes_what_others_wrote(report):
    text = page(report, [])
    assert "second &lt;i&gt;" in text and "<i>" not in text and "<b>no" not in text
    assert "a note &amp; more" in text


@pytest.mark.parametrize("text", ["$\\frac$", "_$5 and $10", "a\x1b[31m\n<b>\ud800"])
def test_text_of_users_is_never_markup(text):
    failed = {**run_of(2, [0.1]), "error": f"{text}\x1b", "status": "failed"}
    hostile = report_of((text, [run_of(1, [0.2, 0.7]), failed]), ("other", [run_of(1, [0.1, 0.7])]))
    hostile["configurations"][0]["value"] = text
    hostile["configurations"][1]["value"] = "1"
    for figure in (quality_figure(hostile), loss_figure(hostile)):
        assert as_png(figure)[:4] == b"\x89PNG"
        assert figure.legends[0].get_texts()[0].get_text() == printable(text)
    axis = sweep_figure(hostile, text).axes[0]
    assert axis.get_xlabel() == axis.get_xticklabels()[0].get_text() == printable(text)
    html, shown = page(hostile, [], swept=text), as_text(hostile)
    assert escape(printable(text)) in html and "<b>" not in html
    assert printable(text) in shown and not re.search("[\x1b\ud800]", html + shown)


def test_figures_are_drawn_of_whatever_is_there(report):
    empty = report_of(("nothing", [{**run_of(1, [0.1], "failed"), "curve": [], "loss": []}]))
    assert loss_figure(empty) is None and sweep_figure(empty, "r") is None
    assert quality_figure({**empty, "metrics": []}) is None
    page({**empty, "metrics": []}, [])
    for figure in (quality_figure(report), loss_figure(report), sweep_figure(report, "model.connector.r")):
        assert as_png(figure)[:4] == b"\x89PNG"


def test_many_configurations_all_look_different(report):
    from evlgen.report.plots import look

    looks = [look(number) for number in range(21)]
    assert len({(colour, dashes) for colour, _, dashes in looks}) == 21
    wide = report_of(*((f"configuration {i} with a long name", [run_of(1, [i, i + 1])]) for i in range(12)))
    figure = quality_figure(wide)
    assert len(figure.legends[0].get_texts()) == 12


def test_a_sweep_shows_training_time_and_under_a_budget_of_time_that_of_a_sample(report):
    axes = sweep_figure(report, "model.connector.r").axes
    assert [axis.get_ylabel() for axis in axes] == ["CIDEr", "training time per sample, ms"]
    (line,) = axes[1].get_lines()
    assert list(line.get_xdata()) == [0.0, 4.0] and list(line.get_ydata()) == [100.0, 100.0]
    for budget in (None, "20 iterations"):
        axis = sweep_figure({**report, "budget": budget}, "model.connector.r").axes[1]
        assert axis.get_ylabel() == "training time, s"
        assert list(axis.get_lines()[0].get_ydata()) == [20.5, 20.0]


def with_image_use(run: dict, worths: list[float]) -> dict:
    """The same run, in which it was measured what the images are worth."""
    uses = [
        {"eval_loss": 3.0, "exchanged_loss": 3.0 + w, "image_worth": w, "common_fraction": 0.9}
        for w in worths
    ]
    curve = [{**point, **use} for point, use in zip(run["curve"], uses, strict=True)]
    return {**run, "curve": curve, "image_use": image_use_of(curve[-1]) if run["final"] else {}}


def test_what_the_image_is_worth_to_each_configuration_is_shown(report):
    assert image_use_table(report) is None and image_use_figure(report) is None
    assert "Use of the images" not in page(report, [])
    runs = [
        with_image_use(run_of(1, [0.2, 0.6]), [0.1, 0.3]),
        with_image_use(run_of(2, [0.4, 1.0]), [0.1, 0.5]),
    ]
    report = report_of(("measured", runs), ("not measured", [run_of(1, [0.1, 0.7])]))
    titles, rows = image_use_table(report)
    assert titles[1:3] == ["worth of the image, nats per token", "loss"]
    assert rows[0][1:3] == ["0.400 ± 0.141", "3.000 ± 0.000"] and set(rows[1][1:]) == {"–"}
    assert "worth of the image" in as_text(report)
    assert "Use of the images" in page(report, [])
    assert as_png(image_use_figure(report))[:4] == b"\x89PNG"
    assert metrics_of(runs[0]["curve"][-1]).keys() == {"CIDEr"}
