"""Weights, settings and training states, damaged: everything that is read when a model is loaded or a run
goes on."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import BertConfig, BertModel, OPTForCausalLM
from transformers.utils import logging as transformers_logging

from evlgen.common.registry import registry
from evlgen.files.digests import DIGESTS_FILE
from evlgen.models.connectors import ConnectorInputs, TomeFormer
from evlgen.models.language.opt import OPTLanguageModel
from evlgen.runners.checkpointer import Checkpointer
from evlgen.runners.optimizer import build_optimizer
from evlgen.runners.training_state import TrainingState
from fuzzing.mutate import mutate_json, mutate_pytorch, mutate_safetensors, mutate_yaml

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "evlgen_opt"


def prepare(folder: Path) -> None:
    """Whole checkpoints of every layout, out of the golden model."""
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    os.environ["HF_HUB_OFFLINE"] = "1"
    model = _model()
    model.save_pretrained(folder / "own")
    _save_run(model, folder / "run" / "checkpoints")
    shutil.copy(GOLDEN / "checkpoint_4.pth", folder / "published.pth")
    published = torch.load(GOLDEN / "checkpoint_4.pth", weights_only=True)
    torch.save(published, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    shutil.copytree(GOLDEN / "language", folder / "language")
    language = OPTForCausalLM.from_pretrained(folder / "language")
    shutil.copytree(GOLDEN / "language", folder / "pickled")
    (folder / "pickled" / "model.safetensors").unlink()
    torch.save(language.state_dict(), folder / "pickled" / "pytorch_model.bin")
    language.save_pretrained(folder / "sharded", max_shard_size="40KB")
    for file in GOLDEN.glob("language/*token*"):
        shutil.copy(file, folder / "sharded")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(**sizes, vocab_size=20, max_position_embeddings=17)).save_pretrained(folder / "bert")


@functools.cache
def _model():
    return registry.get_model_class("evlgen_opt").from_config(GOLDEN / "model.yaml")


@functools.cache
def _accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def _save_run(model, folder: Path) -> None:
    """A run's checkpoint after one step."""
    optimizer = build_optimizer(model, 1e-4, 0.05, 0.999)
    for weight in optimizer.param_groups[0]["params"]:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    with Checkpointer(folder, 1, {}, _accelerator()) as checkpointer:
        checkpointer.save(model, optimizer, TrainingState(iteration=3, epoch=1), {"seen": 12})
    (folder / "step_00000003" / DIGESTS_FILE).unlink()  # so that damage comes as far as what reads it


def _from_pretrained(path: Path) -> None:
    registry.get_model_class("evlgen_opt").from_pretrained(path)


def _load_checkpoint(path: Path) -> None:
    _model().load_checkpoint(path)


def _resume(path: Path) -> None:
    model = _model()
    optimizer = build_optimizer(model, 1e-4, 0.05, 0.999)
    checkpointer = Checkpointer(path.parent, 1, {}, _accelerator())
    checkpointer.resume(str(path), model, optimizer, TrainingState())
    optimizer.step()


def _language(path: Path) -> None:
    model = OPTLanguageModel(str(path))
    prompts = torch.zeros(1, 2, model.embed_dim)
    model.loss(prompts, ["a dog"])
    model.generate(prompts, [""], num_beams=1, max_length=2)


def _connector(path: Path) -> None:
    TomeFormer(ConnectorInputs(24, 16), num_layers=2, r=1, init=str(path))


def _vision(path: Path) -> None:
    from omegaconf import OmegaConf

    from evlgen.config.model_config import VisionConfig
    from evlgen.models.vision import build_vision_encoder

    section = OmegaConf.to_container(OmegaConf.load(GOLDEN / "model.yaml").model.vision)
    build_vision_encoder(VisionConfig(**{**section, "pretrained": str(path)}))


# what is loaded -> the files of it that are damaged, and how it is loaded
LAYOUTS: dict[str, tuple[tuple[str, ...], Callable[[Path], None]]] = {
    "own": (("model.safetensors", "config.yaml"), _from_pretrained),
    "published.pth": (("",), _load_checkpoint),
    "legacy.pth": (("",), _load_checkpoint),
    "run/checkpoints/step_00000003": (
        (
            *("training_state/progress.json", "training_state/optimizer.safetensors"),
            *("training_state/random.safetensors", "model.safetensors", "config.yaml"),
        ),
        _resume,
    ),
    "language": (
        (
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "model.safetensors",
        ),
        _language,
    ),
    "pickled": (("pytorch_model.bin",), _language),
    "sharded": (("model.safetensors.index.json", "*.safetensors"), _language),
    "bert": (("config.json", "model.safetensors"), _connector),
    "vision.safetensors": (("",), _vision),
}

_DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": mutate_json,
    ".yaml": mutate_yaml,
    ".safetensors": mutate_safetensors,
    ".pth": mutate_pytorch,
    ".bin": mutate_pytorch,
}


def damaged(
    folder: Path, rng: random.Random, keep: Callable[[Path], None]
) -> tuple[str, Callable[[], object]]:
    """One input: what it is, and what is done with it. ``folder``: of `prepare`."""
    layout = rng.choice(sorted(LAYOUTS))
    names, load = LAYOUTS[layout]
    name = rng.choice(names)
    whole = (
        GOLDEN / "vision_original_names.safetensors" if layout == "vision.safetensors" else folder / layout
    )
    files = sorted(whole.glob(name)) if name else [whole]
    file = rng.choice(files)
    content = _DAMAGES[file.suffix](file.read_bytes(), rng)

    def read() -> None:
        with _copy(whole, folder / "damaged" / layout) as copy:
            place = copy / file.relative_to(whole) if whole.is_dir() else copy
            place.unlink()
            place.write_bytes(content)
            keep(place)
            load(copy)

    return f"{layout} {file.name}", read


@contextlib.contextmanager
def _copy(whole: Path, copy: Path) -> Iterator[Path]:
    """A copy for as long as the block; of hard links, so that only what is damaged is written."""
    shutil.rmtree(copy, ignore_errors=True)
    copy.parent.mkdir(parents=True, exist_ok=True)
    if whole.is_dir():
        shutil.copytree(whole, copy, copy_function=os.link)
    else:
        shutil.copy(whole, copy)
    yield copy
