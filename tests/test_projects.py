"""Every project file that is shipped trains a step, or evaluates, with tiny parts on small data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from data_root import make_data_root

from evlgen.assemble import run, run_stages
from evlgen.common.registry import registry
from evlgen.config.config import Config, load_model_config, load_stages
from evlgen.files.io import PACKAGE_ROOT

ROOT = Path(__file__).resolve().parent.parent
PROJECTS = sorted(p.relative_to(PACKAGE_ROOT).as_posix() for p in PACKAGE_ROOT.glob("projects/**/*.yaml"))
#: what makes a run short, whatever its length and decoding are
SHORT = [
    *("run.batch_size_train=2", "run.batch_size_eval=2", "run.num_workers=0", "run.max_eval_samples=2"),
    *("run.max_len=4", "run.min_len=1", "run.num_beams=2", "run.tensorboard=false", "run.precision=fp32"),
    *("run.metrics=[bleu,cider]", "run.apply_lemmatizer=false"),  # which needs spaCy
]
ONE_STEP = ["run.max_epoch=null", "run.max_iters=1", "run.iters_per_inner_epoch=null"]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    real = ROOT.parent / "shared" / "data" / "lavis_cache"
    return make_data_root(tmp_path_factory.mktemp("cache"), real if real.is_dir() else None)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory) -> Path:
    """A LLaMA of a few thousand weights with the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(PACKAGE_ROOT / "assets/shapes/language")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes)
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_parts(tiny_llama):
    """Options that put tiny parts into an architecture: those of its type `shapes` where it has one."""

    def options(arch: str) -> list[str]:
        if "shapes" in registry.get_model_class(arch).MODEL_TYPES:
            return ["model.model_type=shapes", "model.checkpoint=null"]
        shapes = load_model_config("evlgen_opt", "shapes")
        parts = {"vision": dict(shapes.vision), "connector": {**shapes.connector, "init": None}}
        parts["vision"]["kwargs"] = dict(shapes.vision.kwargs)
        return [
            *(f"model.{key}={json.dumps(value)}" for key, value in parts.items()),
            f"model.language={{name: {tiny_llama}}}",
        ]

    return options


@pytest.mark.parametrize("project", PROJECTS)
def test_a_project_runs_with_tiny_parts(project, data_root, tiny_parts, tmp_path, monkeypatch):
    monkeypatch.setenv("EVLGEN_CACHE", str(data_root))
    asked = Config.load(project)
    options = [*SHORT, *tiny_parts(asked.model.arch)]
    options += [f"datasets.{name}.train_size=40" for name in asked.datasets if name.startswith("shapes_")]
    options.append(f"run.output_dir={tmp_path / 'output'}")
    if not asked.run.evaluate:
        stages = load_stages(project, [*options, *ONE_STEP])
        scores = run_stages(stages)
        folders = [Path(cfg.run.output_dir) / "latest" for cfg in stages]
        assert all((f / "checkpoints" / "latest" / "model.safetensors").is_file() for f in folders)
        assert {key.rpartition("/")[2] for key in scores} == set(stages[-1].run.test_splits)
        losses = [json.loads(line) for folder in folders for line in (folder / "log.jsonl").open()]
        assert all(torch.tensor(line["loss"]).isfinite() for line in losses if line["type"] == "train")
        return
    cfg = Config.load(project, options)
    registry.get_model_class(cfg.model.arch).from_config(cfg.model).save_pretrained(tmp_path / "model")
    scores = run(Config.load(project, [*options, f"model.checkpoint={tmp_path / 'model'}"]))
    assert set(scores) == set(cfg.run.test_splits)
    written = list((tmp_path / "output" / "latest" / "result").rglob("*.json"))
    assert written, "the texts are written down"
