"""Weights that a model's parts are read from, and which of them this machine lacks. Imports nothing heavy."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from evlgen.common.errors import DataError
from evlgen.common.safe_text import message_lines
from evlgen.files.io import download_target, near_name, resolve
from evlgen.weights.hub import looks_like_path, missing_model
from evlgen.weights.hub_checkpoints import HUB_PREFIX

logger = logging.getLogger(__name__)

_BLIP2 = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"
#: The published weights of the vision encoders that have a name here.
ENCODER_WEIGHTS = {"eva_clip_g": f"{_BLIP2}/eva_vit_g.pth", "clip_L": f"{_BLIP2}/clip_vit_L.pth"}


class MissingAsset(NamedTuple):
    """Something a config needs and this machine lacks: what, why with the remedy, and whether it would be
    downloaded by itself where there is a connection."""

    what: str
    why: str | None  # None: it is here
    fetchable: bool


def missing_encoder(source: str | bool | None) -> str | None:
    """Why the weights of a vision encoder are not on this machine, with the remedy; None when they are.

    Args:
        source: a path or an address. None, true and false name no file.
    """
    if not isinstance(source, str):
        return None
    if source.startswith(("http://", "https://")):
        target = download_target(source)
        if target.is_file():
            return None
        return (
            f"the weights are not at {target}. Download {source} to that path, "
            "or name a file in model.vision.pretrained."
        )
    path = resolve(source)
    return None if os.path.exists(path) else f"there is no file {path}{near_name(path, after='.')}"


def missing_parts(
    encoder: str,
    pretrained: bool | str,
    why_no_encoder: str | None,
    hub_parts: Mapping[str, str],
    checkpoint: str | None,
) -> list[MissingAsset]:
    """What of a model's parts is not on this machine.

    Args:
        encoder, pretrained: the vision encoder's name, and its weights as the config names them.
        why_no_encoder: why these are not here; None: they are.
        hub_parts: what else the config takes from the hub or a folder: what it is -> its name.
        checkpoint: the weights over the parts.
    """
    found = [MissingAsset(f"vision encoder {encoder}", why_no_encoder, pretrained is True)]
    for what, name in hub_parts.items():
        found.append(MissingAsset(f"{what} {name}", missing_model(name), not looks_like_path(name)))
    if checkpoint and not checkpoint.startswith(("http://", "https://", HUB_PREFIX)):
        if not os.path.exists(resolve(checkpoint)):
            near = near_name(resolve(checkpoint), after=".")
            why = f"there is no such file or folder; see model.checkpoint{near}"
            found.append(MissingAsset(f"checkpoint {checkpoint}", why, False))
    return [item for item in found if item.why]


def with_small_parts(found: list[MissingAsset], names: Sequence[object]) -> list[MissingAsset]:
    """``found``, and where it is to be had where the parts of these names are the small ones."""
    if found and any("cache://parts/" in str(name) for name in names):
        why = "bash run_scripts/photos/get_parts.sh fetches them"
        return [*found, MissingAsset("the small parts", why, False)]
    return found


def language_parts(language: str, connector_start: str | None) -> dict[str, str]:
    """What a model with a language model takes from the hub or a folder; see `missing_parts`."""
    start = {"connector start": connector_start} if connector_start else {}
    return {"language model": language, **start}


def refuse_missing(weights: Sequence[MissingAsset], data: Sequence[str]) -> None:
    """Raises one `DataError` that lists all weights and data that are missing, with the remedies.

    Weights that the hub offers are not missing where it can be reached: they are downloaded later.
    """
    from evlgen.weights.hub import hub_reachable

    if weights and not data and all(item.fetchable for item in weights) and hub_reachable():
        for item in weights:
            logger.info("to be downloaded: %s", item.what)
        return
    if weights or data:
        found = [*(f"{w.what}: {w.why}" for w in weights), *data]
        small = "To see the command work without any of the weights, add: --options model.model_type=shapes"
        lines = ["this run needs what is not on this machine:", *(f"  - {line}" for line in found)]
        raise DataError(message_lines([*lines, *([small] if weights else [])]))
