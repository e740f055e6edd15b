"""What a model's configuration implies, compared with what its weight files hold, before anything is built.

Transformers builds what a ``config.json`` says and fills what the files lack at random: with a configuration
that is wrong, or was made to be, it takes all memory or never ends.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evlgen.common.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_PACKED = 4  # weights in a byte of any other type: the most that quantisation does

# Names of sizes, whatever a model's configuration calls them; and of what has nothing to do with weights.
_SIZE = re.compile(r"size|dim|hidden|emb|vocab|ff|inner|width|channel|rank|d_|label|layer|head|expert|group")
_NO_SIZE = re.compile(r"token|position|length|window|chunk|theta|max_|image|crop|rate|ngram")
_SKIPPED = ("quantization_config", "rope_scaling", "rope_parameters", "task_specific_params")
# Names of counts: what is made so many times, and so many at least where the weights' names do not tell.
_LAYERS, _FEWEST_LAYERS = re.compile(r".*layers?|(.*_)?(blocks?|depth|stages?)"), 256
_PARTS, _FEWEST_PARTS = re.compile(r".*(expert|head|group).*"), 16_384
_LABELS, _MOST_LABELS = re.compile(r".*labels?"), 10_000
_MOST_LAYERS = 10_000
_NEVER_NEGATIVE = re.compile(r"(num|n)_.*|d_(model|ff|kv)|.*_(size|dim)")
_MOST_ENTRIES = 10_000  # of a list or mapping, which transformers looks through again and again
_BUFFER_BYTES = 1 << 30  # of what is no weight, such as masks of attention


class Held(NamedTuple):
    """How many weights files hold at most, and in how many tensors."""

    weights: int
    tensors: int


#: Of a model whose weights are still to come: more than any has.
UNKNOWN = Held(1 << 42, 1000)


def weights_held(path: Path) -> Held:
    """What a folder's ``.safetensors`` and ``.bin`` files hold, or a GGUF file, by their headers.

    Raises:
        CheckpointError: a header cannot be read.
    """
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.suffix in (".safetensors", ".bin")]
    held = [_held(file) for file in files if file.is_file()]
    return Held(sum(found.weights for found in held), sum(found.tensors for found in held))


def check_counts(source: str | Path, config: Mapping[str, Any], held: Held) -> None:
    """Raises `CheckpointError` for a configuration in which one number alone is more than the files can have,
    whatever its name and however deep it stands, or is below 0, or that lists more than any model has."""
    if long := next(_long_lists(config), None):
        raise CheckpointError(
            f"{source} cannot be read: its configuration gives {long[0]} with {long[1]} entries, and at most "
            f"{_MOST_ENTRIES} are read. Get it again."
        )
    for key, value in _numbers(config):
        name = key.rpartition(".")[2].lower()
        if value < 0 and _NEVER_NEGATIVE.fullmatch(name) and not _NO_SIZE.search(name):
            raise CheckpointError(
                f"{source} cannot be read: its configuration gives {key} as {value:g}. Get it again."
            )
        limit = held.weights if _SIZE.search(name) and not _NO_SIZE.search(name) else None
        if _LAYERS.fullmatch(name):
            limit = min(max(_FEWEST_LAYERS, held.tensors), _MOST_LAYERS)
        elif _LABELS.fullmatch(name):
            limit = _MOST_LABELS
        elif limit is not None and _PARTS.fullmatch(name):
            limit = max(_FEWEST_PARTS, held.tensors)
        if limit is not None and value > limit:
            known = f"and its weight files hold {held.weights} weights in {held.tensors} tensors"
            if held is UNKNOWN:
                known = "more than any model has"
            raise CheckpointError(
                f"{source} cannot be read: its configuration gives {key} as {value:g}, {known}. Get it again."
            )


def check_model(source: str | Path, model: nn.Module, held: Held) -> None:
    """Raises `CheckpointError` for a model, on the meta device, with far more weights than the files hold."""
    implied = sum(weight.numel() for weight in model.parameters())
    if implied > 2 * held.weights:  # some save what is tied only once, and some not at all
        raise CheckpointError(
            f"{source} cannot be read: its configuration describes a model of {implied} weights, and its "
            f"weight files hold {held.weights}. Get it again."
        )
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if buffers > max(_BUFFER_BYTES, 4 * held.weights):
        raise CheckpointError(
            f"{source} cannot be read: its configuration describes tables of {buffers} bytes beside "
            f"{held.weights} weights. Get it again."
        )


def _long_lists(config: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """The paths of lists and mappings that are too long, and how long they are."""
    if not isinstance(config, Mapping | list):
        return
    if len(config) > _MOST_ENTRIES:
        yield path or "itself", len(config)
        return
    items = config.items() if isinstance(config, Mapping) else ((None, value) for value in config)
    for key, value in items:
        yield from _long_lists(value, path if key is None else f"{path}.{key}" if path else str(key))


def _numbers(config: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a configuration and their paths."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(config, Mapping):
        items = (
            (f"{path}.{key}" if path else str(key), v) for key, v in config.items() if key not in _SKIPPED
        )
    elif isinstance(config, list):
        items = ((path, value) for value in config)
    elif isinstance(config, int | float) and not isinstance(config, bool):
        yield path, config
    for inner, value in items:
        yield from _numbers(value, inner)


def _held(file: Path) -> Held:
    size = file.stat().st_size
    try:
        if file.suffix == ".safetensors":
            return _in_safetensors(file, size)
        if file.suffix == ".bin":
            if not zipfile.is_zipfile(file):
                return Held(size, size // 1024)
            with zipfile.ZipFile(file) as archive:
                return Held(size, sum("/data/" in name for name in archive.namelist()))
        with open(file, "rb") as stream:  # GGUF: magic, version, number of tensors
            stream.seek(8)
            return Held(size * 8, min(size, int.from_bytes(stream.read(8), "little")))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{file} cannot be read: its header is damaged. Get it again.") from error


def _in_safetensors(file: Path, size: int) -> Held:
    with open(file, "rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    header.pop("__metadata__", None)
    weights = 0
    for tensor in header.values():
        start, end = tensor["data_offsets"]
        num_bytes = min(max(0, end - start), size)
        item = _ITEM_BYTES.get(tensor["dtype"])
        weights += num_bytes // item if item else num_bytes * _PACKED
    return Held(min(weights, size * _PACKED), len(header))
