"""EfficientNets as ``efficientnet_pytorch`` publishes them (github.com/lukemelas/EfficientNet-PyTorch), read
as timm's."""

from __future__ import annotations

import re

from torch import Tensor, nn

_STEM_AND_HEAD = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# of a block with an expansion, and of the first ones, which have none
_INVERTED_RESIDUAL = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_DEPTHWISE_SEPARABLE = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}


def is_efficientnet_pytorch(state: dict[str, Tensor]) -> bool:
    """Whether weights have the names of ``efficientnet_pytorch``."""
    return "_conv_stem.weight" in state and any(key.startswith("_blocks.") for key in state)


def efficientnet_to_timm(state: dict[str, Tensor], trunk: nn.Module) -> dict[str, Tensor]:
    """Renames the weights of ``efficientnet_pytorch`` to those of timm's model.

    There the blocks are numbered through, and timm groups them by stages.

    Args:
        trunk: timm's model, which says how many blocks a stage has.
    """
    places = [f"blocks.{i}.{j}" for i, stage in enumerate(trunk.blocks) for j in range(len(stage))]
    expands = {key.split(".")[1] for key in state if "._expand_conv." in key}
    out = {}
    for key, value in state.items():
        found = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        if found and int(found[1]) < len(places):
            number, name, kind = found.groups()
            names = _INVERTED_RESIDUAL if number in expands else _DEPTHWISE_SEPARABLE
            out[f"{places[int(number)]}.{names.get(name, name)}.{kind}"] = value
        else:
            name, _, kind = key.partition(".")
            out[f"{_STEM_AND_HEAD.get(name, name)}.{kind}"] = value
    return out
