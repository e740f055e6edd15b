"""Disks without a byte left, and folders that vanish: a run ends with our error, its checkpoints whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from evlgen.assemble import run, writing_named
from evlgen.common.errors import TrainingError
from evlgen.common.registry import registry
from evlgen.config.config import Config
from evlgen.tasks.captioning import CaptioningTask
from evlgen.weights.checkpoints import found_checkpoints

SHORT = {"valid_splits": [], "precision": "fp32", "max_epoch": 1}
# every file may have no byte: what a full disk says of a file that is there is said of all
FULL = """
import contextlib, io, resource, sys, tempfile
from evlgen import cli
tempfile.gettempdir()
before = resource.getrlimit(resource.RLIMIT_FSIZE)
shown = io.StringIO()
resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
    code = cli.train(sys.argv[1:])
resource.setrlimit(resource.RLIMIT_FSIZE, before)
print(shown.getvalue(), end="", flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
sys.exit(code)
"""


@registry.register_task("deleting")
class Deleting(CaptioningTask):
    def train_step(self, model, samples):
        folder = Path(self.run.output_dir, "latest").resolve()
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 3:
            shutil.rmtree(folder)
        if self.steps == 103:
            (folder / "log.jsonl").unlink()
            (folder / "log.jsonl").symlink_to("/dev/full")
        return super().train_step(model, samples)


def test_a_folder_that_is_deleted_while_a_run_goes_on_is_named(tiny_project):
    path = tiny_project(run={**SHORT, "task": "deleting", "save_every": None})
    with pytest.raises(TrainingError, match=r"log\.jsonl cannot be written: its folder was deleted or moved"):
        run(Config.load(path))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full")
def test_a_log_that_cannot_grow_ends_the_run_with_its_checkpoints_whole(tiny_project, monkeypatch):
    monkeypatch.setattr(Deleting, "steps", 100, raising=False)
    path = tiny_project(run={**SHORT, "task": "deleting", "save_every": 2})
    with pytest.raises(TrainingError, match=r"cannot be written: No space left on device\. Make room"):
        run(Config.load(path))
    (saved,) = found_checkpoints(path.parent / "output" / "latest" / "checkpoints")
    assert saved.name == "step_00000002" and load_file(saved / "model.safetensors")


def test_resuming_without_a_byte_left_is_an_error_of_ours(forks, tiny_project, tmp_path):
    path = tiny_project(run={**SHORT, "resume": "auto"})
    run(Config.load(path))
    program = tmp_path / "full.py"
    program.write_text(FULL)
    arguments = ("--cfg-path", path, "--options", "run.max_epoch=2")
    code, shown = forks.run(program, *arguments, shown=tmp_path / "shown.txt")
    assert code == 1 and "Traceback" not in shown, shown
    assert "cannot be written: File too large. Make room" in shown.splitlines()[-1]
    assert "run.resume=auto goes on" in shown


def test_a_disk_too_full_for_any_temporary_file_is_named(tmp_path):
    with pytest.raises(TrainingError, match="as where the disk is full"), writing_named(tmp_path):
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")


def test_errors_about_other_files_stay_what_they_are(tmp_path):
    for error in (FileNotFoundError(2, "no", "/data/a.png"), OSError(28, "full", "/data/b.bin")):
        with pytest.raises(OSError) as raised, writing_named(tmp_path):
            raise error
        assert raised.value is error
