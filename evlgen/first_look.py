"""What a project file needs and this machine lacks, said before torch is imported.

All checks of a configuration come before those of its paths, and need the classes that it names. Where a file
sets no other keys than its model and its datasets have by default, its paths can be looked at first: one of
them is missing also where the value of another key is wrong.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evlgen.common.errors import ConfigError
from evlgen.common.plugins import ENTRY_POINT_GROUP
from evlgen.config.build_info import BuildInfo, DataFiles
from evlgen.config.catalogue import DATASETS
from evlgen.config.checks import EnvConfig, check_run
from evlgen.config.config import DEFAULTS, find_config
from evlgen.config.derived import drop_foreign_sources
from evlgen.config.layers import PROCESSOR_SECTIONS, Layers, builder_name, options_layer, read_layer
from evlgen.config.model_config import ModelConfig
from evlgen.config.problems import Problems
from evlgen.config.run_config import RunConfig
from evlgen.config.schema import build_dataclass, check_section
from evlgen.files.io import PACKAGE_ROOT, cache_root
from evlgen.weights.needed import (
    ENCODER_WEIGHTS,
    MissingAsset,
    language_parts,
    missing_encoder,
    missing_parts,
    refuse_missing,
    with_small_parts,
)

#: Options besides numbers and switches of ``run`` that no other check has to come before.
_HARMLESS = ("run.output_dir", "model.checkpoint")


def look_for_files(cfg_path: str | os.PathLike, options: Sequence[str], plugins: Sequence[str]) -> None:
    """Raises the `DataError` of `assemble.check_nothing_missing` where a project file lacks data or weights.
    Everything else is left to the checks of a run."""
    try:
        missing = what_is_missing(cfg_path, options, plugins)
    except ConfigError:
        return
    if missing is not None:
        refuse_missing(*missing)


def what_is_missing(
    cfg_path: str | os.PathLike, options: Sequence[str] = (), plugins: Sequence[str] = ()
) -> tuple[list[MissingAsset], list[str]] | None:
    """Weights and data that a project file needs and this machine lacks; None where only the classes that it
    names can say."""
    path = find_config(cfg_path)
    if plugins:
        return None
    if importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        return None
    file, given = read_layer(path), options_layer(options)
    if {"stages", "plugins"} & {*file.content} or not all(map(_is_harmless, _leaves(given.content))):
        return None
    model, datasets = (file.content.get(key) for key in ("model", "datasets"))
    if not isinstance(model, Mapping) or not isinstance(datasets, Mapping):
        return None
    arch, model_type = (str(model.get(key)) for key in ("arch", "model_type"))
    of_model = PACKAGE_ROOT / "configs" / "models" / arch / f"{model_type}.yaml"
    of_datasets = {name: DATASETS / f"{name}.yaml" for name in datasets}
    files = (of_model, *of_datasets.values())
    if not all(map(os.path.isfile, files)):
        return None
    if any(builder_name(name, section) != name for name, section in datasets.items()):
        return None
    known = [dataclasses.replace(read_layer(at), is_built_in=True) for at in files]
    problems = Problems(check_names=False)
    check_section(model, ModelConfig, "model", problems=problems)
    if not _sets_only(file.content, Layers(known).merged()):
        return None
    layers = Layers([read_layer(DEFAULTS), *known, file, given])
    merged = layers.merged()
    settings, env = merged.get("run", {}), merged.get("env", {})
    if not isinstance(settings, Mapping) or not isinstance(env, Mapping):
        return None
    check_section(env, EnvConfig, "env", problems=problems)
    drop_foreign_sources(merged["datasets"], layers, logging.DEBUG)
    run = check_run(settings, problems, list(merged["datasets"]))
    if run is None or len(problems) or (run.evaluate and not merged["model"].get("checkpoint")):
        return None
    weights = _missing_weights(merged["model"])
    root = cache_root(env.get("cache_root"))
    data = [_missing_data(name, section, root, run) for name, section in merged["datasets"].items()]
    if weights is None or None in data:
        return None
    return weights, [line for lines in data for line in lines or ()]


def _sets_only(content: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Whether all that a file says of its connector and its datasets are keys that their defaults have, so
    that none is misspelled."""
    parts = [(content["datasets"], known["datasets"])]
    if "connector" in content["model"]:
        parts.append((content["model"]["connector"], known["model"]["connector"]))
    return all(_has_keys(known, given) for given, known in parts)


def _has_keys(known: Any, given: Any) -> bool:
    if not isinstance(given, Mapping):
        return not isinstance(known, Mapping)
    return isinstance(known, Mapping) and all(
        key in PROCESSOR_SECTIONS or (key in known and _has_keys(known[key], value))
        for key, value in given.items()
    )


def _is_harmless(option: tuple[str, Any]) -> bool:
    key, value = option
    return key in _HARMLESS or (key.startswith("run.") and isinstance(value, bool | int | float))


def _leaves(content: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in content.items():
        inner = isinstance(value, Mapping)
        found += _leaves(value, f"{path}{key}.") if inner else [(f"{path}{key}", value)]
    return found


def _missing_weights(model: Mapping[str, Any]) -> list[MissingAsset] | None:
    if "language" not in model or "text" in model:
        return None  # another architecture's parts
    vision, language = model["vision"], model["language"]["name"]
    encoder, pretrained = vision["name"], vision.get("pretrained", True)
    parts = language_parts(language, model["connector"].get("init"))
    why = missing_encoder(ENCODER_WEIGHTS.get(encoder) if pretrained is True else pretrained)
    found = missing_parts(encoder, pretrained, why, parts, model.get("checkpoint"))
    return with_small_parts(found, (pretrained, *parts.values()))


def _missing_data(name: str, section: Mapping[str, Any], root: Path, run: RunConfig) -> list[str] | None:
    if name.startswith("shapes_"):
        return []
    build_info = section.get("build_info") or {}
    if not isinstance(build_info.get("annotations"), Mapping):
        return None
    info = build_dataclass(BuildInfo, build_info, f"datasets.{name}.build_info")
    splits = [split for split in run.wanted_splits() if split in info.annotations]
    storages = [info.images, info.videos, *(info.annotations[split] for split in splits)]
    if any("://" in str(source.storage) for source in storages if source is not None):
        return None
    files = DataFiles(name, root, info, section.get("data_type", "images"), lambda at: root / at)
    return files.missing(splits)
