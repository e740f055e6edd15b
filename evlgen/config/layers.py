"""Layers of configuration: which keys each file gives, what they are together, and where each came from."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evlgen.common.errors import ConfigError, did_you_mean
from evlgen.config.references import References
from evlgen.config.yaml_io import parse_options, read_yaml
from evlgen.files.io import PACKAGE_PREFIX, PACKAGE_ROOT
from evlgen.weights.hub import looks_like_path

logger = logging.getLogger(__name__)

OPTIONS = "--options"

KeyPath = tuple[str, ...]

# Keys that may be paths: one that exists beside the YAML file is meant; otherwise the text stays as it is: a
# path from the working folder, a hub id, a name or an address.
PATH_KEYS = (
    ("model", "checkpoint"),
    ("model", "vision", "name"),
    ("model", "vision", "pretrained"),
    ("model", "text", "tokenizer"),
    ("model", "connector", "init"),
    ("model", "language", "name"),
    ("model", "language", "chat_template"),
    *(("model", key) for key in ("finetuned", "pretrained", "opt_model", "llm_model", "t5_model")),  # LAVIS's
)
# When a layer names another part, these keys of the layers below belong to the old one; None is all of them.
PART_KEYS: dict[tuple[str, ...], frozenset[str] | None] = {
    ("model", "connector"): None,
    ("model", "vision"): frozenset({"kwargs", "pretrained"}),
    ("model", "language"): frozenset({"kind", "chat_template"}),
}
MODEL_PARTS = ("vision", "connector", "language")
# Mappings whose keys are the user's own names: given as a whole by an option, the layers below add nothing.
NAMED_VALUES: tuple[tuple[str, ...], ...] = (("run", "train_dataset_ratios"), ("run", "lr_scale"))
# What one of them is called; an option that sets it to null leaves it out.
_NAMED = {"datasets": "dataset", "train_dataset_ratios": "weight", "lr_scale": "factor"}
PROCESSOR_SECTIONS = ("vis_processor", "text_processor")


@dataclass
class Layer:
    """What one file (or the command line) says. ``source`` is what messages call it; ``is_built_in`` marks a
    type's or a dataset's own defaults; ``replaces`` are those of `NAMED_VALUES` that it gives as a whole;
    ``left_out`` says which keys of the layers below went because it names another part."""

    source: str
    content: dict[str, Any]
    is_built_in: bool = False
    replaces: tuple[KeyPath, ...] = ()
    left_out: tuple[str, ...] = ()


def read_layer(path: Path) -> Layer:
    """The layer of a YAML file, its relative paths looked up beside it."""
    content = read_yaml(path)
    stages = content.get("stages")
    for section in [content, *(stages if isinstance(stages, list) else ())]:
        if isinstance(section, dict):
            _resolve_paths(section, path.parent)
    return Layer(display(path), content)


def options_layer(options: Sequence[str]) -> Layer:
    """The layer of ``--options``; relative paths stay relative to the working folder. ``datasets.NAME=null``
    drops a dataset of the layers below, and its weight in ``run.train_dataset_ratios``; so does
    ``run.train_dataset_ratios.NAME=null`` the weight alone."""
    given = {option.partition("=")[0].strip() for option in options}
    replaces = tuple(path for path in NAMED_VALUES if ".".join(path) in given)
    return Layer(OPTIONS, parse_options(options), replaces=replaces)


def builder_name(name: str, section: Any) -> Any:
    """The registered dataset that a section of ``datasets`` is one of: its ``builder``, else its own name."""
    return section.get("builder", name) if isinstance(section, Mapping) else name


def display(path: Path) -> str:
    """A path as messages show it: short where it lies in the package or under the working folder."""
    for folder in (Path.cwd(), PACKAGE_ROOT.parent):
        if path.is_relative_to(folder):
            return str(path.relative_to(folder))
    return str(path)


class Layers:
    """Layers from the weakest to the strongest. Where one names another part, the old part's keys go.

    Args:
        layers: the weakest first.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = [dataclasses.replace(layer, content=copy.deepcopy(layer.content)) for layer in layers]
        for i, layer in enumerate(self.layers):
            if layer.source == OPTIONS:
                _drop_named(layer, self.layers[:i])
            for section, key in layer.replaces:
                for lower in self.layers[:i]:
                    _discard(lower.content, section, key)
            layer.content = _without_empty(layer.content)
        for path, keys in self._parts():
            _drop_replaced(self.layers, path, keys)

    def merged(self) -> dict[str, Any]:
        """All layers as one plain dict, references followed.

        Raises:
            ConfigError: a reference leads nowhere or is refused (`References`), or a ``???`` is left.
        """
        return self._find(())

    def has(self, key_path: str) -> bool:
        """Whether any layer has the key, be it null."""
        return any(_has(layer.content, tuple(key_path.split("."))) for layer in self.layers)

    def get(self, key_path: str) -> Any:
        """The strongest layer's value at a key path, references followed; None where no layer has it."""
        try:
            return self._find(key_path.split("."))
        except KeyError:
            return None

    def source(self, key_path: str) -> str:
        """The file (or ``--options``) a key, or else its section, came from; "" where no layer has it."""
        path = tuple(key_path.partition("[")[0].split("."))
        layers = self.layers
        while path:
            for layer in reversed(layers):
                if _has(layer.content, path):
                    return layer.source
            path = path[:-1]
            layers = [
                layer for layer in self.layers if layer.source != OPTIONS
            ]  # a file is where a key is missing
        return ""

    def is_left_behind(self, key_path: str, other: str) -> bool:
        """Whether a key still has its built-in value where a stronger layer gives ``other`` one that is not
        built in. A value that somebody set, or set together with ``other``, is never left behind."""
        place, is_built_in = self._place(key_path)
        other_place, other_is_built_in = self._place(other)
        return 0 <= place < other_place and is_built_in and not other_is_built_in

    def is_built_in(self, key_path: str) -> bool:
        """Whether a key has the value that a type's or a dataset's own defaults give it."""
        return self._place(key_path.partition("[")[0])[1]

    def _place(self, key_path: str) -> tuple[int, bool]:
        """The strongest layer that has a key (-1: none), and whether its value is one that is built in; a
        saved configuration repeats those."""
        path = tuple(key_path.split("."))
        places = [i for i, layer in enumerate(self.layers) if _has(layer.content, path)]
        if not places:
            return -1, False
        value = _get(self.layers[places[-1]].content, path)
        built_in = [_get(layer.content, path) for layer in self.layers if layer.is_built_in]
        return places[-1], value in built_in

    def log_left_out(self) -> None:
        """Logs which keys went with the parts they belonged to; for a configuration that is not refused."""
        for layer in self.layers:
            for line in layer.left_out:
                logger.info("%s", line)

    def section_names(self, section: str) -> list[str]:
        """Keys that any layer has in a top-level section, in the order of first mention."""
        names: dict[str, None] = {}
        for layer in self.layers:
            content = layer.content.get(section)
            names.update(dict.fromkeys(content if isinstance(content, dict) else ()))
        return list(names)

    def _find(self, keys: Sequence[str]) -> Any:
        merged: dict[str, Any] = {}
        for layer in self.layers:
            merged = _overlaid(merged, layer.content)
        try:
            return References(merged, self.source).find(keys)
        except RecursionError as error:
            raise ConfigError("the references ${..} lead on and on.") from error

    def _parts(self) -> Iterator[tuple[KeyPath, frozenset[str] | None]]:
        yield from PART_KEYS.items()
        for dataset in self.section_names("datasets"):
            for section in PROCESSOR_SECTIONS:
                for split in ("train", "eval"):
                    yield ("datasets", dataset, section, split), None


def _overlaid(lower: Any, upper: Any) -> Any:
    """Two plain values: mappings merged key by key, else the upper one. ``???`` hides nothing below it."""
    if not isinstance(lower, dict) or not isinstance(upper, dict):
        return upper
    merged = dict(lower)
    for key, value in upper.items():
        if value != "???" or key not in merged:
            merged[key] = _overlaid(merged.get(key), value)
    return merged


def _without_empty(content: dict[str, Any]) -> dict[str, Any]:
    """``coco_caption:`` with nothing after it is an empty section, not a null that hides the layers below."""
    content = {key: {} if value is None else value for key, value in content.items()}
    for name, sections in (("datasets", None), ("model", MODEL_PARTS)):
        if isinstance(content.get(name), dict):
            content[name] = {
                key: {} if value is None and (sections is None or key in sections) else value
                for key, value in content[name].items()
            }
    return content


def _drop_named(options: Layer, lower: Sequence[Layer]) -> None:
    """Takes the datasets, and the values of `NAMED_VALUES`, that ``options`` sets to null out of all layers.

    Raises:
        ConfigError: no layer has one of this name.
    """
    found = []
    for path in (("datasets",), *NAMED_VALUES):
        section = _get(options.content, path)
        if not isinstance(section, dict):
            continue
        sections = [_get(layer.content, path) for layer in lower]
        known = [name for lower_one in sections if isinstance(lower_one, dict) for name in lower_one]
        for name in [name for name, value in section.items() if value is None]:
            if name not in known:
                raise ConfigError(
                    f"{'.'.join(path)}.{name} ({options.source}): there is no such {_NAMED[path[-1]]} to "
                    f"leave out.{did_you_mean(str(name), map(str, known))}"
                )
            del section[name]
            found.append((path, name))
    for path, name in found:
        for layer in lower:
            _discard(_get(layer.content, path[:-1]), path[-1], name)
            if path == ("datasets",):
                _discard(layer.content.get("run"), "train_dataset_ratios", name)


def _discard(content: Any, section: str, key: str) -> None:
    if isinstance(content, dict) and isinstance(content.get(section), dict):
        content[section].pop(key, None)


def _drop_replaced(layers: list[Layer], path: KeyPath, keys: frozenset[str] | None) -> None:
    current = None
    for i, layer in enumerate(layers):
        name = _get(layer.content, (*path, "name"))
        if name is None:
            continue
        if current is not None and name != current:
            dropped = [key for lower in layers[:i] for key in _drop(lower.content, path, keys)]
            is_same = path == ("model", "language") and _may_be_the_same(str(current), str(name))
            if path[0] == "model" and not is_same:
                dropped += [  # the weights were trained between other parts
                    "model.checkpoint"
                    for lower in layers[:i]
                    if (_get(lower.content, ("model",)) or {}).pop("checkpoint", None)
                ]
            if dropped:
                keys_left_out = ", ".join(dict.fromkeys(dropped))
                why = f"{'.'.join(path)} is '{name}' ({layer.source})"
                layer.left_out += (f"{why}: left out what was set for '{current}': {keys_left_out}",)
        current = name


def _may_be_the_same(name: str, other: str) -> bool:
    """Whether two names may be of one language model: a folder may hold what a hub id names, and there are
    copies of hub ids."""
    if any(
        looks_like_path(n) and not n.startswith(PACKAGE_PREFIX) or os.path.isdir(n) for n in (name, other)
    ):
        return True
    return name.rpartition("/")[2] == other.rpartition("/")[2]


def _drop(content: dict[str, Any], path: KeyPath, keys: frozenset[str] | None) -> list[str]:
    section = _get(content, path)
    if not isinstance(section, dict):
        return []
    dropped = [key for key in section if key != "name" and (keys is None or key in keys)]
    for key in dropped:
        del section[key]
    return [str(key) for key in dropped]


def _has(content: Any, path: KeyPath) -> bool:
    for key in path:
        if not isinstance(content, dict) or key not in content:
            return False
        content = content[key]
    return True


def _get(content: Any, path: KeyPath) -> Any:
    for key in path:
        if not isinstance(content, dict) or key not in content:
            return None
        content = content[key]
    return content


def _resolve_paths(content: dict[str, Any], folder: Path) -> None:
    for path in PATH_KEYS:
        section = _get(content, path[:-1])
        if isinstance(section, dict) and isinstance(section.get(path[-1]), str):
            section[path[-1]] = _beside(folder, section[path[-1]])
    if isinstance(content.get("datasets"), dict):
        content["datasets"] = _resolve_dotted(content["datasets"], folder)


def _resolve_dotted(value: Any, folder: Path) -> Any:
    """In datasets only ``./x`` and ``../x`` mean beside the YAML: other paths start at the data root."""
    if isinstance(value, dict):
        return {key: _resolve_dotted(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve_dotted(item, folder) for item in value]
    if isinstance(value, str) and value.startswith(("./", "../")):
        return _beside(folder, value)
    return value


def _beside(folder: Path, text: str) -> str:
    if not text or os.path.isabs(text) or "://" in text or not os.path.exists(folder / text):
        return text
    path = folder / text
    # a file keeps its name, whose end says what it is: in the cache of the hub's client it is a link
    return str(path.resolve() if path.is_dir() else path.parent.resolve() / path.name)
