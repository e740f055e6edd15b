"""Checkpoints from one layout to the other, file to folder and back. No model is built."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from evlgen.common.errors import CheckpointError
from evlgen.common.registry import registry
from evlgen.config.config import find_config, load_model_layers
from evlgen.config.layers import Layer, display, options_layer, read_layer
from evlgen.config.yaml_io import as_yaml_would_be, dump_yaml
from evlgen.files.io import atomic_file, make_readable, resolve, write_atomically
from evlgen.models.published.checkpoints import (
    PROJECTIONS,
    is_published,
    to_own_names,
    to_published_names,
)
from evlgen.models.published.transformers_format import read_transformers, transformers_type
from evlgen.models.published.transformers_writing import write_transformers
from evlgen.models.vlm import VLM
from evlgen.weights.checkpoints import CONFIG_FILE, WEIGHTS_FILE, is_checkpoint, write_folder
from evlgen.weights.hub import local_model_folder
from evlgen.weights.hub_checkpoints import is_hub_id
from evlgen.weights.weights import read_pickle, read_weights


def convert(
    source: str | Path,
    target: str | Path,
    layout: str,
    cfg_path: str | None = None,
    options: Sequence[str] = (),
    force: bool = False,
) -> str:
    """Writes a checkpoint in the other layout. Weights alone: no optimizer's state.

    Args:
        source: a published ``.pth``, or a folder with ``model.safetensors`` and ``config.yaml``, a run's
            checkpoint too; or a folder or hub id in transformers' format.
        target: the folder or the ``.pth``.
        layout: of the target, ``own``, ``published`` or ``transformers``.
        cfg_path: YAML file with the model section; None: the one that comes with the source.
        options: ``key=value``, over that section.
        force: whether an existing target of the same kind is replaced.

    Returns:
        A line that says what was written.

    Raises:
        CheckpointError: the source is damaged, refused, in that layout already, or of another model than the
            config; the target exists or cannot be written.
        ConfigError: problems in the model section.
    """
    named, source = source, Path(resolve(source))
    target = Path(os.path.expanduser(target)).absolute()
    _check_target(target, layout, force)
    if layout == "own" and (folder := _in_transformers_format(named, source)) is not None:
        return _from_transformers(folder, target, cfg_path, options)
    if layout == "transformers":
        return _to_transformers(source, target, cfg_path, options)
    state = read_weights(source)
    if is_published(state) == (layout == "published"):
        raise CheckpointError(f"{source} has {layout} names already, such as {next(iter(state))}.")
    layer = read_layer(find_config(cfg_path)) if cfg_path is not None else _layer_of(source)
    section: Any = OmegaConf.to_container(load_model_layers([layer, options_layer(options)]), resolve=True)
    section["checkpoint"] = None
    _check_temporal_form(state, section, source)
    try:
        number = (_write_own if layout == "own" else _write_published)(state, section, source, target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}.") from error
    return f"{target}: {number} weights of {section['arch']}, from {source}"


def _in_transformers_format(named: str | Path, source: Path) -> Path | None:
    """The folder of a model in transformers' format, fetched where it is one on the hub; None for others."""
    if os.path.isdir(source):
        return source if transformers_type(source) else None
    if os.path.lexists(source) or not is_hub_id(str(named)):
        return None
    folder = local_model_folder(str(named))
    return folder if transformers_type(folder) else None


def _from_transformers(source: Path, target: Path, cfg_path: str | None, options: Sequence[str]) -> str:
    if cfg_path is not None or options:
        raise CheckpointError(
            f"{source} says itself of what model it is: leave out --cfg-path and --options."
        )
    sections: list[dict[str, Any]] = []
    write_folder(target, lambda folder: sections.append(read_transformers(source, folder)))
    return f"{target}: {sections[0]['arch']}, with its frozen parts, from {source}"


def _to_transformers(source: Path, target: Path, cfg_path: str | None, options: Sequence[str]) -> str:
    layer = read_layer(find_config(cfg_path)) if cfg_path is not None else _layer_of(source)
    section = load_model_layers([layer, options_layer(options)])
    section.checkpoint = str(source)
    model_class = registry.get_model_class(section.arch)
    if not issubclass(model_class, VLM):
        raise CheckpointError(f"{section.arch} has no language model, and no equal in transformers' format.")
    model = model_class.from_config(section)
    names: list[str] = []
    write_folder(target, lambda folder: names.append(write_transformers(model, folder)))
    return f"{target}: transformers' {names[0]}, from {source}"


def _write_own(state: dict[str, Tensor], section: dict[str, Any], source: Path, target: Path) -> int:
    state = {name: value.contiguous() for name, value in to_own_names(state).items()}
    _check_sizes(state, section, source)

    def write(folder: Path) -> None:
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        make_readable(folder / WEIGHTS_FILE)
        write_atomically(folder / CONFIG_FILE, dump_yaml({"model": section}))

    write_folder(target, write)
    return len(state)


def _write_published(state: dict[str, Tensor], section: dict[str, Any], source: Path, target: Path) -> int:
    _check_sizes(state, section, source)
    if (section.get("vision") or {}).get("name") == "clip_L" and any(k.startswith("vision.") for k in state):
        raise CheckpointError(f"{source} holds weights of clip_L, whose published names are not written.")
    if (section.get("vision") or {}).get("norm_eps", 1) is None:
        raise CheckpointError(f"{source} has no ln_vision, which the published code computes with.")
    _check_published_place(state, source)
    _check_published_keys(section, source)
    published = to_published_names(state, _projection(section))
    with atomic_file(target, "wb") as file:
        torch.save({"model": published, "config": {"model": section}}, file)
    return len(published)


def _check_published_place(state: Mapping[str, Tensor], source: Path) -> None:
    """Raises `CheckpointError` for weights that the published code has no place for."""
    own = ("prompt_head.", "connector.proj_residual.")
    name = next((name for name in state if name.startswith(own)), None)
    if name is not None:
        raise CheckpointError(
            f"{source} holds {name}, which the published code has no place for. Train with "
            "model.soft_prompts: null and model.connector.residual: false to publish under its names."
        )


def _check_published_keys(section: Mapping[str, Any], source: Path) -> None:
    """Raises `CheckpointError` for settings that the published code does not compute with."""
    vision, language = (section.get(part) or {} for part in ("vision", "language"))
    found = {
        "model.vision.tiles": vision.get("tiles"),
        "model.vision.tome_r": vision.get("tome_r"),
        "model.language.tome": language.get("tome"),
    }
    keys = [key for key, value in found.items() if value]
    if keys:
        raise CheckpointError(
            f"{source} is of a model with {', '.join(keys)}, which the published code has no place for. "
            "Train without to publish under its names, or share the folder as it is: python -m evlgen push."
        )


def _check_target(target: Path, layout: str, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if not force:
        raise CheckpointError(f"{target} exists. Name another place, or replace it with --force.")
    kind, is_kind = {
        "own": ("folder of a checkpoint", is_checkpoint(target)),
        "published": ("file", target.is_file()),
        "transformers": ("folder of a model", (target / "config.json").is_file()),
    }[layout]
    if not is_kind:
        raise CheckpointError(f"{target} exists and is no {kind}: --force does not replace it.")


def _layer_of(source: Path) -> Layer:
    """What a checkpoint says of its model: a folder in its ``config.yaml``, a published file in its entry
    ``config``, which LAVIS's runners write."""
    if (source / CONFIG_FILE).is_file():
        return read_layer(source / CONFIG_FILE)
    content = read_pickle(source) if source.is_file() and source.suffix != ".safetensors" else None
    config = content.get("config") if isinstance(content, Mapping) else None
    if not isinstance(config, Mapping) or not isinstance(config.get("model"), Mapping):
        raise CheckpointError(f"{source} does not say of what model it is. Name a YAML file in --cfg-path.")
    name = display(source.absolute())
    return Layer(name, {"model": as_yaml_would_be(config["model"], f"the config in {name}")})


def _check_sizes(state: Mapping[str, Tensor], section: Mapping[str, Any], source: Path) -> None:
    """Raises `CheckpointError` where the config's connector is another one than that of the weights, as far
    as can be told without the language model."""
    connector = section["connector"]
    norm = state.get("connector.input_norm.weight")
    found = {
        "num_layers": len({key.split(".")[2] for key in state if key.startswith("connector.layers.")}),
        "hidden_size": 0 if norm is None else len(norm),
    }
    for key, size in found.items():
        if size and connector.get(key) not in (None, size):
            raise CheckpointError(
                f"{source} holds a connector of {key} {size}, and the config says {connector[key]}. Name the "
                "right YAML file in --cfg-path."
            )


def _check_temporal_form(state: Mapping[str, Tensor], section: Mapping[str, Any], source: Path) -> None:
    """Published code computes attention over the frames in the form `residual` alone, with the same weights
    as the other form has: raises `CheckpointError` where the config says another."""
    temporal = (section.get("vision") or {}).get("temporal") or {}
    form = temporal.get("form") or registry.get_model_class(section["arch"]).TEMPORAL
    if form != "residual" and any(".temporal_merge." in name for name in state):
        raise CheckpointError(
            f"{source} has attention over the frames. Its form is residual in published checkpoints, and "
            f"{form or 'none'} in the config. Where it was trained so, say so with --options "
            "model.vision.temporal.form=residual; the other form has no published layout."
        )


def _projection(section: Mapping[str, Any]) -> str:
    """The published name of the projection to the language model; it has none in a first stage."""
    cls = registry.get_model_class(section["arch"])
    if cls.LANGUAGE_MODEL is None:
        return PROJECTIONS["opt"]
    kind = (section.get("language") or {}).get("kind") or cls.LANGUAGE_MODEL
    if kind not in PROJECTIONS:
        raise CheckpointError(
            f"published checkpoints are of the language models {', '.join(PROJECTIONS)}, not of '{kind}'."
        )
    return PROJECTIONS[kind]
