"""A checkpoint as a folder for others: the weights, a configuration without paths of this machine, and, where
asked for, the frozen parts that lie nowhere else."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from omegaconf import OmegaConf

from evlgen.common.errors import CheckpointError
from evlgen.common.safe_text import shown_name
from evlgen.config.config import load_model_layers
from evlgen.config.layers import options_layer, read_layer
from evlgen.config.yaml_io import dump_yaml, read_yaml
from evlgen.files.digests import check_digests, write_digests
from evlgen.files.io import CACHE_PREFIX, make_readable, resolve, scheme_of, write_atomically
from evlgen.models.connectors.bert_weights import BertSizes, bert_sizes
from evlgen.weights.checkpoints import CONFIG_FILE, WEIGHTS_FILE, is_checkpoint
from evlgen.weights.hub import looks_like_path
from evlgen.weights.hub_checkpoints import PARTS_FOLDER
from evlgen.weights.weights import read_weights

_TEMPLATE = ("language", "chat_template")  # the author's own text, which always goes along
# The keys of the model section that may name a file or folder here, and what that is called among the parts.
_PARTS = {
    ("vision", "pretrained"): "vision",
    ("language", "name"): "language",
    ("text", "tokenizer"): "tokenizer",
    _TEMPLATE: "chat_template",
}
_TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_OF_THIS_MACHINE = ("output_dir", "resume")  # keys of the run section


def checkpoint_of(path: str | Path) -> Path:
    """The folder of a checkpoint: the one named, or the best or the newest one of a run.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(path).expanduser().absolute()
    places = [folder, folder / "checkpoints" / "best", folder / "checkpoints" / "latest"]
    found = next((place for place in places if is_checkpoint(place)), None)
    if found is None:
        raise CheckpointError(f"{folder} is neither a checkpoint nor the folder of a run that has one.")
    return found.resolve()


def copy_for_others(
    source: Path, target: Path, options: Sequence[str] = (), with_parts: bool = False
) -> dict[str, Any]:
    """Fills a folder with what others need of a checkpoint.

    Args:
        source: the folder of a checkpoint.
        target: an existing folder.
        options: ``model.key=value``, over the checkpoint's configuration: such as the hub id of a part that
            was trained with from a local folder.
        with_parts: copy frozen parts that lie on this machine alone into the folder too.

    Returns:
        The configuration that was written.

    Raises:
        CheckpointError: the checkpoint is damaged, or needs a part that only this machine has.
        ConfigError: the configuration and the options do not fit.
    """
    check_digests(source, [WEIGHTS_FILE])
    read_weights(source)  # memory-mapped: finds out whether it is whole
    config = read_yaml(source / CONFIG_FILE)
    layers = [read_layer(source / CONFIG_FILE), options_layer(options)]
    section: Any = OmegaConf.to_container(load_model_layers(layers), resolve=True)
    section["checkpoint"] = None
    _without_local_start(section)
    local = dict(_local_parts(section, with_parts))
    parts = {key: value for key, value in local.items() if key != _TEMPLATE}
    if parts and not with_parts:
        named = "; ".join(f"model.{'.'.join(key)}: {shown_name(value)}" for key, value in parts.items())
        raise CheckpointError(
            f"{source} needs parts that only this machine has: {named}. Name what others can get, such as "
            "--options model.language.name=facebook/opt-2.7b, or copy them along with --with-parts, where "
            "their licences allow it."
        )
    for key, value in local.items():
        section[key[0]][key[1]] = _copy_part(value, target, _PARTS[key])
    plugins = [_plugin_name(str(name)) for name in config.get("plugins") or []]
    content: dict[str, Any] = {"plugins": plugins, "model": section} if plugins else {"model": section}
    for name in ("datasets", "run"):
        if isinstance(config.get(name), Mapping):
            content[name] = _without_folders(config[name])
    for name in _OF_THIS_MACHINE:
        content.get("run", {}).pop(name, None)
    shutil.copyfile(source / WEIGHTS_FILE, target / WEIGHTS_FILE)
    make_readable(target / WEIGHTS_FILE)
    write_atomically(target / CONFIG_FILE, dump_yaml(content))
    write_digests(target)
    return content


def _local_parts(section: Mapping[str, Any], with_cache: bool) -> Iterator[tuple[tuple[str, str], str]]:
    """The keys whose values name something on this machine.

    Args:
        with_cache: also what lies below the data root (``cache://``), which others may have fetched.
    """
    for key in _PARTS:
        value = (section.get(key[0]) or {}).get(key[1])
        if not isinstance(value, str):
            continue
        if value.startswith(CACHE_PREFIX):
            if with_cache:
                yield key, value
        elif scheme_of(value) in (None, "file") and (looks_like_path(value) or os.path.exists(value)):
            yield key, value


def _copy_part(value: str, target: Path, name: str) -> str:
    """Copies a part; how the configuration names it there."""
    source = Path(resolve(value))
    if not source.exists():
        raise CheckpointError(f"the {name} part is not at {source}.")
    if source.is_file():
        place = PurePath(PARTS_FOLDER, name + source.suffix)
        (target / PARTS_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(source, target / place)
        return f"./{place.as_posix()}"
    folder = target / PARTS_FOLDER / name
    folder.mkdir(parents=True)
    suffixes = _TEXT_SUFFIXES if name == "tokenizer" else (*_TEXT_SUFFIXES, *_WEIGHT_SUFFIXES)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in suffixes:
            shutil.copyfile(file, folder / file.name)
    return f"./{PARTS_FOLDER}/{name}"


def _without_local_start(section: dict[str, Any]) -> None:
    """What a connector started from is not needed once it is trained: where that lies on this machine, its
    sizes take its place."""
    connector = section.get("connector") or {}
    start = connector.get("init")
    if not isinstance(start, str) or scheme_of(start) not in (None, "file", "cache"):
        return
    if not (start.startswith(CACHE_PREFIX) or looks_like_path(start) or os.path.exists(start)):
        return
    names = [field.name for field in dataclasses.fields(BertSizes)]
    given = {name: connector.get(name) for name in names}
    sizes = bert_sizes(start, connector.get("num_layers", 12), **given)
    if connector.get("name") == "qformer":
        names.remove("max_position_embeddings")  # queries have no positions
    connector.update(init=None, **{name: getattr(sizes, name) for name in names})
    connector.pop("init_lr_scale", None)


def _plugin_name(name: str) -> str:
    return PurePath(name).name if name.endswith(".py") else name


def _without_folders(value: Any) -> Any:
    """Plain values with absolute paths cut down to their last part."""
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    is_path = isinstance(value, str) and (os.path.isabs(value) or value.startswith("~"))
    return PurePath(value).name if is_path else copy.copy(value)
