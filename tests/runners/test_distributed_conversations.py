"""Two processes learn conversations as one does, also where one or both have a batch without an image."""

from __future__ import annotations

import json

import pytest
from omegaconf import OmegaConf
from PIL import Image
from runners.processes import alone, logged, torchrun
from safetensors.torch import load_file

from evlgen.loaders.data import BatchPlan


def test_batches_without_images_train_on_two_processes_as_on_one(tiny_project, tmp_path, forks):
    plan = BatchPlan([6], batch_size=2, seed=42)
    both, seen, blind = ([i for i, _ in batch] for batch, _ in zip(plan, range(3), strict=False))
    assert sorted([*both, *seen, *blind]) == list(range(6))
    with_image = {*both, seen[0]}  # then one process has none, then both have none
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    records = []
    for number in range(6):
        start, image = ("<image>\n", {"image": "red.png"}) if number in with_image else ("", {})
        turns = [{"from": "human", "value": f"{start}what {number}?"}, {"from": "gpt", "value": "a red star"}]
        records.append({"conversations": turns, **image})
    (tmp_path / "talks.json").write_text(json.dumps(records))
    settings = {"task": "conversation", "max_epoch": 1, "batch_size_train": 1, "precision": "fp32"}
    path = tiny_project(run={**settings, "valid_splits": [], "test_splits": []})
    content = OmegaConf.load(path)
    content.model.soft_prompts = {"scale": 0.4}
    content.model.checkpoint = None
    content.datasets = {"conversations": {"annotations": {"train": str(tmp_path / "talks.json")}}}
    OmegaConf.save(content, path)

    folders = [tmp_path / "two", tmp_path / "one"]
    ended = torchrun(forks, path, f"run.output_dir={folders[0]}")
    assert ended.code == 0, ended.shown
    alone(path, f"run.output_dir={folders[1]}", "run.batch_size_train=2")
    lines = [logged(folder / "latest", "train") for folder in folders]
    assert len(lines[0]) == 3
    for line, other in zip(*lines, strict=True):
        assert line == pytest.approx(other, rel=2e-5)
    states = [
        load_file(f / "latest" / "checkpoints" / "latest" / "training_state" / "optimizer.safetensors")
        for f in folders
    ]
    two, one = ({k: v for k, v in state.items() if k.endswith(":exp_avg")} for state in states)
    assert two.keys() == one.keys() and len(two) > 20
    for name, value in two.items():  # of the gradients
        assert (value - one[name]).abs().max() <= 1e-4 * one[name].abs().max() + 1e-6, name
