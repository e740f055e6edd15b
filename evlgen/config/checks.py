"""What each section of a configuration may say: keys, types, values and names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evlgen.common.errors import did_you_mean
from evlgen.common.registry import registry
from evlgen.config.lavis import IGNORED_SECTIONS, run_from_lavis
from evlgen.config.layers import PROCESSOR_SECTIONS, Layers, builder_name
from evlgen.config.model_config import ModelConfig
from evlgen.config.run_config import RunConfig
from evlgen.config.schema import Problems, Registered, check_section, show, unknown_key

ARCH_IS_REQUIRED = "is required: the name of a registered model, such as evlgen_opt"
SECTIONS = ("plugins", "env", "model", "datasets", "run")


@dataclass(frozen=True)
class EnvConfig:
    """The ``env`` section: this machine."""

    #: Folder of data and downloads; the environment variable EVLGEN_CACHE wins; None: ~/.cache/evlgen.
    cache_root: str | None = None


@dataclass
class _TopLevel:
    plugins: list[str]


def check_structure(layers: Layers, problems: Problems) -> None:
    """Top-level sections, and the list of plugins. Imports nothing heavy."""
    for layer in layers.layers:
        for name, section in layer.content.items():
            if name in IGNORED_SECTIONS:
                continue
            if name not in SECTIONS:
                problems.add(str(name), unknown_key(name, (*SECTIONS, "stages")))
            elif name != "plugins" and not isinstance(section, Mapping):
                problems.add(name, f"must be a mapping of keys to values, not {show(section)}")
            elif name == "plugins":
                check_section({"plugins": section or []}, _TopLevel, problems=problems)


def check_run(
    section: Mapping[str, Any], problems: Problems, datasets: list[str] | None = None
) -> RunConfig | None:
    """The ``run`` section as a `RunConfig`; None where it has problems.

    Args:
        section: the section, with LAVIS's names or this project's.
        problems: where problems are noted; its ``check_names`` decides whether registry names are checked.
        datasets: names of the configured datasets, which ``train_dataset_ratios`` may name.
    """
    before = len(problems)
    if not isinstance(section.get("amp", False), bool):
        problems.add("run.amp", f"must be bool, not {show(section['amp'])}")
        section = {key: value for key, value in section.items() if key != "amp"}
    translated, _ = run_from_lavis(section)
    if "lr_layer_decay" in translated:
        problems.add("run.lr_layer_decay", "all layers learn at one rate here: take it out, or set it to 1")
        del translated["lr_layer_decay"]
    values = check_section(translated, RunConfig, "run", problems=problems)
    if len(problems) > before:
        return None
    run = RunConfig(**values)
    for key, message in run.problems(datasets) if section else ():
        problems.add(f"run.{key}", message)
    return run


def check_model(section: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """The ``model`` section: the architecture's own dataclass, its type, and the connector's parameters."""
    arch, model_type = section.get("arch"), section.get("model_type")
    if "arch" not in section:
        problems.add("model.arch", ARCH_IS_REQUIRED)
        return dict(section)
    if not isinstance(arch, str) or not registry.has("model", arch):
        # What else the section may say depends on the architecture.
        check_section({"arch": arch}, ModelConfig, "model", problems=problems)
        return dict(section)
    cls = registry.get_model_class(arch)
    if model_type is not None and (not isinstance(model_type, str) or model_type not in cls.MODEL_TYPES):
        hint = did_you_mean(str(model_type), cls.MODEL_TYPES)
        known = ", ".join(cls.MODEL_TYPES) or "none"
        problems.add("model.model_type", f"{arch} has no type {show(model_type)}.{hint} Known: {known}")
        return dict(section)
    values = check_section(section, cls.CONFIG, "model", problems=problems)
    if isinstance(values.get("connector"), Mapping):
        values["connector"] = check_part(values["connector"], "connector", "model.connector", problems)
    return values


def check_together(model: Mapping[str, Any], run: RunConfig | None, problems: Problems) -> None:
    """What a ``model`` and a ``run`` section, each right in itself, ask for that cannot be together."""
    if run is not None and run.shard_language:
        _check_sharding(model, problems)
    language, vision = model.get("language"), model.get("vision")
    if run is not None and run.compile and isinstance(language, Mapping) and language.get("tome"):
        why = (
            "soft prompts that merge inside the language model (model.language.tome) give other shapes to its"
        )
        problems.add("run.compile", f"{why} layers. Set one of them to false or null")
    if run is None or not isinstance(vision, Mapping):
        return
    trains = not run.evaluate
    if trains and run.encode_ahead and (vision.get("freeze") is False or vision.get("tiles")):
        why = "only whole images of a frozen vision encoder are encoded ahead"
        remedy = "Set model.vision.freeze: true and model.vision.tiles: null, or this to false"
        problems.add("run.encode_ahead", f"{why}. {remedy}")
    keeps = trains and run.cache_vision
    if not (keeps or run.cache_vision_eval):
        return
    key = "run.cache_vision" if keeps else "run.cache_vision_eval"
    temporal = vision.get("temporal") or {}
    if vision.get("freeze") is False:
        why = "a trained vision encoder gives other tokens at every step: nothing can be kept"
        problems.add(key, f"{why}. Set model.vision.freeze: true, or this to false")
    elif vision.get("tiles"):
        why = "images have different numbers of tiles, whose tokens are not kept"
        problems.add(key, f"{why}. Set model.vision.tiles: null, or this to false")
    elif isinstance(temporal, Mapping) and temporal.get("form") in ("average", "residual"):
        why = "temporal attention is trained inside the vision encoder: its tokens cannot be kept"
        problems.add(key, f"{why}. Set model.vision.temporal.form: mean, or this to false")


def _check_sharding(model: Mapping[str, Any], problems: Problems) -> None:
    """Whether ``run.shard_language`` can be."""
    arch, language = model.get("arch"), model.get("language")
    if registry.has("model", arch) and language is None:
        why = f"model.arch: {arch} has no language model to spread over the processes"
        problems.add("run.shard_language", f"{why}. Set it to false")
    elif isinstance(language, Mapping) and language.get("quantization", "none") != "none":
        why = "quantised weights cannot be spread over the processes"
        problems.add("run.shard_language", f"{why}. Set model.language.quantization: none, or this to false")
    elif isinstance(language, Mapping) and language.get("precision") == "fp8":
        why = "weights in float8 cannot be spread over the processes"
        problems.add("run.shard_language", f"{why}. Set model.language.precision: auto, or this to false")


def check_datasets(section: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """The ``datasets`` section: each builder's parameters, and the processors' parameters.

    A section is called as its dataset is registered, or as one likes and names that in ``builder``.
    """
    out = {}
    known = registry.list_datasets()
    for name, dataset in section.items():
        path = f"datasets.{name}"
        builder = builder_name(name, dataset)
        if not registry.has("builder", builder):
            at, what = (
                (path, "under this name") if builder == name else (f"{path}.builder", f"as {show(builder)}")
            )
            hint, remedy = did_you_mean(str(builder), known), "A name of your own needs a `builder:` of these"
            problems.add(at, f"no dataset is registered {what}.{hint} Known: {', '.join(known)}. {remedy}")
            continue
        cls = registry.get_builder_class(builder)
        named = {"builder": builder} if builder != name else {}
        if named or (isinstance(dataset, Mapping) and "builder" in dataset):
            dataset = {key: value for key, value in dataset.items() if key != "builder"}
        values = named | check_section(dataset, cls, path, ignore=cls.FROM_FRAMEWORK, problems=problems)
        for key in PROCESSOR_SECTIONS:
            if isinstance(values.get(key), Mapping):
                values[key] = _check_processors(values[key], f"{path}.{key}", problems)
        out[name] = values
    return out


def check_part(section: Mapping[str, Any], kind: str, path: str, problems: Problems) -> dict[str, Any]:
    """A section ``{name: ..., <parameters of the registered class>}``."""
    name = section.get("name")
    if name is None:
        problems.add(
            f"{path}.name", f"is required: a registered {kind}. Known: {', '.join(registry.names(kind))}"
        )
        return dict(section)
    message = Registered(kind).problem(name)
    if message:
        problems.add(f"{path}.name", message)
        return dict(section)
    cls = registry.get(kind, name)
    parameters = {key: value for key, value in section.items() if key != "name"}
    ignore = (*getattr(cls, "FROM_FRAMEWORK", ()), "name")
    return {"name": name, **check_section(parameters, cls, path, ignore=ignore, problems=problems)}


def _check_processors(section: Mapping[str, Any], path: str, problems: Problems) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for split, processor in section.items():
        at = f"{path}.{split}"
        if split not in ("train", "eval"):
            problems.add(at, unknown_key(split, ("train", "eval")))
        elif isinstance(processor, Mapping):
            out[split] = check_part(processor, "processor", at, problems)
        else:
            problems.add(at, f"must be a mapping with the processor's name, not {show(processor)}")
    return out
