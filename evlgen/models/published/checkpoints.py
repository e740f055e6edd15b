"""Names of weights in published LAVIS and EVLGen checkpoints.

A published ``.pth`` names the LayerNorm after the encoder ``ln_vision``, the TomeFormer's input projection
``VL_proj``, its BERT ``VLconnector``, the Q-Former ``Qformer`` and ``query_tokens``, and the projection to
the language model ``opt_proj`` (OPT), ``llm_proj`` (Vicuna) or ``t5_proj`` (FlanT5).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from evlgen.common.errors import CheckpointError
from evlgen.models.connectors.bert_weights import bert_to_tomeformer, tomeformer_to_bert
from evlgen.models.connectors.qformer_weights import own_to_qformer, qformer_to_own

logger = logging.getLogger(__name__)

#: Kind of language model -> the published name of the projection to it.
PROJECTIONS = {"opt": "opt_proj", "vicuna": "llm_proj", "seq2seq": "t5_proj"}

# published prefix -> own prefix
_PREFIXES = {
    "ln_vision.": "ln_vision.",
    "visual_encoder.": "vision.trunk.",
    "VL_proj.": "connector.proj_in.",
    **{f"{name}.": "connector.proj_out." for name in PROJECTIONS.values()},
}
_BERT = "VLconnector."
_QUERIES = "query_tokens"
_MARKS = (_BERT, _QUERIES, *(prefix for prefix in _PREFIXES if prefix != "ln_vision."))
# Weights of the frozen language models, and of the frozen text encoder of EVLGen's contrastive loss.
_FROZEN = ("opt_model.", "llm_model.", "t5_model.", "SimCSE.")
_HEADS = ("vision_proj.", "text_proj.", "itm_head.", "temp")  # of BLIP-2's first stage: named alike


def is_published(state: Mapping[str, Tensor]) -> bool:
    """True for weights under published names."""
    return any(key.startswith(_MARKS) for key in state)


def to_own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under published names -> under this project's; others are returned as they are.

    Weights of frozen language models, and what a connector has no place for (a BERT's word embeddings and
    pooler), are left out, and the log says so.

    Raises:
        CheckpointError: a matrix that is joined with others here has none of its shape beside it.
    """
    if not is_published(state):
        return state
    kept = {key: value for key, value in state.items() if not key.startswith(_FROZEN)}
    bert = {key.removeprefix(_BERT): value for key, value in kept.items() if key.startswith(_BERT)}
    tomeformer = bert_to_tomeformer(bert)
    rest = {key: value for key, value in kept.items() if not key.startswith(_BERT)}
    out = _renamed(qformer_to_own(rest) if _QUERIES in rest else rest, _PREFIXES)
    out.update({f"connector.{key}": value for key, value in tomeformer.items()})
    unused = sorted(set(bert) - set(tomeformer_to_bert(tomeformer)))
    left_out = [*(key for key in state if key.startswith(_FROZEN)), *(f"{_BERT}{key}" for key in unused)]
    if left_out:
        logger.info(
            "%d weights left out, of frozen models or without a place in the connector: %s",
            len(left_out),
            ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else ""),
        )
    return out


def to_published_names(state: Mapping[str, Tensor], proj_out: str = "opt_proj") -> dict[str, Tensor]:
    """The inverse of `to_own_names`.

    Args:
        proj_out: one of `PROJECTIONS`.

    Raises:
        CheckpointError: a weight has no place in the published layouts.
    """
    prefixes = {own: published for published, own in _PREFIXES.items()}
    prefixes["connector.proj_out."] = f"{proj_out}."
    try:
        if f"connector.{_QUERIES}" in state:
            out = _renamed(own_to_qformer(dict(state)), prefixes)
        else:
            out = _renamed(state, prefixes)
            bert = {k.removeprefix("connector."): out.pop(k) for k in list(out) if k.startswith("connector.")}
            out.update({f"{_BERT}{key}": value for key, value in tomeformer_to_bert(bert).items()})
        strays = set(state) - set(to_own_names(out))
    except (KeyError, ValueError):  # names of another connector
        strays, out = {key for key in state if key.startswith("connector.")}, {}
    strays |= {key for key in state if key in out and not key.startswith(("ln_vision.", *_HEADS))}
    if strays:
        raise CheckpointError(
            f"{min(strays)} and {len(strays) - 1} more weights have no place in the published layouts, which "
            "know the connectors tomeformer and qformer, and what is trained with them."
            if len(strays) > 1
            else f"{min(strays)} has no place in the published layouts."
        )
    return out


def _renamed(state: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    out = {}
    for key, value in state.items():
        prefix = next((p for p in prefixes if key.startswith(p)), "")
        out[prefixes.get(prefix, "") + key.removeprefix(prefix)] = value
    return out
