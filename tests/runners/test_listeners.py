"""Listeners of users, and the trackers."""

from __future__ import annotations

import json
import zipfile

import pytest
from runners.test_runner import train

from evlgen.common.errors import ConfigError
from evlgen.config.config import Config
from evlgen.datasets.shapes_dataset import ShapesCaptionDataset

PLUGIN = """
import json
from evlgen import registry
from evlgen.runners.listener import Listener

@registry.register_listener("notes")
class Notes(Listener):
    def __init__(self, title: str = "none"):
        self.notes = [title]

    def before_training(self, runner):
        self.notes.append(["from", runner.state.iteration])

    def after_step(self, runner, step):
        self.notes.append([step.iterations, step.samples, step.losses["loss"], step.is_finite])

    def after_evaluation(self, runner, evaluation):
        self.notes.append([evaluation.title, len(evaluation.results), sorted(evaluation.metrics)])

    def after_validation(self, runner, is_best):
        self.notes.append([runner.state.epoch, is_best])

    def end(self, runner, is_complete):
        self.notes.append(["end", is_complete])
        (runner.folder / "notes.json").write_text(json.dumps(self.notes))
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin") / "plugin_of_notes.py"
    path.write_text(PLUGIN)
    return path


def test_what_people_wrote_is_asked_for_once_in_an_evaluation(tiny_project, monkeypatch):
    """It may be all captions of a large split."""
    asked, references = [], ShapesCaptionDataset.references
    monkeypatch.setattr(
        ShapesCaptionDataset, "references", lambda dataset: asked.append(dataset) or references(dataset)
    )
    folder, _ = train(tiny_project(run={"max_epoch": 1, "valid_splits": ["val"], "test_splits": ["test"]}))
    assert len((folder / "samples.jsonl").read_text().splitlines()) == len(asked) == 2


def test_a_listener_of_a_plugin_file_is_called_as_the_run_goes_on(tiny_project, plugin):
    path = tiny_project(run={"max_epoch": 1, "accum_grad_iters": 4, "log_freq": 1})
    options = [f"plugins=[{plugin}]", "run.listeners=[heartbeat, {name: notes, title: mine}]"]
    folder, records = train(path, *options)
    notes = json.loads((folder / "notes.json").read_text())
    assert notes[:2] == ["mine", ["from", 0]] and notes[-1] == ["end", True]
    steps, (title, count, metrics), validated = notes[2:4], notes[4], notes[5]
    assert [step[:2] + step[3:] for step in steps] == [[4, 16, True], [2, 8, True]]
    assert [step[2] for step in steps] == [r["loss"] for r in records if r["type"] == "train"]
    assert title == "val epoch1" and count == 6 and "CIDEr" in metrics and validated[0] == 1
    assert json.loads((folder / "heartbeat.json").read_text())["iteration"] == 4
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["state"] == "finished" and facts["starts"] == 1 and facts["peak_rss_bytes"] > 1e8
    (line,) = (json.loads(x) for x in (folder / "samples.jsonl").read_text().splitlines())
    assert line["metric"] == "CIDEr" and len(line["samples"]) == 6 and len(line["best"]) == 3
    assert all((folder / row["image"]).is_file() and row["reference"] for row in line["samples"])
    assert line["best"][0]["score"] >= line["worst"][0]["score"]


def test_a_heart_beats_in_evaluations_too(tiny_project):
    path = tiny_project(run={"max_epoch": 1, "test_splits": ["test"]})
    folder, _ = train(path, "run.listeners=[{name: heartbeat, seconds: 1e-9}]")
    beat = json.loads((folder / "heartbeat.json").read_text())
    assert (beat["where"], beat["iteration"], beat["loss"]) == ("evaluating test", None, None)


def test_settings_of_listeners_are_checked_before_anything_is_loaded(tiny_project, plugin):
    from evlgen.assemble import run

    path = tiny_project(run={"max_epoch": 1})
    for listener, cause in (
        ("{name: heartbeat, second: 3}", "second"),
        ("{name: notes, title: [1]}", "title"),
        ("heartbeats", "heartbeat"),
    ):
        options = [f"plugins=[{plugin}]", f"run.listeners=[{listener}]"]
        with pytest.raises(ConfigError, match=cause) as error:
            run(Config.load(path, options))
        assert "run.listeners" in str(error.value)
    with pytest.raises(ConfigError, match="trackers"):
        Config.load(path, ["run.trackers=[tensorbord]"])


def test_comet_keeps_a_resumed_run_offline_as_one_experiment(tiny_project, monkeypatch):
    pytest.importorskip("comet_ml", reason="comet_ml is not installed: pip install comet_ml")
    monkeypatch.setenv("COMET_START_ONLINE", "0")
    monkeypatch.setenv("COMET_DISABLE_AUTO_LOGGING", "1")  # of packages and processors: seconds
    monkeypatch.delenv("COMET_OFFLINE_DIRECTORY", raising=False)
    path = tiny_project(run={"max_epoch": 1, "log_freq": 2, "trackers": ["comet_ml"]})
    folder, _ = train(path)
    key = json.loads((folder / "trackers.json").read_text())["comet_ml"]
    again, records = train(path, "run.resume=auto", "run.max_epoch=2")
    assert again == folder and json.loads((folder / "trackers.json").read_text())["comet_ml"] == key

    losses, shown, parameters = {}, [], {}
    parts = sorted((folder / "comet").glob(f"{key}-*.zip"), key=lambda part: part.stat().st_mtime_ns)
    for part in parts:  # what `comet upload` reads
        with zipfile.ZipFile(part) as archive:
            facts = json.loads(archive.read("experiment.json"))
            assert (facts["offline_id"], facts["resume_strategy"]) == (key, "get_or_create")
            messages = [json.loads(line) for line in archive.read("messages.json").splitlines()]
        for content in (message["payload"] for message in messages):
            metric, parameter = content.get("metric") or {}, content.get("param") or {}
            about = content.get("additional_params") or {}
            if metric.get("metricName") == "train/loss":
                losses[metric["step"]] = float(metric["metricValue"])
            elif "paramName" in parameter:
                parameters[parameter["paramName"]] = parameter["paramValue"]
            elif str(about.get("figName")).startswith("val: "):
                shown.append(about["step"])
    assert len(parts) == 2 and shown == [6] * 6 + [12] * 6 and parameters["run.max_epoch"] == 1
    assert losses == pytest.approx({r["iteration"]: r["loss"] for r in records if r["type"] == "train"})


def test_a_resumed_run_goes_on_with_the_same_tracker_runs(tiny_project, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = ["tensorboard"]
    try:
        import mlflow
        import wandb  # noqa: F401

        trackers += ["wandb", "mlflow"]
    except ImportError:
        pass
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    path = tiny_project(run={"max_epoch": 1, "log_freq": 2, "trackers": trackers})
    folder, _ = train(path)
    before = json.loads((folder / "trackers.json").read_text())
    again, records = train(path, "run.resume=auto", "run.max_epoch=2")
    assert again == folder and json.loads((folder / "trackers.json").read_text()) == before
    losses = {r["iteration"]: r["loss"] for r in records if r["type"] == "train"}
    assert list(losses) == [2, 4, 6, 8, 10, 12]

    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("train/loss")] == list(losses)
    assert board.Scalars("val/CIDEr")[1].step == 12
    assert [e.step for e in board.Images("val/00")] == [6, 12]
    texts = [e.tensor_proto.string_val[0] for e in board.Tensors("val/00/text_summary")]
    assert len(texts) == 2 and all(text.startswith(b"    ") for text in texts)  # shown as it is: no Markdown
    if "mlflow" in trackers:
        client = mlflow.MlflowClient()
        history = client.get_metric_history(before["mlflow"], "train/loss")
        assert {m.step: m.value for m in history} == pytest.approx(losses)
        assert client.get_run(before["mlflow"]).data.params["run.max_epoch"] == "1"
        shown = [f.path for f in client.list_artifacts(before["mlflow"], "captions/val")]
        assert len(shown) == 8 and "captions/val/step_00000012.json" in shown
        offline = [p.name for p in (folder / "wandb").glob("offline-run-*")]
        assert len(offline) == 2 and all(name.endswith(before["wandb"]) for name in offline)
        assert len(list((folder / "wandb").glob("offline-run-*/files/media/images/val/*.png"))) == 12
