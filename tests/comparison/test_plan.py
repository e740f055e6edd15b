"""What is planned for the configurations of a comparison, and what tells them apart."""

from __future__ import annotations

import dataclasses

import pytest

from evlgen.common.errors import ConfigError
from evlgen.comparison.compare import PLAN_FILE, new_folder, resumed_folder
from evlgen.comparison.parsing import Amount, Axis
from evlgen.comparison.plan import Settings, differing_keys, plan
from evlgen.config.machine import without_folders

SECONDS = Settings(Amount(30, "s"))


def test_a_grid_is_the_product_of_its_axes_and_differs_in_them_only(tiny_project):
    axes = [Axis.parse("model.connector.r=0,2"), Axis.parse("run.init_lr=1e-3,1e-4")]
    _, found = plan(SECONDS, cfg_path=str(tiny_project()), axes=axes)
    assert [c.label for c in found] == [f"r={r}, init_lr={lr}" for r in (0, 2) for lr in ("1e-3", "1e-4")]
    assert differing_keys(found) == [
        {"model.connector.r": r, "run.init_lr": lr} for r in (0, 2) for lr in (1e-3, 1e-4)
    ]
    assert len({c.name for c in found}) == 4


def test_every_configuration_has_the_same_length_and_evaluation_whatever_its_file_says(
    tiny_project, tmp_path
):
    first = tiny_project(run={"max_iters": 99, "max_epoch": None, "iters_per_inner_epoch": 7})
    second = tmp_path / "second.yaml"
    first.rename(second)
    tiny_project(run={"valid_splits": ["val"], "test_splits": ["test"], "seed": 7, "init_lr": 0.002})
    settings, found = plan(dataclasses.replace(SECONDS, samples=5), [str(first), str(second)])
    assert settings.split == "val" and settings.evaluate_every == Amount(5, "s")
    for configuration in found:
        run = configuration.stages[0].config["run"]
        assert run["runner"] == "runner_timed" and run["max_seconds"] == 30
        assert run["seconds_per_inner_epoch"] == 5 and run["max_iters"] is run["max_epoch"] is None
        assert run["valid_splits"] == ["val"] and run["test_splits"] == [] and run["max_eval_samples"] == 5
    assert [c.label for c in found] == ["project", "second"]


def test_stages_share_the_budget_and_only_the_last_must_be_evaluated(tiny_project):
    first = tiny_project(run={"valid_splits": []})
    entry = f"{first}+{first}"
    settings = Settings(Amount(10, "it"), split="val", stage_split="0.3")
    _, (found,) = plan(settings, [entry])
    runs = [stage.config["run"] for stage in found.stages]
    assert [run["max_iters"] for run in runs] == [3, 7]
    assert [run["valid_splits"] for run in runs] == [[], ["val"]]
    (differs,) = differing_keys([found])
    assert set(differs) == {
        "stage 1: run.max_iters",
        "stage 1: run.valid_splits",
        "stage 1: run.valid_freq",
    } - {
        "stage 1: run.valid_freq"  # the default in both
    }


def test_without_a_budget_the_files_own_length_counts(tiny_project):
    _, found = plan(Settings(None), cfg_path=str(tiny_project()), axes=[Axis.parse("model.connector.r=0,1")])
    assert [c.stages[0].config["run"]["max_epoch"] for c in found] == [2, 2]
    assert [c.value for c in found] == ["0", "1"]


@pytest.mark.parametrize(
    ("settings", "options", "problem"),
    [
        (Settings(Amount(9, "it"), Amount(3, "s")), {}, "in the unit of --budget 9 iterations"),
        (Settings(None, Amount(3, "s")), {}, "without --budget it is given in iterations"),
        (SECONDS, {"axes": ["model.connector.rr=1"]}, "model.connector.rr"),
        (SECONDS, {"axes": ["run.seed=1,2"]}, "are the same configuration"),
        (SECONDS, {"axes": ["model.connector.r=1", "model.connector.r=2"]}, "an axis twice"),
        (SECONDS, {"run": {"runner": "mine"}}, "run.runner is 'mine'"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_runs(tiny_project, settings, options, problem):
    axes = [Axis.parse(text) for text in options.get("axes", ["model.connector.r=0,1"])]
    path = tiny_project(run=options.get("run", {}))
    with pytest.raises(ConfigError, match=problem):
        plan(settings, cfg_path=str(path), axes=axes)


def test_a_folder_is_not_overwritten_and_goes_on_under_the_same_settings_only(tiny_project, tmp_path):
    import json

    from evlgen.common.errors import TrainingError
    from evlgen.comparison.compare import _plan

    path, axes = str(tiny_project()), [Axis.parse("model.connector.r=0,1")]
    planned = plan(SECONDS, cfg_path=path, axes=axes)
    folder = new_folder(str(tmp_path / "out"), "unused")
    (folder / PLAN_FILE).write_text(json.dumps(_plan(*planned)))
    with pytest.raises(TrainingError, match="add --resume"):
        new_folder(str(folder), "unused")
    assert resumed_folder(str(folder), "unused", *planned) == folder
    assert resumed_folder(None, str(tmp_path), *planned) == folder
    more = plan(SECONDS, cfg_path=path, axes=[Axis.parse("model.connector.r=0,1,2")])
    assert resumed_folder(str(folder), "unused", *more) == folder
    other = plan(dataclasses.replace(SECONDS, options=("run.init_lr=5.0",)), cfg_path=path, axes=axes)
    with pytest.raises(ConfigError, match="r=0: run.init_lr was 0.001, is 5.0"):
        resumed_folder(str(folder), "unused", *other)
    longer = plan(Settings(Amount(60, "s")), cfg_path=path, axes=axes)
    with pytest.raises(ConfigError, match="budget was '30 s', is '60 s'"):
        resumed_folder(str(folder), "unused", *longer)
    with pytest.raises(TrainingError, match="no comparison"):
        resumed_folder(str(tmp_path / "nothing"), "unused", *planned)


def test_reports_name_no_folders():
    assert without_folders("a /home/me/x/b.yaml+/tmp/c.yaml: d") == "a …/b.yaml+…/c.yaml: d"
    for text in ("projects/a/b.yaml", "https://a.b/c/d", "1/2", "samples/s", "../a/b", "a / b"):
        assert without_folders(text) == text
    assert without_folders("--options model.checkpoint=/a/b/c '/d/e f'") == (
        "--options model.checkpoint=…/c '…/e f'"
    )
