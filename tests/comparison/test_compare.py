"""Comparisons from the command line, on a tiny project: real child processes, and what the report says."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from markupsafe import escape

from evlgen import cli
from evlgen.common.errors import TrainingError
from evlgen.common.registry import registry
from evlgen.common.safe_text import printable
from evlgen.comparison import worker
from evlgen.comparison.execution import _alone
from evlgen.config.config import Config

ROOT = Path(__file__).resolve().parents[2]
RECORDING = Path(__file__).with_name("recording.py")
RATES = ("0.001", "0.002")
BUDGET = 1.2
WAIT = [sys.executable, "-c", "import time; time.sleep(60)"]


def command(project: Path, folder: Path, *words: str) -> list[str]:
    return [
        *("compare", "--cfg-path", str(project), "--output", str(folder), "--plugins", str(RECORDING)),
        *("--options", "run.task=recording", *words),
    ]


@pytest.fixture(scope="module")
def environment(forks, tmp_path_factory):
    """For child processes: they start at once, no Java, one thread, and where the recording task writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", forks.python)
        patch.chdir(ROOT)
        for name, value in {"PATH": "", "JAVA_HOME": "", "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        patch.setenv("RECORDS", str(tmp_path_factory.mktemp("records")))
        yield patch


@pytest.fixture(scope="module")
def compared(environment, write_project, tmp_path_factory):
    """Two configurations, of which the first fails in its first step: however slow the machine is, nothing of
    it is evaluated or saved. And the same again with --resume, when it does not fail any more."""
    folder = tmp_path_factory.mktemp("compared")
    project = write_project(folder)
    words = command(project, folder / "out")
    words += ["--grid", f"run.init_lr={','.join(RATES)}", "--budget", f"{BUDGET}s", "--evaluate-samples", "4"]
    environment.setenv("CRASH_AT", RATES[0])
    first = outcome(words, folder / "out")
    environment.delenv("CRASH_AT")
    marks = {path: path.stat().st_mtime_ns for path in (folder / "out" / "runs").rglob("*.json*")}
    again = outcome([*words, "--resume"], folder / "out")
    return SimpleNamespace(folder=folder / "out", project=project, first=first, again=again, marks=marks)


def outcome(words: list[str], folder: Path, name: str = "report") -> SimpleNamespace:
    code = cli.main(words)
    return SimpleNamespace(
        code=code,
        report=json.loads((folder / f"{name}.json").read_text()),
        page=(folder / f"{name}.html").read_text(),
    )


def runs_of(report: dict) -> list[dict]:
    return [run for configuration in report["configurations"] for run in configuration["runs"]]


def records(rate: str) -> list[dict]:
    path = Path(os.environ["RECORDS"]) / f"{float(rate):g}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_that_crashes_is_reported_and_the_others_finish(compared):
    assert compared.first.code == 1
    bad, good = runs_of(compared.first.report)
    assert (bad["status"], good["status"]) == ("failed", "finished")
    assert bad["error"] == "MemoryError: no memory for …/else.bin" and not bad["final"]
    assert bad["error"] in compared.first.page
    assert good["error"] is None and good["final"]


def test_runs_end_with_their_budget_and_were_evaluated_in_its_parts(compared):
    for run in runs_of(compared.again.report):
        assert run["status"] == "finished"
        assert run["seconds"] >= BUDGET
        assert 1 <= len(run["curve"]) <= 6
        assert run["curve"][-1]["seconds"] == run["seconds"]
        assert all(point["seconds"] < BUDGET for point in run["curve"][:-1])
        assert run["samples"] == 4 * run["iterations"]
        assert run["wall_seconds"] > run["seconds"]


def test_all_configurations_see_the_same_samples_in_the_same_order(compared):
    first, second = (records(rate) for rate in RATES)
    first = first[1:]  # without that of the process that crashed
    length = min(len(first), len(second))  # of runs that end by the clock
    assert length
    assert first[:length] == second[:length]
    epoch = first[: min(6, length)]  # or the part of it that both have
    assert len({sample for record in epoch for sample in record["ids"]}) == 4 * len(epoch)


def test_resuming_repeats_no_finished_run(compared):
    assert compared.again.code == 0
    assert [run["starts"] for run in runs_of(compared.again.report)] == [2, 1]
    moved = {p for p, mark in compared.marks.items() if not p.exists() or p.stat().st_mtime_ns != mark}
    assert moved and {path.relative_to(compared.folder).parts[1] for path in moved} == {"init_lr=0.001"}
    finished = [runs_of(ended.report)[1] for ended in (compared.first, compared.again)]
    assert finished[0] == finished[1]


def test_the_report_has_the_numbers_of_the_runs_own_files(compared):
    for configuration in compared.again.report["configurations"]:
        (run,) = configuration["runs"]
        folder = compared.folder / "runs" / configuration["name"] / "seed_42" / "stage_1" / "run" / "latest"
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        last = [record for record in log if record["type"] == "evaluation"][-1]
        own = json.loads((folder / "result" / f"val_{last['label']}" / "metrics.json").read_text())
        assert not own.pop("left_out")
        assert run["final"] == own
        assert run["final"]["CIDEr"] == last["CIDEr"]
        assert configuration["summary"]["final"]["CIDEr"] == {"mean": own["CIDEr"], "std": None}
        captions = json.loads((folder / "result" / f"val_{last['label']}" / "captions.json").read_text())
        assert {row["id"]: row["text"] for row in run["captions"]} == {
            row["image_id"]: row["caption"] for row in captions
        }
        assert len(captions) == 4
        checkpoint = (folder / "checkpoints" / "latest" / "training_state" / "effort.json").read_text()
        assert json.loads(checkpoint) == {"seconds": run["seconds"], "samples": run["samples"]}


def test_the_report_knows_the_models_size(compared):
    model = registry.get_model_class("evlgen_opt").from_config(Config.load(compared.project).model)
    (run, *_) = runs_of(compared.again.report)
    assert run["trainable_parameters"] == sum(v.numel() for v in model.trained_state_dict().values())
    assert run["total_parameters"] == sum(p.numel() for p in model.parameters())
    size = model.vision.image_size
    assert run["soft_prompts"] == model.soft_prompts({"image": torch.zeros(1, 3, size, size)}).shape[1]
    assert 1e8 < run["peak_rss_bytes"] < 1e11


def test_the_page_stands_alone_and_names_every_run_and_nothing_of_this_machine(compared):
    page, report = compared.again.page, compared.again.report
    sources = re.findall(r'(?:src|href)\s*=\s*["\']?([^"\'\s>]*)', page)
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert "<script" not in page and "@import" not in page and "url(" not in page
    for configuration in report["configurations"]:
        assert configuration["label"] in page
        assert "run.init_lr" in page
        for row in configuration["runs"][0]["captions"]:
            assert str(escape(printable(row["text"]))) in page  # an untrained model may write anything
    assert len([s for s in sources if "image/png" in s]) == 4  # the images that were evaluated
    text = page + json.dumps(report)
    for private in (str(ROOT), str(compared.folder), str(Path.home()) + "/", os.uname().nodename + " "):
        assert private not in text
    assert "python -m evlgen compare --cfg-path …/project.yaml" in page


@pytest.mark.slow
def test_runs_that_take_turns_give_what_they_give_alone(environment, write_project, tmp_path, monkeypatch):
    environment.setenv("PAUSE_AT", "3")
    project = write_project(tmp_path, run={"precision": "fp32"})
    words = ["--grid", "run.init_lr=3e-3", "--budget", "4it", "--evaluate-every", "2it"]
    words += ["--evaluate-samples", "2", "--options", "run.log_freq=1"]
    ended = outcome([*command(project, tmp_path / "out"), *words, "--interleave"], tmp_path / "out")
    environment.delenv("PAUSE_AT")
    (run,) = runs_of(ended.report)
    assert ended.code == 0 and run["starts"] == 2  # stopped after the first evaluation
    assert ended.report["interleaved"]

    monkeypatch.setattr(subprocess, "Popen", InProcess)
    alone = outcome([*command(project, tmp_path / "alone"), *words], tmp_path / "alone")
    (other,) = runs_of(alone.report)
    assert other["starts"] == 1 and len(other["loss"]) == 4
    assert [point["loss"] for point in run["loss"]] == [point["loss"] for point in other["loss"]]
    assert run["final"] == other["final"]


def test_a_second_comparison_in_the_same_folder_is_refused(tmp_path):
    with _alone(tmp_path) as lock, subprocess.Popen(WAIT, pass_fds=(lock,)) as child:
        with pytest.raises(TrainingError, match="another process works in"), _alone(tmp_path):
            pass
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), lock)  # this process lets go, as where it dies
        with pytest.raises(TrainingError, match="another process works in"), _alone(tmp_path):
            pass  # the child works on
        child.kill()
        child.wait()
        with _alone(tmp_path):
            pass


class InProcess:
    """In place of `subprocess.Popen`: runs the worker here, at once."""

    def __init__(self, words, **options) -> None:
        self.returncode = None
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        before, sys.argv = sys.argv, words[2:]
        try:
            self.returncode = worker.main()
        finally:
            sys.argv = before
            torch.set_num_threads(threads)

    def poll(self):
        return self.returncode


@pytest.fixture
def in_process(environment, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", InProcess)


def test_a_second_stage_starts_from_the_first_and_both_are_counted(in_process, write_project, tmp_path):
    project = write_project(tmp_path, model={"checkpoint": None})
    first = project.rename(tmp_path / "first.yaml")
    second = write_project(tmp_path, model={"checkpoint": None}, run={"init_lr": 5e-4})
    words = [
        *("compare", f"{first}+{second}", "--output", str(tmp_path / "out"), "--budget", "10it"),
        *("--stage-split", "0.3", "--evaluate-every", "2it", "--seeds", "1,2"),
        *("--options", "run.task=recording", "--plugins", str(RECORDING)),
    ]
    ended = outcome(words, tmp_path / "out")
    assert ended.code == 0
    (configuration,) = ended.report["configurations"]
    assert configuration["label"] == "first + project"
    for run in configuration["runs"]:
        assert run["iterations"] == 10 and run["samples"] == 40
        assert [(p["stage"], p["iteration"]) for p in run["curve"]][-4:] == [(2, i) for i in (5, 7, 9, 10)]
        seconds = [point["seconds"] for point in run["curve"]]
        assert seconds == sorted(seconds) and seconds[-1] == sum(run["stage_seconds"]) == run["seconds"]
        stages = tmp_path / "out" / "runs" / configuration["name"] / f"seed_{run['seed']}"
        log = (stages / "stage_2" / "output.txt").exists()
        job = json.loads((stages / "stage_2" / "job.json").read_text())
        assert log and any("stage_1/run/latest/checkpoints/latest" in option for option in job["options"])
    values = [run["final"]["CIDEr"] for run in configuration["runs"]]
    assert configuration["summary"]["final"]["CIDEr"]["std"] == pytest.approx(statistics.stdev(values))


def test_a_sweep_has_quality_and_time_for_each_value(
    in_process, write_project, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("RECORDS", str(tmp_path))
    words = [
        "sweep",
        "model.connector.r=0,2",
        "--cfg-path",
        str(write_project(tmp_path, run={"max_epoch": 1})),
    ]
    words += ["--output", str(tmp_path / "out"), "--plugins", str(RECORDING)]
    ended = outcome([*words, "--options", "run.task=recording"], tmp_path / "out", "sweep")
    assert ended.code == 0
    assert [c["value"] for c in ended.report["configurations"]] == ["0", "2"]
    assert ended.report["budget"] is None and ended.report["swept"] == "model.connector.r"
    fewer = [run["soft_prompts"] for run in runs_of(ended.report)]
    assert fewer[0] > fewer[1]
    assert [run["iterations"] for run in runs_of(ended.report)] == [6, 6]  # 24 samples in batches of 4
    seen = records("0.001")
    assert len(seen) == 12 and seen[:6] == seen[6:]  # in the same order
    assert len({sample for record in seen[:6] for sample in record["ids"]}) == 24
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 5000
    assert "sweep.html" in capsys.readouterr().out


def test_ctrl_c_saves_the_run_and_the_report_and_says_how_to_go_on(environment, write_project, tmp_path):
    project = write_project(tmp_path)
    words = [*command(project, tmp_path / "out"), "--grid", "run.init_lr=8e-3", "--budget", "4it"]
    process = subprocess.Popen(
        [sys.executable, "-m", "evlgen", *words, "--evaluate-every", "4it"],
        env={**os.environ, "PAUSE_AT": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    record = Path(os.environ["RECORDS"]) / "0.008.jsonl"
    while not record.exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, out + err
    assert "--resume goes on from there" in err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (run,) = runs_of(report)
    assert run["status"] == "stopped" and run["error"] is None
    stage = tmp_path / "out" / "runs" / "init_lr=8e-3" / "seed_42" / "stage_1"
    assert list((stage / "run" / "latest" / "checkpoints").glob("step_*"))
