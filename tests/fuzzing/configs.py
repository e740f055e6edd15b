"""Project files and options: packaged files damaged, and configurations put together from keys there are and
values of every kind."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import yaml
from hypothesis import strategies as st

from evlgen.assemble import (
    check_image_sizes,
    check_nothing_missing,
    check_splits,
    make_builders,
)
from evlgen.common.errors import EVLGenError
from evlgen.config.config import Config, load_model_file
from evlgen.config.layers import MODEL_PARTS
from evlgen.config.model_config import ModelConfig
from evlgen.config.run_config import RunConfig
from evlgen.config.schema import parameters_of
from evlgen.files.io import PACKAGE_ROOT
from fuzzing.mutate import VALUES, dump_yaml, mutate, mutate_tree

PROJECTS = sorted(
    [*PACKAGE_ROOT.glob("projects/*/*.yaml"), *PACKAGE_ROOT.glob("configs/**/*.yaml")]
    + [*PACKAGE_ROOT.glob("assets/*/connector/config.yaml")]
)
_NAMES = (
    *(
        "model",
        "datasets",
        "run",
        "env",
        "plugins",
        "arch",
        "model_type",
        "checkpoint",
        "vision",
        "connector",
    ),
    *(
        "language",
        "prompt",
        "max_txt_len",
        "name",
        "image_size",
        "pretrained",
        "freeze",
        "precision",
        "kwargs",
    ),
    *("num_layers", "r", "init", "hidden_size", "num_attention_heads", "coco_caption", "shapes_caption"),
    *("vis_processor", "text_processor", "train", "eval", "build_info", "annotations", "images", "storage"),
    *("url", "md5", "ground_truth", "val", "train_size", "seed", "task", "runner", "lr_sched", "init_lr"),
    *("min_lr", "max_epoch", "max_iters", "batch_size_train", "train_splits", "metrics", "amp", "resume"),
    *("train_dataset_ratios", "cache_root", "output_dir", "num_beams", "keep_last", "drop_path_rate"),
    *("tome_r", "vit_model", "freeze_vit", "opt_model", "load_finetuned", "finetuned", "type", "device"),
)
_TEXTS = (
    *("evlgen_opt", "tomeformer", "eva_clip_g", "shapes", "captioning", "linear_warmup_cosine_lr", "bf16"),
    *("liptome_opt", "liptome_video_opt", "blip2_t5", "pretrain_flant5xl_vitL"),
    *("pretrain_opt2.7b", "blip2_image_train", "blip_caption", "runner_base", "auto", "facebook/opt-2.7b"),
    *(
        "${model}",
        "${run.seed}",
        "${..name}",
        "${a}${a}",
        "${oc.env:HOME}",
        "${oc.create:{a: 1}}",
        "${",
        "???",
    ),
    *("\\${x}", "../../etc/passwd", "/dev/zero", "~", "~nobody/x", "http://[", "evlgen://../../x", "1e-4"),
    *(
        "1" * 400,
        "nan",
        "-.inf",
        "\u202e",
        "\x85",
        "a" * 5000,
        "bert-base-uncased",
        "none.py",
        "x" * 300 + ".py",
    ),
)
# three texts in four are such that YAML lets pass, so that something comes after YAML
_text = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=20)
_text |= _text | _text | st.text(max_size=20)
_keys = st.sampled_from(_NAMES) | st.sampled_from(_NAMES) | _text
_scalars = (
    st.sampled_from(_TEXTS) | _text | st.none() | st.booleans() | st.floats() | st.floats(0, 1)
    | st.integers(-3, 300) | st.integers(-3, 300) | st.integers()
)  # fmt: skip
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=5),
    max_leaves=20,
)
_sections = st.dictionaries(_keys, _values, max_size=8)


def _mostly(usual: st.SearchStrategy, other: st.SearchStrategy) -> st.SearchStrategy:
    """``other`` once in ten times, so that most inputs pass the first checks and reach those after them."""
    return st.integers(0, 9).flatmap(lambda n: other if n == 0 else usual)


def _section_of(target: type) -> st.SearchStrategy:
    """A section with some of the keys that a dataclass has, and values that are often of the right type."""
    return st.fixed_dictionaries({}, optional={n: _scalars | _values for n in parameters_of(target)})


_part = st.fixed_dictionaries(
    {}, optional={"name": st.sampled_from(_TEXTS) | _values, "image_size": _scalars, "kwargs": _sections}
)
_model = st.builds(
    lambda arch, keys, parts: {**keys, **parts, "arch": arch},
    _mostly(st.just("evlgen_opt"), _values),
    _mostly(st.just({}), _section_of(ModelConfig)),
    st.fixed_dictionaries({}, optional={p: _mostly(_part, _values) for p in MODEL_PARTS}),
)
_datasets = st.dictionaries(
    _mostly(st.sampled_from(["coco_caption", "shapes_caption"]), _keys),
    _mostly(st.just({}), _sections),
    max_size=3,
)  # fmt: skip
_structured = st.fixed_dictionaries(
    {"model": _mostly(_model, _values)},
    optional={
        "datasets": _mostly(_datasets, _values),
        "run": _mostly(_section_of(RunConfig) | st.just({"max_epoch": 2}), _values),
        "env": _mostly(st.fixed_dictionaries({"cache_root": _scalars}), _values),
    },
)
_options = st.lists(
    st.builds(
        lambda path, value: f"{path}={value}",
        st.lists(st.sampled_from(_NAMES), min_size=1, max_size=4).map(".".join) | st.text(max_size=20),
        _scalars.map(lambda v: json.dumps(v, default=str)) | st.text(max_size=20),
    ),
    max_size=3,
)

_randoms = st.integers(0, 2**32).map(random.Random)
inputs = st.tuples(_randoms | _randoms | _structured, st.just([]) | _options)


def action(folder: Path, drawn: tuple, keep: Callable[[Path], None]) -> Callable[[], object]:
    """What is done with one input: read as a project, written, read again; and read as a model's file."""
    source, options = drawn
    path = folder / "project.yaml"
    path.write_bytes(_damaged(source) if isinstance(source, random.Random) else dump_yaml(source))
    keep(path)

    def read() -> None:
        try:
            config = Config.load(path, options)
        except EVLGenError:
            load_model_file(path)
            raise
        with contextlib.suppress(EVLGenError):
            load_model_file(path)
        if config.run.problems(list(config.datasets)):  # no `run` section: nothing to run, so nothing to save
            return
        saved = folder / "saved.yaml"
        config.save(saved)
        try:
            again = Config.load(saved)
        except EVLGenError as error:
            raise AssertionError("a saved configuration cannot be read back") from error
        assert again.to_dict() == config.to_dict(), "a saved configuration reads back as another one"
        _prepared(config)

    return read


def _prepared(config: Config) -> None:
    """What `assemble.run` does with a configuration before it loads anything."""
    check_image_sizes(config)
    builders = make_builders(config)
    check_splits(config, builders)
    check_nothing_missing(config, builders)


def _damaged(rng: random.Random) -> bytes:
    """A packaged file with other bytes, or with other values; a part's defaults in a project around them."""
    file = rng.choice(PROJECTS)
    if rng.random() < 0.35:
        return mutate(file.read_bytes(), rng)
    tree = yaml.safe_load(file.read_bytes()) or {}
    whole = {"model": {"arch": "evlgen_opt"}, "datasets": {"shapes_caption": {}}, "run": {"max_epoch": 2}}
    return dump_yaml(mutate_tree({**whole, **tree}, rng, (*VALUES, *_TEXTS, *_TEXTS)))


def prepare(folder: Path) -> None:
    """Nothing that a configuration names is at the data root."""
    os.environ["EVLGEN_CACHE"] = str(folder / "cache")
    os.environ["HF_HUB_OFFLINE"] = "1"
