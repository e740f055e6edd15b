"""`examples/minimal.py`, training without the runner, against the runner."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from evlgen.assemble import run
from evlgen.config.config import Config

FILE = Path(__file__).resolve().parent.parent / "examples" / "minimal.py"
STEPS, BATCH, WARMUP, SEED = 20, 8, 5, 7


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location("minimal", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_losses_are_the_runners(minimal, tmp_path):
    """The runner reads the shipped project file, so the settings written down in the example are compared
    too: those of the three parts, of the optimizer, of the data."""
    torch.manual_seed(SEED)
    model = minimal.Captioner().to(minimal.DEVICE)
    losses = list(minimal.train(model, STEPS, BATCH, WARMUP, SEED))
    options = {
        "max_iters": STEPS,
        "batch_size_train": BATCH,
        "warmup_steps": WARMUP,
        "seed": SEED,
        "precision": "fp32",
        "allow_tf32": False,
        "log_freq": 1,
        "test_splits": [],
        "tensorboard": False,
        "output_dir": tmp_path,
    }
    run(Config.load("projects/shapes/caption.yaml", [f"run.{key}={value}" for key, value in options.items()]))
    lines = (tmp_path / "latest" / "log.jsonl").read_text().splitlines()
    expected = [record["loss"] for record in map(json.loads, lines) if record["type"] == "train"]
    assert len(expected) == STEPS
    # the runner's linear layers may be another library's (models/ops/products.py): rounding differs
    assert losses == pytest.approx(expected, rel=1e-5 if minimal.DEVICE == "cpu" else 1e-3)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_its_defaults_are_the_project_files(minimal):
    section = Config.load("projects/shapes/caption.yaml").run
    num_steps, batch_size, warmup, seed = minimal.train.__defaults__
    assert (num_steps, batch_size) == (section.max_iters, section.batch_size_train)
    assert (warmup, seed) == (section.warmup_steps, section.seed)


def test_it_captions_images(minimal, monkeypatch, capsys, tmp_path):
    minimal.Image.new("RGB", (80, 60), (200, 30, 30)).save(tmp_path / "photo.png")
    monkeypatch.setattr(sys, "argv", ["minimal.py", "--iterations", "1", str(tmp_path / "photo.png")])
    minimal.main()
    step, caption = capsys.readouterr().out.splitlines()
    assert step.startswith("step 1  loss ")
    assert caption.startswith(f"{tmp_path / 'photo.png'}: ")


def test_it_is_short():
    assert len(FILE.read_text(encoding="utf-8").splitlines()) <= 150
