"""Sizes and layer weights of a Hugging Face BERT, read for a connector that starts from them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from evlgen.common.errors import CheckpointError
from evlgen.weights.hub import local_model_folder, read_model_config
from evlgen.weights.weights import read_weights


@dataclasses.dataclass(frozen=True)
class BertSizes:
    """Sizes of a BERT under their Hugging Face names; the defaults are BERT-base's (Devlin et al., 2019)."""

    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12

    def num_weights(self, num_layers: int) -> int:
        """Weights of so many layers and the position table; biases and norms, a thousandth, do not count."""
        layer = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size
        return num_layers * layer + self.max_position_embeddings * self.hidden_size


def bert_sizes(init: str | None, num_layers: int, **given: float | None) -> BertSizes:
    """The sizes of ``init`` (BERT-base's without one), changed by what is given and not None.

    Raises:
        CheckpointError: ``init`` has fewer layers, or a size that is given or in its ``config.json`` fits
            neither its weights nor the others.
        ValueError: without ``init``, hidden_size is no multiple of num_attention_heads.
    """
    known: dict = {}
    if init is not None:
        config = read_model_config(_folder_of(init))
        known = {f.name: _number(config, f, init) for f in dataclasses.fields(BertSizes) if f.name in config}
        layers = config.get("num_hidden_layers", 0)
        if not isinstance(layers, int) or layers < num_layers:
            raise CheckpointError(
                f"model.connector.init '{init}' has {layers} layers, fewer than "
                f"model.connector.num_layers {num_layers}. Lower num_layers or start from another BERT."
            )
    for name in ("hidden_size", "intermediate_size", "max_position_embeddings"):
        if given.get(name) is not None and name in known and given[name] != known[name]:
            raise CheckpointError(
                f"model.connector.{name} is {given[name]}, but '{init}' has {known[name]}. "
                f"Leave {name} out to take the weights' size, or set init: null."
            )
    sizes = BertSizes(**{**known, **{k: v for k, v in given.items() if v is not None}})
    if sizes.hidden_size % sizes.num_attention_heads:
        problem = (
            f"hidden_size {sizes.hidden_size} is no multiple of num_attention_heads "
            f"{sizes.num_attention_heads}"
        )
        if init is not None:
            raise CheckpointError(f"model.connector.init '{init}': {problem}.")
        raise ValueError(f"model.connector.{problem}")
    return sizes


def _folder_of(init: str) -> Path:
    try:
        return local_model_folder(init)
    except CheckpointError as error:
        raise CheckpointError(f"model.connector.init {error}") from error


def _number(config: dict[str, Any], field: dataclasses.Field, init: str) -> float:
    """A size out of a ``config.json``: of the default's type, and of a value that a size can have."""
    value = config[field.name]
    is_size = isinstance(field.default, int)
    right = isinstance(value, int if is_size else int | float) and not isinstance(value, bool)
    if not right or not (1 if is_size else 0) <= value <= (2**31 if is_size else 1):
        raise CheckpointError(
            f"model.connector.init '{init}': its config.json gives {field.name} as {value!r:.60}."
        )
    return value


_LAYER_NAMES = {
    "attention.output.dense": "attention_out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "out_norm",
}


def bert_to_tomeformer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames BERT weights (``embeddings.*``, ``encoder.layer.i.*``) to TomeFormer's; query, key and value
    become one.

    Keys that a TomeFormer has no place for (word embeddings, pooler, heads) are left out.
    """
    import torch

    out = {}
    names = {
        "embeddings.position_embeddings.weight": "positions.weight",
        "embeddings.token_type_embeddings.weight": "token_types.weight",
        "embeddings.LayerNorm.weight": "input_norm.weight",
        "embeddings.LayerNorm.bias": "input_norm.bias",
    }
    for key, value in state.items():
        if key in names:
            out[names[key]] = value
            continue
        found = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", key)
        if not found:
            continue
        index, name, kind = found.groups()
        if name in _LAYER_NAMES:
            out[f"layers.{index}.{_LAYER_NAMES[name]}.{kind}"] = value
        elif name == "attention.self.query":
            joined = [key.replace("query", part) for part in ("query", "key", "value")]
            parts = [state[part] for part in joined if part in state]
            if len(parts) < len(joined) or any(part.shape[1:] != value.shape[1:] for part in parts):
                raise CheckpointError(
                    f"{key} has no key or value weights of its shape beside it. Get the file again."
                )
            out[f"layers.{index}.qkv.{kind}"] = torch.cat(parts)
    return out


def tomeformer_to_bert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `bert_to_tomeformer`."""
    out = {}
    names = {
        "positions": "embeddings.position_embeddings",
        "token_types": "embeddings.token_type_embeddings",
        "input_norm": "embeddings.LayerNorm",
    }
    layer_names = {own: bert for bert, own in _LAYER_NAMES.items()}
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        if name in names:
            out[f"{names[name]}.{kind}"] = value
        elif name.startswith("layers."):
            _, index, own = name.split(".")
            if own == "qkv":
                for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    out[f"encoder.layer.{index}.attention.self.{part}.{kind}"] = piece
            else:
                out[f"encoder.layer.{index}.{layer_names[own]}.{kind}"] = value
    return out


def read_bert(init: str) -> tuple[Path, dict[str, Tensor]]:
    """The folder of a BERT (hub id or folder), and its weights under today's names: old files carry a
    ``bert.`` prefix and LayerNorm's gamma and beta. Raises `CheckpointError` where it is not there."""
    folder = _folder_of(init)
    state = read_weights(folder)
    renamed = {
        k.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias"): v
        for k, v in state.items()
    }
    return folder, renamed


def load_bert_layers(connector: nn.Module, init: str) -> None:
    """Copies the embeddings and the first layers of the BERT ``init`` (hub id or folder) into a TomeFormer.

    Raises:
        CheckpointError: the folder holds no BERT, or one of other sizes.
    """
    folder, raw = read_bert(init)
    own = connector.state_dict()
    state = {k: v for k, v in bert_to_tomeformer(raw).items() if k in own}
    wanted = {k for k in own if not k.startswith("proj_")}
    if missing := sorted(wanted - set(state)):
        raise CheckpointError(
            f"model.connector.init '{init}' is no BERT this connector can start from: {missing[0]} and "
            f"{len(missing) - 1} more weights have no counterpart in {folder}."
        )
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise CheckpointError(
                f"model.connector.init '{init}': {key} has shape {tuple(value.shape)}, the connector "
                f"{tuple(own[key].shape)}."
            )
        own[key].copy_(value)
