"""Weights of Q-Formers: a Hugging Face BERT to start from, and names in LAVIS's published files."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from evlgen.common.errors import CheckpointError
from evlgen.models.connectors.bert_weights import bert_to_tomeformer, read_bert

# Names in LAVIS's salesforce/LAVIS lavis/models/blip2_models/Qformer.py, and own ones.
_NAMES = {
    "query_tokens": "connector.query_tokens",
    "Qformer.bert.embeddings.LayerNorm": "connector.input_norm",
    "Qformer.bert.embeddings.word_embeddings": "text.words",
    "Qformer.bert.embeddings.position_embeddings": "text.positions",
    "Qformer.cls.predictions.transform.dense": "text.head_dense",
    "Qformer.cls.predictions.transform.LayerNorm": "text.head_norm",
    "Qformer.cls.predictions.bias": "text.head_bias",
}
# The same of what stands in layer i: "Qformer.bert.encoder.layer.i.", and "connector" or "text" ".layers.i.".
_LAYER_NAMES = {
    "attention.output.dense": "connector attention_out",
    "attention.output.LayerNorm": "connector attention_norm",
    "crossattention.self.query": "connector cross_query",
    "crossattention.output.dense": "connector cross_out",
    "crossattention.output.LayerNorm": "connector cross_norm",
    "intermediate_query.dense": "connector up",
    "output_query.dense": "connector down",
    "output_query.LayerNorm": "connector out_norm",
    "intermediate.dense": "text up",
    "output.dense": "text down",
    "output.LayerNorm": "text out_norm",
}
# Several published matrices that are one here, one below the other.
_JOINED = {
    "connector qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "connector cross_key_value": ("crossattention.self.key", "crossattention.self.value"),
}
# Copies that published files hold of other weights, and a table that is a count.
_COPIES = {
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}
_POSITION_IDS = "Qformer.bert.embeddings.position_ids"


def qformer_to_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a Q-Former under LAVIS's names -> under own ones: ``connector.*`` for the queries' branch,
    ``text.*`` for the text's. What it does not know (``ln_vision.*``, ``visual_encoder.*``, ``opt_proj.*``,
    and the first stage's heads, which are named alike) stays as it is.

    Raises:
        CheckpointError: a matrix that is joined with others here has none of its shape beside it.
    """
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == _POSITION_IDS or (_COPIES.get(key) in state):
            continue
        found = re.fullmatch(r"Qformer\.bert\.encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", key)
        if found:
            out.update(_own_layer(state, key, value, *found.groups()))
        else:
            out[_renamed(key, _NAMES)] = value
    return out


def own_to_qformer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `qformer_to_own`, with the copies that published files hold of the word embeddings and
    of the head's bias."""
    names = {own: published for published, own in _NAMES.items()}
    layer_names = {own: published for published, own in _LAYER_NAMES.items()}
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        found = re.fullmatch(r"(connector|text)\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        own = f"{found[1]} {found[3]}" if found else ""
        parts = _JOINED.get(own, (layer_names[own],) if own in layer_names else ())
        if found is None or not parts:
            out[_renamed(key, names)] = value
            continue
        for part, piece in zip(parts, value.chunk(len(parts)), strict=True):
            out[f"Qformer.bert.encoder.layer.{found[2]}.{part}.{found[4]}"] = piece
    out.update({copy: out[original] for copy, original in _COPIES.items() if original in out})
    return out


def _own_layer(
    state: dict[str, Tensor], key: str, value: Tensor, index: str, name: str, kind: str
) -> dict[str, Tensor]:
    """One weight of a layer under its own name; of those that are joined all with the first."""
    for joined, parts in _JOINED.items():
        if name not in parts:
            continue
        branch, own = joined.split()
        keys = [key.replace(f".{name}.", f".{part}.") for part in parts]
        pieces = [state[part] for part in keys if part in state]
        is_whole = all(piece.ndim and piece.shape[1:] == value.shape[1:] for piece in pieces)
        if len(pieces) < len(keys) or not is_whole:
            raise CheckpointError(
                f"{key} has not all of {', '.join(parts)} of its shape beside it. Get the file again."
            )
        return {f"{branch}.layers.{index}.{own}.{kind}": torch.cat(pieces)} if name == parts[0] else {}
    if name not in _LAYER_NAMES:
        return {key: value}
    branch, own = _LAYER_NAMES[name].split()
    return {f"{branch}.layers.{index}.{own}.{kind}": value}


def _renamed(key: str, names: dict[str, str]) -> str:
    if key in names:
        return names[key]
    name, _, kind = key.rpartition(".")
    return f"{names[name]}.{kind}" if name in names and kind in ("weight", "bias") else key


# What a BERT has for the text's part; its layers go by `bert_to_tomeformer`.
_BERT_TEXT = {
    "embeddings.word_embeddings.weight": "words.weight",
    "cls.predictions.transform.dense.weight": "head_dense.weight",
    "cls.predictions.transform.dense.bias": "head_dense.bias",
    "cls.predictions.transform.LayerNorm.weight": "head_norm.weight",
    "cls.predictions.transform.LayerNorm.bias": "head_norm.bias",
    "cls.predictions.bias": "head_bias",
}
_NOT_IN_BERT = ("query_tokens", "proj_out.", "head_")
_BY_WORD = ("words.weight", "head_bias")  # a tokenizer may know more words than its BERT does


def load_bert(module: nn.Module, init: str, part: str) -> None:
    """Copies what fits of the BERT ``init`` (hub id or folder) into a part of a Q-Former. The BERT's
    feed-forward blocks become the queries' as well as the text's.

    Args:
        module: a `QFormer`; or the text's part of a first stage, in which words that ``init`` lacks, and the
            head where it has none, stay as they are.
        part: ``connector`` or ``text``.

    Raises:
        CheckpointError: the folder holds no BERT, or one of other sizes.
    """
    folder, raw = read_bert(init)
    own = module.state_dict()
    found = {**bert_to_tomeformer(raw), **{_BERT_TEXT[k]: v for k, v in raw.items() if k in _BERT_TEXT}}
    state = {k: v for k, v in found.items() if k in own}
    missing = [k for k in own if k not in state and not k.startswith(_NOT_IN_BERT) and ".cross_" not in k]
    if missing:
        raise CheckpointError(
            f"model.connector.init '{init}' is no BERT a Q-Former can start from: {part}.{missing[0]} and "
            f"{len(missing) - 1} more weights have no counterpart in {folder}."
        )
    for key, value in state.items():
        rows = own[key][: len(value)] if key in _BY_WORD else own[key]
        if rows.shape != value.shape:
            hint = " Name the BERT's own tokenizer in model.text.tokenizer." if key in _BY_WORD else ""
            raise CheckpointError(
                f"model.connector.init '{init}': {part}.{key} has shape {tuple(value.shape)}, the model's "
                f"{tuple(own[key].shape)}.{hint}"
            )
        rows.copy_(value)
