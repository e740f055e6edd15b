"""Saving while a run goes on: what is saved, what stays when it fails, and what stops a run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from faults import deaths
from forks import ROOT, Forks
from omegaconf import OmegaConf
from runners.processes import TIMEOUT
from safetensors.torch import load_file, save_file

from evlgen.assemble import run
from evlgen.common.errors import CheckpointError, TrainingError
from evlgen.common.registry import registry
from evlgen.config.config import Config
from evlgen.files.digests import DIGESTS_FILE, check_digests
from evlgen.runners.checkpointer import Checkpointer
from evlgen.runners.optimizer import build_optimizer
from evlgen.runners.training_state import TrainingState
from evlgen.tasks.captioning import CaptioningTask
from evlgen.weights import checkpoints

RECORDING = ROOT / "tests" / "comparison" / "recording.py"
SHORT = {"valid_splits": [], "max_epoch": 3, "precision": "fp32"}


def train(path, *options) -> Path:
    run(Config.load(path, options))
    return (path.parent / "output" / "latest").resolve()


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def training(tiny_project, tmp_path):
    """A checkpointer with a model whose optimizer has made one step."""
    cfg = Config.load(tiny_project())
    model = registry.get_model_class("evlgen_opt").from_config(cfg.model)
    optimizer = build_optimizer(model, 1e-3, 0.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    checkpointer = Checkpointer(tmp_path / "checkpoints", 2, cfg.to_dict(), Accelerator(cpu=True))
    return checkpointer, model, optimizer


def test_a_checkpoint_holds_the_weights_of_its_moment_whatever_training_does_while_it_is_written(training):
    checkpointer, model, optimizer = training
    for iteration in range(1, 6):
        before = {k: v.clone() for k, v in model.trained_state_dict().items()}
        checkpointer.save(model, optimizer, TrainingState(iteration=iteration), {})
        checkpointer.wait_for_copy()
        optimizer.step()  # while the copies are being written
        checkpointer.wait()
        folder = checkpointer.latest()
        assert folder.name == f"step_{iteration:08d}"
        saved = load_file(folder / "model.safetensors")
        assert all(torch.equal(saved[k], before[k]) for k in before)
        steps = load_file(folder / "training_state" / "optimizer.safetensors")["ln_vision.weight:step"]
        assert steps.item() == iteration


def test_weights_of_frozen_parts_that_an_earlier_checkpoint_trained_are_saved(training, tmp_path):
    checkpointer, model, optimizer = training
    name, state = "vision.trunk.blocks.0.attn.proj.weight", model.state_dict()
    same = "vision.trunk.blocks.1.attn.proj.weight"
    earlier = {**model.trained_state_dict(), name: state[name] + 1, same: state[same]}
    save_file({k: v.clone() for k, v in earlier.items()}, tmp_path / "earlier.safetensors")
    assert model.load_checkpoint(tmp_path / "earlier.safetensors").frozen == [name]
    checkpointer.save(model, optimizer, TrainingState(iteration=1), {})
    checkpointer.wait()
    saved = load_file(checkpointer.latest() / "model.safetensors")
    assert saved.keys() == {*model.trained_state_dict(), name}
    assert torch.equal(saved[name], earlier[name])


def test_weights_that_are_not_finite_are_not_saved(training):
    checkpointer, model, optimizer = training
    checkpointer.save(model, optimizer, TrainingState(iteration=1), {})
    checkpointer.wait()
    with torch.no_grad():
        model.ln_vision.bias[3] = float("nan")
    checkpointer.save(model, optimizer, TrainingState(iteration=2), {})
    checkpointer.wait()
    assert checkpointer.latest().name == "step_00000001"
    with pytest.raises(TrainingError, match="step_00000002 could not be saved .ln_vision.bias holds numbers"):
        checkpointer.raise_problem()


def save(training, *iterations: int) -> list[Path]:
    """Saves at these iterations, in this order; their folders."""
    checkpointer, model, optimizer = training
    with checkpointer:
        for iteration in iterations:
            checkpointer.save(model, optimizer, TrainingState(iteration=iteration), {})
    return [checkpointer.folder / f"step_{iteration:08d}" for iteration in iterations]


def resumed(training, source: str = "auto") -> TrainingState:
    """Where a new process goes on."""
    old, model, optimizer = training
    state = TrainingState()
    with Checkpointer(old.folder, old.keep_last, old.config, old.accelerator) as checkpointer:
        checkpointer.resume(source, model, optimizer, state)
    return state


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 64
    file.write_bytes(content)


def test_one_flipped_bit_in_any_file_of_the_newest_checkpoint_is_found(training, caplog):
    older, newest = save(training, 1, 2)
    files = sorted(p for p in newest.rglob("*") if p.is_file())
    assert len(files) == 7
    for file in files:
        whole = file.read_bytes()
        flip_a_bit(file)
        caplog.clear()
        state = resumed(training)
        assert state.iteration == 1 and state.rewinds == 1, file
        assert "step_00000002 is skipped: its" in caplog.text and DIGESTS_FILE in caplog.text
        assert f"going on from {older}, the newest checkpoint that is whole" in caplog.text
        with pytest.raises(CheckpointError, match="step_00000002 cannot be continued: its") as refused:
            resumed(training, str(newest))
        assert file.name in str(refused.value)
        file.write_bytes(whole)
    assert resumed(training).iteration == 2
    for folder in (older, newest):
        flip_a_bit(folder / "model.safetensors")
    assert resumed(training) == TrainingState(rewinds=1)
    assert "can be read: starting from the beginning" in caplog.text
    with pytest.raises(CheckpointError, match=r"its model.safetensors does not match its digest"):
        training[1].load_checkpoint(newest)


def test_a_checkpoint_without_digests_is_read_and_refused_where_a_number_is_not_finite(training, caplog):
    older, newest = save(training, 1, 2)
    for folder in (older, newest):
        (folder / DIGESTS_FILE).unlink()  # as older versions wrote them
        progress = folder / "training_state" / "progress.json"
        values = json.loads(progress.read_text())
        del values["rewinds"]
        progress.write_text(json.dumps(values))
    assert resumed(training).iteration == 2
    for name in ("model.safetensors", "training_state/optimizer.safetensors"):
        tensors = load_file(newest / name)
        key = next(key for key, value in tensors.items() if value.ndim)
        save_file({**tensors, key: tensors[key] * float("nan")}, newest / name)
        assert resumed(training).iteration == 1
        assert f"{key} holds numbers that are not finite" in caplog.text
        save_file(tensors, newest / name)
    drawn = load_file(newest / "training_state/random.safetensors")
    for damaged in ({"0.torch": drawn["0.torch"][:9]}, {"0.python": -drawn["0.python"]}):
        save_file({**drawn, **damaged}, newest / "training_state/random.safetensors")
        assert resumed(training).iteration == 1
        assert "step_00000002 is skipped: its random.safetensors is damaged" in caplog.text
        caplog.clear()
    save_file(drawn, newest / "training_state/random.safetensors")
    assert resumed(training).iteration == 2


def test_the_iteration_decides_which_checkpoint_is_newest_after_the_clock_was_put_back(training):
    folders = save(training, 10, 20)
    for folder, when in zip(folders, (2e9, 1e9), strict=True):
        for path in [folder, *folder.rglob("*")]:
            os.utime(path, (when, when))
    assert resumed(training).iteration == 20
    save(training, 30)
    assert sorted(p.name for p in training[0].folder.glob("step_*")) == ["step_00000020", "step_00000030"]


def test_a_run_that_went_back_goes_on_from_what_it_saved_then(training, caplog):
    first, _, _ = save(
        (Checkpointer(training[0].folder, 9, {}, training[0].accelerator), *training[1:]), 1, 2, 3
    )
    state = resumed(training, str(first))
    assert (state.iteration, state.rewinds) == (1, 1)
    assert "going back from step_00000003 to iteration 1:" in caplog.text
    checkpointer, model, optimizer = training
    state.iteration = 2
    with checkpointer:
        checkpointer.save(model, optimizer, state, {})
    assert checkpointer.latest().name == "step_00000002"
    again = resumed(training)
    assert (again.iteration, again.rewinds) == (2, 1)
    assert sorted(p.name for p in checkpointer.folder.glob("step_*")) == ["step_00000002", "step_00000003"]


def test_of_a_run_that_went_back_the_best_checkpoint_is_of_its_new_course(
    tiny_project, tmp_path, monkeypatch
):
    def scored(path, metrics, *options) -> tuple[str, dict]:
        values = iter(metrics)
        monkeypatch.setattr(CaptioningTask, "after_evaluation", lambda *_: {"agg_metrics": next(values)})
        checkpoints = train(path, *options) / "checkpoints"
        progress = json.loads((checkpoints / "latest/training_state/progress.json").read_text())
        return (checkpoints / "best").resolve().name, progress

    path = tiny_project(run={"max_epoch": 3, "keep_last": 9, "image_use_samples": 0})
    assert scored(path, [0.3, 0.2, 0.9])[0] == "step_00000018"
    first = (tmp_path / "output/latest/checkpoints/step_00000006").resolve()
    name, progress = scored(path, [0.2, 0.1], f"run.resume={first}", "run.init_lr=5e-4")
    assert name == "step_00000006", "step_00000018 is written over, and worse"
    assert (progress["best_metric"], progress["best_epoch"], progress["best_iteration"]) == (0.3, 1, 6)

    # elsewhere, the best one is another run's
    shutil.copytree(first.with_name("step_00000012"), tmp_path / "copy")
    name, progress = scored(path, [0.1], f"run.resume={tmp_path / 'copy'}")
    assert (name, progress["best_metric"]) == ("step_00000018", 0.1)


def test_saving_a_step_again_may_be_killed_at_any_system_call(training, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    checkpointer, model, optimizer = training
    folder = checkpointer.folder

    def save_again() -> None:
        state = TrainingState(iteration=2)
        checkpointer.save(model, optimizer, state, {})
        checkpointer.wait()
        if checkpointer._problem is None:
            checkpointer.end_epoch(state, is_best=True)

    save(training, 1, 2)
    save_again()
    calls = 0
    for calls, _ in enumerate(deaths(save_again, (checkpoints, "exchange")), 1):  # noqa: B007
        for name in ("step_00000001", "step_00000002", "latest", "best"):
            check_digests(folder / name)
            load_file(folder / name / "model.safetensors")
        with Checkpointer(folder, 2, {}, checkpointer.accelerator):  # the next start
            assert sorted(p.name for p in folder.iterdir()) == [
                "best",
                "latest",
                "step_00000001",
                "step_00000002",
            ]
    assert calls > 30
    assert resumed(training).iteration == 2


def in_process(forks: Forks, training_folder: Path, lines: str) -> tuple[int, str]:
    """Saves twice in a process of its own, with something in the way of the second save."""
    program = f"""
import os, resource, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from evlgen.config.config import Config
from evlgen.common.registry import registry
from evlgen.runners.checkpointer import Checkpointer
from evlgen.runners.optimizer import build_optimizer
from evlgen.runners.training_state import TrainingState
folder = Path({str(training_folder)!r})
cfg = Config.load(folder / "project.yaml")
model = registry.get_model_class("evlgen_opt").from_config(cfg.model)
optimizer = build_optimizer(model, 1e-3, 0.0)
checkpointer = Checkpointer(folder / "checkpoints", 2, cfg.to_dict(), Accelerator(cpu=True))
checkpointer.save(model, optimizer, TrainingState(iteration=1), {{}})
checkpointer.wait()
{lines}
checkpointer.save(model, optimizer, TrainingState(iteration=2), {{}})
checkpointer.wait()
print("latest", checkpointer.latest().name)
print([p.name for p in checkpointer.folder.iterdir()])
checkpointer.raise_problem()
"""
    file = training_folder / "program.py"
    file.write_text(program)
    return forks.run(file, shown=training_folder / "shown.txt")


OBSTACLES = {
    # every file may have this many bytes at most: the weights have more
    "full": ("resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))", "too large"),
    "no rights": (
        "os.chmod(checkpointer.folder, 0o555); os.seteuid(65534) if os.geteuid() == 0 else None",
        "denied",
    ),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_save_that_fails_leaves_the_one_before_whole_and_names_it(forks, tiny_project, tmp_path, obstacle):
    tiny_project()
    for folder in (tmp_path, *tmp_path.parents):  # another user may look in
        if folder.owner() == tmp_path.owner() and folder != Path("/") and os.geteuid() == 0:
            folder.chmod(folder.stat().st_mode | 0o055)
    lines, cause = OBSTACLES[obstacle]
    code, shown = in_process(forks, tmp_path, lines)
    assert "latest step_00000001\n" in shown, shown
    assert ".step" not in next(line for line in shown.splitlines() if line.startswith("["))
    assert code != 0
    message = shown.splitlines()[-1]
    assert "step_00000002 could not be saved" in message and cause in message, message
    assert "The last whole checkpoint is" in message and "step_00000001" in message
    load_file(tmp_path / "checkpoints" / "step_00000001" / "model.safetensors")


def test_only_the_last_checkpoints_are_kept_and_every_save_is_there_in_time(tiny_project):
    folder = train(tiny_project(run={**SHORT, "save_every": 4, "keep_last": 3}))
    steps = sorted(p.name for p in (folder / "checkpoints").glob("step_*"))
    assert steps == ["step_00000012", "step_00000016", "step_00000018"]  # epochs end at 6, 12, 18


def test_resume_auto_passes_over_a_damaged_checkpoint_to_the_newest_good_one(tiny_project, caplog):
    path = tiny_project(run={**SHORT, "keep_last": 9})
    folder = train(path)
    whole = records(folder)
    state = folder / "checkpoints" / "step_00000018" / "training_state" / "optimizer.safetensors"
    os.truncate(state, 1000)
    with caplog.at_level(logging.WARNING):
        assert train(path, "run.resume=auto") == folder
    assert "step_00000018 is skipped" in caplog.text
    assert [r["loss"] for r in records(folder)] == [r["loss"] for r in whole]
    assert load_file(state)


def test_a_second_resume_of_a_run_folder_is_refused_while_the_first_is_at_work(tiny_project):
    path = tiny_project(run={**SHORT, "max_epoch": 1})
    folder = train(path)
    lines = "import sys; from pathlib import Path; from evlgen.files.locks import sole_writer"
    lines += "\nwith sole_writer(Path(sys.argv[1])): print('at work', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", lines, str(folder)]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "at work\n"
    before = (folder / "log.jsonl").read_bytes()
    for source in ("auto", folder / "checkpoints" / "latest"):
        with pytest.raises(TrainingError, match=f"in use: process {first.pid} on"):
            train(path, f"run.resume={source}", "run.max_epoch=2")
    assert (folder / "log.jsonl").read_bytes() == before
    first.kill()
    first.communicate()
    assert train(path, "run.resume=auto", "run.max_epoch=2") == folder
    assert len(records(folder)) == 12 and not (folder / ".in_use").exists()


BAD = """
from evlgen import registry
from evlgen.common.errors import DataError
from evlgen.processors.base_processor import BaseProcessor
from evlgen.tasks.captioning import CaptioningTask
@registry.register_task('bad_loss')
class BadLoss(CaptioningTask):
    def train_step(self, model, samples):
        losses = super().train_step(model, samples)
        return {**losses, 'loss': losses['loss'] * float('nan')}
@registry.register_processor('unreadable')
class Unreadable(BaseProcessor):
    def __call__(self, item):
        raise DataError('no caption')
"""


def test_a_run_in_which_every_step_was_left_out_ends_with_an_error(tiny_project, tmp_path):
    path = tiny_project(run={**SHORT, "max_epoch": 1, "precision": "bf16", "max_skipped_share": 1.0})
    whole = train(path)
    (tmp_path / "bad.py").write_text(BAD)
    unreadable = "datasets.shapes_caption.text_processor.train.name=unreadable"
    for option, cause in (
        ("run.task=bad_loss", "the loss or the gradient of all 6 steps was not finite"),
        (unreadable, "no training sample could be read; see skipped.jsonl"),
    ):
        options = [option, f"plugins=[{tmp_path / 'bad.py'}]", "run.max_epoch=2"]
        with pytest.raises(TrainingError, match=f"nothing was trained between iterations 6 and 12: {cause}"):
            train(path, "run.resume=auto", *options)
        assert [p.name for p in (whole / "checkpoints").glob("step_*")] == ["step_00000006"]


def test_resume_auto_passes_over_a_damaged_counter(tiny_project, caplog):
    path = tiny_project(run={**SHORT, "keep_last": 9})
    folder = train(path)
    for step, damage in (
        ("18", {"iteration": "many"}),
        ("12", {"processes": [{"own": {"skipped": {"seen": "x"}}}]}),
    ):
        file = folder / "checkpoints" / f"step_000000{step}" / "training_state" / "progress.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **damage}))
        (file.parent.parent / "checkpoint.sha256").unlink()  # which would tell it earlier
    with caplog.at_level(logging.WARNING):
        assert train(path, "run.resume=auto") == folder
    assert [line for line in caplog.messages if "step_00000018" in line and "iteration as 'many'" in line]
    assert [
        line for line in caplog.messages if "step_00000012" in line and "skipped samples are damaged" in line
    ]


def test_a_named_checkpoint_that_is_damaged_is_refused_with_its_name(tiny_project):
    path = tiny_project(run=SHORT)
    folder = train(path) / "checkpoints" / "step_00000018"
    (folder / "training_state" / "progress.json").write_text('{"iteration": "many"}')
    with pytest.raises(CheckpointError, match=r"step_00000018 cannot be continued: its progress.json"):
        train(path, f"run.resume={folder}")


def test_settings_that_changed_since_the_checkpoint_are_reported_key_by_key(tiny_project, caplog):
    path = tiny_project(run={**SHORT, "max_epoch": 1})
    train(path)
    options = ["run.init_lr=5e-4", "run.max_epoch=2", "datasets.shapes_caption.train_size=30"]
    with caplog.at_level(logging.WARNING):
        train(path, "run.resume=auto", *options)
    reported = [line.partition("was saved: ")[2] for line in caplog.messages if "changed since" in line]
    assert reported == [
        "datasets.shapes_caption.train_size was 24, is 30",
        "run.init_lr was 0.001, is 0.0005",
        "run.max_epoch was 1, is 2",
    ]
    assert any("the data is not that of step_00000006" in line for line in caplog.messages)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(forks, tiny_project, tmp_path, monkeypatch, name):
    monkeypatch.setenv("RECORDS", str(tmp_path))
    settings = {**SHORT, "task": "recording", "num_workers": 2, "save_every": None}
    path = tiny_project(run=settings, plugins=[str(RECORDING)])
    process = subprocess.Popen(
        [forks.python, str(ROOT / "train.py"), "--cfg-path", str(path)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PAUSE_AT": "4"},
    )
    seen = tmp_path / "0.001.jsonl"  # a line for each step
    while process.poll() is None and not (seen.is_file() and len(seen.read_text().splitlines()) == 4):
        time.sleep(0.1)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=TIMEOUT)
    last = errors.splitlines()[-1]
    shown = "Ctrl-C" if name == "SIGINT" else name
    assert last.startswith(f"stopped by {shown} after iteration "), errors[-2000:]
    assert "run.resume=auto" in last and "Traceback" not in errors
    assert process.returncode == 128 + getattr(signal, name)
    folder = (tmp_path / "output" / "latest").resolve()
    trained = [r["iteration"] for r in records(folder) if r["type"] == "train"]
    assert trained == [1, 2, 3, 4]
    assert (folder / "checkpoints" / "step_00000004" / "config.yaml").is_file()
    assert train(path, "run.resume=auto") == folder
    assert [r["iteration"] for r in records(folder)] == list(range(1, 19))


def test_a_deterministic_run_gives_equal_results_run_after_run(tiny_project):
    path = tiny_project(run={**SHORT, "deterministic": True, "num_workers": 2})
    first, second = train(path), train(path)
    assert first != second
    assert [r["loss"] for r in records(first)] == [r["loss"] for r in records(second)]
    one, two = (load_file(f / "checkpoints" / "latest" / "model.safetensors") for f in (first, second))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_jump_of_the_loss_is_noted_with_its_samples(tiny_project, tmp_path):
    plugin = tmp_path / "jump.py"
    plugin.write_text(
        "from evlgen import registry\n"
        "from evlgen.tasks.captioning import CaptioningTask\n"
        "@registry.register_task('jumping')\n"
        "class Jumping(CaptioningTask):\n"
        "    count = 0\n"
        "    def train_step(self, model, samples):\n"
        "        losses = super().train_step(model, samples)\n"
        "        self.count += 1\n"
        "        if self.count == 110:\n"
        "            losses['loss'] = losses['loss'] * 3\n"
        "        return losses\n"
    )
    settings = {**SHORT, "task": "jumping", "max_epoch": None, "max_iters": 120, "log_freq": 10}
    path = tiny_project(run=settings, plugins=[str(plugin)])
    folder = train(path)
    (spike,) = [json.loads(line) for line in (folder / "spikes.jsonl").read_text().splitlines()]
    assert spike["iteration"] == 110 and spike["loss"] > spike["mean"] + 6 * spike["deviation"]
    assert len(spike["batches"][0]["samples"]) == 4
    saved = OmegaConf.load(folder / "config.yaml")
    assert saved.run.spike_sigmas == 6.0
