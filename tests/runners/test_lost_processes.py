"""Two processes of which one dies or fails: the other ends within seconds, the cause is shown, and torchrun's
restart goes on as if nothing had been."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
from runners.processes import logged, torchrun

SECONDS = 10  # from a failure to the other process's end: exchanges would wait for hours


@pytest.fixture(scope="module")
def restarted(forks, write_pair_project, tmp_path_factory):
    """A run that fails twice: in the second batch of the second step, and while an epoch is scored."""
    project = write_pair_project(tmp_path_factory.mktemp("restarted"))
    ended = torchrun(
        forks,
        project,
        "run.test_splits=[damaged]",
        launcher=("--max-restarts", "2"),
        failures="0:1:train:4:other 1:0:scoring:2:train",
    )
    assert ended.code == 0, ended.shown
    (folder,) = (path for path in (project.parent / "output").iterdir() if not path.is_symlink())
    return SimpleNamespace(ended=ended, folder=folder)


@pytest.fixture(scope="module")
def failed(forks, write_pair_project, tmp_path_factory):
    """A run that fails while it validates, is started again, and is killed in the second batch of a step."""
    project = write_pair_project(tmp_path_factory.mktemp("failed"))
    return torchrun(
        forks,
        project,
        "run.test_splits=[damaged]",
        launcher=("--max-restarts", "1"),
        failures="0:1:valid:2:train 1:1:train:2:kill",
    )


def seconds_to_end(ended, attempt, rank):
    """From a process's failure to the other's end."""
    (failure,) = (n["time"] for n in ended.notes("failure", rank) if n["attempt"] == attempt)
    (end,) = (n["time"] for n in ended.notes("end", 1 - rank) if n["attempt"] == attempt)
    return end - failure


def test_torchrun_restarts_a_failed_run_from_its_newest_checkpoint(restarted):
    batches = Counter(note["attempt"] for note in restarted.ended.notes("step", 0))
    # steps end after batches 2, 4, 5, 7 ..., each with a checkpoint: 3 and 4 are lost, then nothing
    assert batches == {0: 4, 1: 3, 2: 10}
    assert "resuming after iteration 2 of 15" in restarted.ended.shown
    assert "resuming after iteration 5 of 15" in restarted.ended.shown


def test_a_restarted_run_ends_bit_for_bit_as_one_never_interrupted(restarted, pair):
    for kind in ("train", "evaluation"):
        assert logged(restarted.folder, kind) == logged(pair.folder, kind)
    ours, theirs = (f / "checkpoints" / "step_00000015" for f in (restarted.folder, pair.folder))
    files = [path.relative_to(theirs) for path in theirs.rglob("*.safetensors")]
    assert len(files) == 3
    for file in files:
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file
    for rank in (
        0,
        1,
    ):  # what both processes drew of their random numbers, and their weights before each batch
        steps, expected = (ended.notes("step", rank) for ended in (restarted.ended, pair.ended))
        last = [{**step, "attempt": 0} for step in steps if step["attempt"] == 2]
        assert last == expected[5:]


def test_an_error_on_one_process_ends_the_others_within_seconds(restarted, failed):
    assert seconds_to_end(restarted.ended, attempt=0, rank=1) < SECONDS  # in training
    assert seconds_to_end(restarted.ended, attempt=1, rank=0) < SECONDS  # in scoring
    assert seconds_to_end(failed, attempt=0, rank=1) < SECONDS  # in validation


def test_a_killed_process_ends_the_others_within_seconds_and_is_named_as_the_cause(failed):
    assert failed.code == 1
    assert seconds_to_end(failed, attempt=1, rank=1) < SECONDS
    assert failed.at - failed.notes("failure", 1)[-1]["time"] < 2 * SECONDS
    cause = failed.shown.partition("Root Cause")[2]
    assert "rank      : 1" in cause and "Signal 9 (SIGKILL)" in cause
    assert "another process of this run ended" in failed.shown


def test_an_error_is_shown_once_and_without_the_traceback_of_what_it_caused(restarted, failed):
    own = failed.shown.partition("Traceback")[0]  # the only one is torchrun's own, before its report
    assert own.count("this run cannot go on") == 1
    assert failed.shown.count("Traceback") == 1 and "/evlgen/" not in failed.shown
    assert restarted.ended.shown.count("ValueError: a mistake in somebody's task") == 1
    assert restarted.ended.shown.count("Traceback") == 1  # of the mistake
