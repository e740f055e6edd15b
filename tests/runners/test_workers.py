"""Data-loading processes that fail, die or never answer: a run ends with the reason, or when asked to."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import threading
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from evlgen.assemble import run
from evlgen.common.errors import DataError, Interrupted, TrainingError
from evlgen.config.config import Config
from evlgen.datasets.base_dataset import BaseDataset
from evlgen.loaders.data import BatchPlan, eval_loader, train_loader, workers_named
from evlgen.loaders.interruption import StopRequest
from evlgen.weights.checkpoints import found_checkpoints

SHAPES = iter([2, 3] * 9)
PLUGIN = Path(__file__).with_name("bad_workers.py")


@pytest.fixture(autouse=True)
def quick_end(monkeypatch):
    """torch waits so many seconds for each process that it ends, and as long for one that may have died."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)


@pytest.fixture
def project(tiny_project):
    """Epochs of six batches in steps of two, with dropout and running statistics."""
    path = tiny_project(
        plugins=[str(PLUGIN)],
        model={
            "connector": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
            "soft_prompts": {"scale": 0.4},
            "checkpoint": None,
        },
        run={"accum_grad_iters": 2, "num_workers": 2, "precision": "fp32", "task": "killing"},
    )
    content = OmegaConf.load(path)
    roles = ("train", "eval")
    processors = {
        "vis_processor": {role: {"name": "blip_image_eval"} for role in roles},
        "text_processor": {role: {"name": "blip_caption"} for role in roles},
    }
    content.datasets = {"stuck_shapes": {"train_size": 24, "val_size": 6, **processors}}
    OmegaConf.save(content, path)
    return path


def train(path, *options):
    """Runs a project; returns its losses and last weights."""
    cfg = Config.load(path, options)
    run(cfg)
    folder = Path(cfg.run.output_dir, "latest")
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    weights = load_file(folder / "checkpoints" / "latest" / "model.safetensors")
    return [r["loss"] for r in records if r["type"] == "train"], weights


class Items(BaseDataset):
    """What a worker does with an item."""

    def __init__(self, act) -> None:
        super().__init__(range(4))
        self.act = act

    def load_sample(self, index):
        return {"image": self.act()}


def no_room():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # of any file, those in shared memory too
    return torch.zeros(3, 100, 100)


def of_another_shape():
    return torch.zeros(next(SHAPES))


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_a_batch_that_shared_memory_cannot_hold_ends_the_run_with_the_remedies(kind):
    items, plan = Items(no_room), BatchPlan([4], 2, seed=1)
    loaders = {"train": train_loader({"a": items}, plan, 1, False), "eval": eval_loader(items, 2, 1, False)}
    with pytest.raises(TrainingError) as raised, workers_named():
        list(islice(loaders[kind], 2))
    for word in ("/dev/shm", "--shm-size", "run.num_workers", "File too large"):
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_sent_is_not_waited_for():
    with pytest.raises((AttributeError, TypeError), match="pickle"), workers_named():
        list(islice(train_loader({"a": Items(lambda: lambda: 0)}, BatchPlan([4], 2, seed=1), 1, False), 1))


def test_an_error_of_ours_in_a_worker_reads_as_elsewhere():
    with pytest.raises(DataError) as raised, workers_named():
        list(eval_loader(Items(of_another_shape), 2, 1, False))
    assert str(raised.value).startswith("'image' has samples of different shapes in one batch: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("place", ["train_step", "valid_step"])
def test_a_killed_worker_ends_the_run_wherever_its_death_is_learned_of(project, monkeypatch, place):
    monkeypatch.setenv("KILL_IN", place)
    with pytest.raises(TrainingError, match=r"a data-loading process died \(.*killed by signal: Killed"):
        train(project)
    (saved,) = found_checkpoints(project.parent / "output" / "latest" / "checkpoints")
    assert saved.name == "step_00000006" and load_file(saved / "model.safetensors")


@contextlib.contextmanager
def stopped_when(file):
    """Sends this process SIGTERM soon after a file is there."""

    ended = threading.Event()

    def send():
        while not file.exists():
            if ended.wait(0.02):
                return
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_request_to_stop_is_obeyed_while_a_batch_is_awaited(project, tmp_path, monkeypatch):
    """The second batch of a step, whose first one comes again as if it had never been read; and one of an
    evaluation."""
    whole = train(project, f"run.output_dir={tmp_path / 'whole'}")
    batches = list(islice(BatchPlan([24], 4, seed=42), 4))
    places = {
        f"train {batches[3][0][0]}": "after iteration 2 of 12",
        "val 5": "while evaluating val",
    }
    for number, (place, where) in enumerate(places.items()):
        monkeypatch.setenv("STUCK_AT", place)
        monkeypatch.setenv("REACHED", str(tmp_path / f"reached{number}"))
        with stopped_when(tmp_path / f"reached{number}"), pytest.raises(Interrupted) as raised:
            train(project, "run.resume=auto")
        assert f"stopped by SIGTERM {where}" in str(raised.value) and raised.value.exit_code == 143
        del raised  # with its frames, and the loader in them
    monkeypatch.delenv("STUCK_AT")
    losses, weights = train(project, "run.resume=auto")
    assert losses == whole[0]
    assert all(torch.equal(weights[name], value) for name, value in whole[1].items())
    assert not multiprocessing.active_children()


def test_other_processes_of_a_run_are_not_left_waiting():
    stop = StopRequest(distributed=True)
    stop.received = signal.SIGTERM
    assert list(stop.heeding([1, 2], has_workers=True)) == [1, 2]
    stop.distributed = False
    assert list(stop.heeding([1, 2], has_workers=False)) == [1, 2]
