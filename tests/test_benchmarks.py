"""The benchmarks for a GPU are built here, so that they are not found broken there."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from evlgen.common.registry import registry
from evlgen.config.config import Config

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("step")


def test_the_published_step_with_fewer_and_narrower_layers_does_the_same_work(step, tmp_path):
    sizes = dataclasses.replace(
        step.PUBLISHED,
        **{"vision_dim": 32, "layers": 2, "r": 3, "hidden": 32, "heads": 4, "intermediate": 64},
        **{"language_layers": 2, "language_dim": 32, "language_heads": 4, "vocabulary": 1000},
        vision_kwargs={**step.PUBLISHED.vision_kwargs, "depth": 2, "embed_dim": 32, "num_heads": 4},
        image_size=56,
        dropout=0.0,
    )
    step.write_weights(sizes, tmp_path)
    steps = [kind(sizes, folder=tmp_path, precision="fp32") for kind in (step.OurStep, step.TextbookStep)]
    samples = next(step.batches(sizes, 2, torch.device("cpu"), count=1))
    ours, textbook = (one.check(samples) for one in steps)
    assert ours == pytest.approx(textbook, rel=1e-4)


def test_the_published_sizes_fit_together(step):
    with torch.device("meta"):
        model = step.Textbook(step.PUBLISHED, AutoTokenizer.from_pretrained(step.TOKENIZER))
    image = torch.empty(1, 3, 224, 224, device="meta")
    model.VL_proj(model.ln_vision(model.visual_encoder.forward_features(image)))
    assert sum(p.numel() for p in model.visual_encoder.parameters()) == pytest.approx(0.986e9, rel=0.01)
    assert model.opt_proj.out_features == model.opt_model.config.hidden_size == 2560
    assert len(model.opt_model.model.decoder.layers) == 32


def test_operations_of_blip2s_first_stage_are_counted_beside_its_second(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    macs = importlib.import_module("macs")
    assert {"projects/blip2/reproduce_stage1.yaml", "projects/blip2/reproduce_stage2.yaml"} < {*macs.PROJECTS}
    cfg = Config.load("projects/blip2/shapes_stage1.yaml").model
    found = macs.count("projects/blip2/shapes_stage1.yaml")
    model = registry.get_model_class("blip2").from_config(cfg)
    width = model.connector.sizes.hidden_size
    more_words = (macs.BERT_WORDS - len(model.tokenizer)) * (width + 1)
    assert found.parts["connector"].trained - more_words == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    # by hand: keys and values of the image once, 4 passes of the queries, 5 of the text, words at the end
    layers, queries, text = model.connector.layers, model.connector.num_query_token, macs.TEXT_TOKENS
    sizes, seen = model.connector.sizes, sum(layer.has_cross_attention for layer in model.connector.layers)
    attention, forward = 4 * width**2, 2 * width * sizes.intermediate_size
    by_hand = seen * 2 * model.vision.num_tokens * model.vision.embed_dim * width
    by_hand += 4 * queries * (len(layers) * (attention + forward) + seen * 2 * width**2)
    by_hand += 5 * text * len(layers) * (attention + forward) + text * macs.BERT_WORDS * width
    assert found.parts["connector"].forward == pytest.approx(by_hand, rel=0.15)
    assert found.flops > 2 * sum(part.forward for part in found.parts.values())


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_script_finds_what_it_imports(name, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    importlib.import_module(name)


def test_a_part_of_the_gpus_figures_is_measured_at_small_sizes(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    gpu = importlib.import_module("gpu")
    output = tmp_path / "gpu.jsonl"
    setting = dataclasses.replace(gpu.setting_of(True, output), batch=2)
    assert gpu.run("lengths", 100, setting)
    monkeypatch.setitem(gpu.PARTS, "step", lambda setting: time.sleep(5))
    assert not gpu.run("step", 1, setting), "a part that takes too long makes room for the next"
    monkeypatch.setitem(gpu.PARTS, "memory", lambda setting: 1 / 0)
    assert not gpu.run("memory", 100, setting)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["what"] for line in lines] == [
        "first steps at eight new lengths, s",
        "lengths took",
        "step failed",
        "memory failed",
    ]
    assert lines[2]["error"] == "TimeoutError: not ready in 1 s"
    assert all(line["device"].startswith("CPU") for line in lines)
    assert set(gpu.PARTS) == set(re.findall(r"(\w+):\d+", (BENCHMARKS / "gpu.sh").read_text()))


def test_two_processes_exchange_gradients_while_the_backward_pass_goes_on_and_once_a_step(forks):
    command = [forks.python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(BENCHMARKS / "ddp.py"), "--small", "--batch", "2", "--rounds", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{BENCHMARKS}:{BENCHMARKS.parent}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    one_step = re.search(r"gradients: (\d+) buckets, the first exchanged after (\d\.\d+) of", done.stdout)
    assert one_step and int(one_step[1]) > 1 and float(one_step[2]) < 0.9
    assert f"4 batches a step: {one_step[1]} buckets exchanged" in done.stdout
