"""Two processes on CPUs: broken samples on one of them neither hang the other nor go unnoticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_batch_of_broken_samples_is_skipped_and_listed(tiny_project, tmp_path, processes):
    images = tmp_path / "coco" / "images"
    images.mkdir(parents=True)
    (tmp_path / "coco" / "annotations").mkdir()
    names = [f"{i}.png" for i in range(6)]
    for i, name in enumerate(names):
        Image.new("RGB", (60, 60), (40 * i, 0, 0)).save(images / name)
    (images / "3.png").write_bytes(b"broken")
    records = {
        "train": [{"image": n, "caption": "a wall"} for n in names],
        "val": [{"image": n, "caption": ["a wall"]} for n in names],
    }
    for split, content in records.items():
        (tmp_path / "coco" / "annotations" / f"coco_karpathy_{split}.json").write_text(json.dumps(content))
    path = tiny_project(
        datasets={"coco_caption": {}},
        run={"max_epoch": 2, "batch_size_train": 1, "max_skipped_share": 1.0, "valid_splits": ["val"]},
    )
    from omegaconf import OmegaConf

    cfg = OmegaConf.load(path)
    del cfg.datasets["shapes_caption"]
    OmegaConf.save(cfg, path)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "EVLGEN_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, str(ROOT / "train.py"), "--cfg-path", str(path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "output" / "latest"
    listed = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert {entry["id"] for entry in listed} == {"3.png"}
    captions = json.loads((folder / "result" / "val_epoch2" / "captions.json").read_text())
    assert [c["image_id"] for c in captions] == [0, 1, 2, 4, 5]
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    scored = [r for r in records if r["type"] == "evaluation"]
    assert [(r["samples"], r["skipped"]) for r in scored] == [(5, 1), (5, 1)]
