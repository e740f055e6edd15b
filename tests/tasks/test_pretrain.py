"""The task that trains and scores nothing."""

from __future__ import annotations

import json

from evlgen.assemble import run
from evlgen.config.config import Config


def test_it_trains_and_evaluates_nothing(tiny_project, tmp_path):
    path = tiny_project(
        run={"task": "image_text_pretrain", "max_epoch": None, "max_iters": 2, "device": "cuda"}
    )
    cfg = Config.load(path)
    assert cfg.run.valid_splits == []
    run(cfg)
    lines = (tmp_path / "output").rglob("*.jsonl")
    records = [json.loads(line) for file in lines for line in file.read_text().splitlines()]
    assert any("loss" in record for record in records)
    assert not any(record.get("type") == "evaluation" for record in records)
    assert list((tmp_path / "output").rglob("step_00000002/model.safetensors"))


def test_a_split_that_is_asked_for_has_no_metrics(tiny_project, tmp_path):
    path = tiny_project(run={"task": "image_text_pretrain", "valid_splits": ["val"], "max_epoch": 1})
    run(Config.load(path))
    assert not list((tmp_path / "output").rglob("metrics.json"))
