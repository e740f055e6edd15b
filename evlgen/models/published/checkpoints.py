"""The past: names and layouts of published LAVIS and EVLGen checkpoints, and nothing else.

A published ``.pth`` names the LayerNorm after the encoder ``ln_vision``, the TomeFormer's input projection
``VL_proj``, its BERT ``VLconnector``, and its output projection ``opt_proj`` (OPT) or ``llm_proj`` (Vicuna).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from evlgen.models.connectors.bert_weights import bert_to_tomeformer, tomeformer_to_bert

# published prefix -> own prefix
_PREFIXES = {
    "ln_vision.": "ln_vision.",
    "visual_encoder.": "vision.trunk.",
    "VL_proj.": "connector.proj_in.",
    "opt_proj.": "connector.proj_out.",
    "llm_proj.": "connector.proj_out.",
}
_BERT = "VLconnector."
_FROZEN = ("opt_model.", "llm_model.")  # stray weights of the frozen language model


def is_published(state: Mapping[str, Tensor]) -> bool:
    """True for weights under published names."""
    return any(k.startswith((_BERT, "VL_proj.", "opt_proj.", "llm_proj.")) for k in state)


def to_own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under published names -> under this project's; others are returned as they are."""
    if not is_published(state):
        return state
    out = {}
    for key, value in state.items():
        prefix = next((p for p in _PREFIXES if key.startswith(p)), None)
        if prefix:
            out[_PREFIXES[prefix] + key[len(prefix) :]] = value
        elif not key.startswith((_BERT, *_FROZEN)):
            out[key] = value
    bert = {k[len(_BERT) :]: v for k, v in state.items() if k.startswith(_BERT)}
    out.update({f"connector.{k}": v for k, v in bert_to_tomeformer(bert).items()})
    return out


def to_published_names(state: Mapping[str, Tensor], proj_out: str = "opt_proj") -> dict[str, Tensor]:
    """The inverse of `to_own_names`; ``proj_out`` is ``opt_proj`` or ``llm_proj``."""
    own_prefixes = {own: published for published, own in _PREFIXES.items()}
    own_prefixes["connector.proj_out."] = f"{proj_out}."
    out, bert = {}, {}
    for key, value in state.items():
        prefix = next((p for p in own_prefixes if key.startswith(p)), None)
        if prefix:
            out[own_prefixes[prefix] + key[len(prefix) :]] = value
        elif key.startswith("connector."):
            bert[key.removeprefix("connector.")] = value
        else:
            out[key] = value
    out.update({f"{_BERT}{k}": v for k, v in tomeformer_to_bert(bert).items()})
    return out
