"""Checkpoints of models: finding, reading and writing their folders and files."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from evlgen.common.errors import CheckpointError, EVLGenError, did_you_mean
from evlgen.common.registry import registry
from evlgen.config.config import load_model_file
from evlgen.config.named_code import check_named
from evlgen.config.yaml_io import read_yaml
from evlgen.files.digests import DIGESTS_FILE
from evlgen.files.io import make_readable, resolve, write_atomically
from evlgen.models.connectors.base import Connector
from evlgen.models.ops import FP8, Fp8Linear, is_rounded
from evlgen.models.protocols import HasConnector, ReadsVideo, offers
from evlgen.models.published.checkpoints import is_published, to_own_names
from evlgen.models.soft_prompts import nearest_places
from evlgen.weights.checkpoints import CONFIG_FILE, WEIGHTS_FILE, write_folder
from evlgen.weights.hub import looks_like_path
from evlgen.weights.hub_checkpoints import HUB_PREFIX, fetch_checkpoint, is_hub_id
from evlgen.weights.weights import read_weights

logger = logging.getLogger(__name__)

_ADAPTER, _TEMPORAL = ".lora_", ".temporal_merge."  # in the names of weights
_REMEDY = "model.checkpoint: null starts without it."
_SAVED_CONFIG = "the config.yaml beside the weights says"
_HEAD, _NORM = "prompt_head.", "ln_vision."
# What gives learned weights a place that have none.
_PLACES = {
    _ADAPTER: "it is of adapters in the language model. Set model.language.lora to what they were trained "
    f"with (r, alpha, target_modules: {_SAVED_CONFIG})",
    _TEMPORAL: "it is of attention over the frames. Set model.vision.temporal.form to what it was trained "
    f"with ({_SAVED_CONFIG}; published weights: residual), and model.vision to the same encoder",
    _NORM: "it is of the LayerNorm after the vision encoder. Set model.vision.norm_eps to what "
    f"{_SAVED_CONFIG}",
    _HEAD: f"it is of what stands around the soft prompts. Set model.soft_prompts to what {_SAVED_CONFIG}",
}
_READS_TEXT = (
    "it is of a Q-Former that reads the question too, as InstructBLIP's does, and model.connector reads "
    "images only. Take BLIP-2's weights, of the first stage or of the second"
)


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What a checkpoint gave: names of weights loaded, missing from it, and in it without a place in the
    model; and of the loaded ones those of frozen parts that have other values than the parts themselves, with
    their values as the checkpoint has them where the model has them in float8."""

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    frozen: list[str] = dataclasses.field(default_factory=list)
    rounded: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def load_checkpoint(model: nn.Module, wanted: Collection[str], path: str | Path) -> LoadReport:
    """Loads weights over those of a model; see `BaseModel.load_checkpoint`.

    Args:
        wanted: names of the weights that are trained, which the checkpoint should have.
    """
    file = checkpoint_path(path) if str(path).startswith(HUB_PREFIX) else resolve(path)
    state = read_weights(file)
    _check_temporal_form(model, path, file, state)
    state = to_own_names(state)
    own = model.state_dict()
    _stretch_places(path, state, own)
    _check_shapes(path, state, own)
    loaded = sorted(set(state) & set(own))
    missing = sorted(set(wanted) - set(state))
    spare, unexpected = _without_place(model, set(state) - set(own), set(state))
    _check_places(model, path, unexpected)
    _check_fits(path, wanted, loaded, missing, unexpected)
    frozen = [k for k in loaded if k not in wanted and _differs(model, k, own[k], state[k])]
    rounded = {k: state[k] for k in frozen if own[k].dtype == FP8}
    model.load_state_dict({k: state[k] for k in loaded}, strict=False)
    logger.info("%s: %d weights loaded", path, len(loaded))
    if frozen:
        logger.info(
            "%s: %d of them are of frozen parts and differ from the parts' own: they are saved with "
            "what is trained: %s",
            path,
            len(frozen),
            _some(frozen),
        )
    if spare:
        logger.info("%s: %d weights of an earlier stage are left out: %s", path, len(spare), _some(spare))
    if missing:
        logger.warning(
            "%s: %d weights were not in it and keep their start values: %s",
            path,
            len(missing),
            _some(missing),
        )
    if unexpected:
        logger.warning(
            "%s: %d weights have no place in this model: %s", path, len(unexpected), _some(unexpected)
        )
    return LoadReport(loaded, missing, unexpected, frozen, rounded)


def _differs(model: nn.Module, name: str, own: Tensor, value: Tensor) -> bool:
    """Whether a model's weight changes when it is given a checkpoint's value."""
    if type(own) is not Tensor:  # spread over processes
        return True
    if own.dtype == FP8:
        layer = model.get_submodule(name.rpartition(".")[0])
        return isinstance(layer, Fp8Linear) and value.dtype != FP8 and not is_rounded(layer, value)
    return not torch.equal(own, value.to(own.device, own.dtype))


def _check_fits(
    path: str | Path, wanted: Collection[str], loaded: list[str], missing: list[str], unexpected: list[str]
) -> None:
    """Raises `CheckpointError` for another architecture's weights, and for those of a model that was trained
    without a part that this one has."""
    layers = {k for k in wanted if k.startswith("connector.layers.")}
    is_other = (missing and unexpected) or any(k.startswith("connector.") for k in unexpected)
    if is_other or not set(loaded) & set(wanted) or 0 < len(layers & set(missing)) < len(layers):
        raise CheckpointError(
            f"{path} is a checkpoint of another architecture: it lacks {_some(missing)} and brings "
            f"{_some(unexpected)}. "
            "Check model.arch and model.connector."
        )
    if missing and all(name.startswith((_HEAD, "connector.proj_residual.")) for name in missing):
        raise CheckpointError(
            f"{path} was trained without {_some(missing)}, and gives other texts with it. Set "
            f"model.soft_prompts: null and model.connector.residual: false; {_REMEDY}"
        )
    if missing and all(name.startswith(_NORM) for name in missing):
        raise CheckpointError(
            f"{path} was trained without {_some(missing)}, and gives other texts with it. Set "
            f"model.vision.norm_eps: null; {_REMEDY}"
        )


def _without_place(model: nn.Module, names: set[str], all_names: set[str]) -> tuple[list[str], list[str]]:
    """Weights that the model has no place for: those that are left out on purpose, and the others.

    Args:
        names: without a place.
        all_names: of the checkpoint.
    """
    connector = _connector_type(model)
    prefixes = tuple(connector.SPARE_WEIGHTS)
    if all(any(f"{name}.".startswith(mark) for name in all_names) for mark in connector.FIRST_STAGE):
        prefixes += tuple(connector.SPARE_TEXT)
    spare = {name for name in names if f"{name}.".startswith(prefixes)}
    return sorted(spare), sorted(names - spare)


def _connector_type(model: nn.Module) -> type[Connector]:
    connector = model.connector if offers(model, HasConnector) else None
    return type(connector) if isinstance(connector, Connector) else Connector


def _check_temporal_form(
    model: nn.Module, path: str | Path, file: str | Path, state: dict[str, Tensor]
) -> None:
    """Attention over the frames has the same weights in both of its forms, and means another thing in
    each: raises `CheckpointError` where the model's is not the checkpoint's.

    Args:
        path: what the user named.
        file: where that is.
        state: under the names it has there.
    """
    if not offers(model, ReadsVideo) or not any(_TEMPORAL in name for name in state):
        return
    is_theirs = is_published(state)
    trained = "residual" if is_theirs else _temporal_form_beside(Path(file))
    if trained not in (None, model.temporal):
        raise CheckpointError(
            f"{path} was trained with model.vision.temporal.form: {trained}"
            f"{', as all published weights of videos' if is_theirs else ''}, and this model has "
            f"{model.temporal or 'none'}, where they mean another thing. Set model.vision.temporal.form: "
            f"{trained}; {_REMEDY}"
        )


def _check_places(model: nn.Module, path: str | Path, unexpected: list[str]) -> None:
    """Raises `CheckpointError` for learned weights that a key of the config would give a place."""
    if any(name.startswith("connector.") for name in unexpected):
        return  # of another architecture altogether
    text = tuple(_connector_type(model).SPARE_TEXT)
    for name in unexpected:
        why = next((why for mark, why in _PLACES.items() if mark in name), None)
        why = _READS_TEXT if name.startswith(text) else why
        if why:
            raise CheckpointError(f"{path} holds {name}, which has no place here: {why}; {_REMEDY}")


def _temporal_form_beside(weights: Path) -> str | None:
    """The temporal form that the ``config.yaml`` beside weights says; None where it says nothing."""
    file = (weights.parent if weights.name == WEIGHTS_FILE else weights) / CONFIG_FILE
    if not os.path.isfile(file):
        return None
    try:
        section = load_model_file(file)
        architecture = registry.get_model_class(section.arch)
    except EVLGenError as error:  # a plugin's that is not loaded, or of another version
        logger.warning("%s cannot be read, so the temporal form is not compared: %s", file, error)
        return None
    form = OmegaConf.select(section, "vision.temporal.form")
    return form or architecture.TEMPORAL


def _stretch_places(path: str | Path, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Fits the places of `SoftPromptHead` to a model with another number of soft prompts: of larger images,
    or another ``r``."""
    key = f"{_HEAD}places"
    given, place = state.get(key), own.get(key)
    if given is None or place is None or given.shape[1:] != place.shape[1:] or len(given) == len(place):
        return
    state[key] = given[nearest_places(len(given), len(place))]
    logger.info("%s: its %d places are stretched over %d soft prompts", path, len(given), len(place))


def _check_shapes(path: str | Path, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    wrong = [k for k in state if k in own and state[k].shape != own[k].shape]
    if wrong:
        key = wrong[0]
        raise CheckpointError(
            f"{path} does not fit: {key} has shape {tuple(state[key].shape)}, the model's is "
            f"{tuple(own[key].shape)}"
            f"{f' ({len(wrong)} such weights)' if len(wrong) > 1 else ''}. Check model.vision, "
            f"model.connector, model.language; {_REMEDY}"
        )


def _some(names: list[str]) -> str:
    return (
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        if names
        else "nothing"
    )


def in_dtype(weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Weights whose matrices are in another type; None: as they are."""
    return {
        name: weight.to(dtype) if dtype and weight.is_floating_point() and weight.ndim > 1 else weight
        for name, weight in weights.items()
    }


def write_pretrained(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Puts the files that ``write`` writes into a folder, all of them or none. Other files that are in it
    stay."""
    folder = Path(path).expanduser().absolute()
    if not folder.exists():
        return write_folder(folder, write)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving.") as temporary:
        write(Path(temporary))
        (folder / DIGESTS_FILE).unlink(missing_ok=True)  # of the files that are replaced
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(Path(temporary) / name, folder / name)
    return folder


def write_weights(folder: Path, weights: Mapping[str, Tensor], section: Mapping[str, Any]) -> None:
    """Writes ``model.safetensors``, and the ``model`` section as ``config.yaml``, into an existing folder."""
    from safetensors.torch import save_file

    state = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    make_readable(folder / WEIGHTS_FILE)
    content = {"model": {**section, "checkpoint": None}}
    write_atomically(folder / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(content)))


def checkpoint_path(name: str | Path) -> Path:
    """What a user names as a checkpoint, on this machine: fetched where it is ``user/name`` on the hub.

    Raises:
        CheckpointError: it is neither here nor on the hub, or may not be read.
        EVLGenError: it is from the hub and needs plugins that the user has not named.
    """
    name = str(name)
    path = None if name.startswith(HUB_PREFIX) else Path(resolve(name))
    if path is not None and (os.path.lexists(path) or not is_hub_id(name)):
        return _own_folder(path)
    try:
        folder = fetch_checkpoint(name)
    except CheckpointError as error:
        place = "" if path is None else f"there is no checkpoint at {path}, and on the hub: "
        raise CheckpointError(f"{place}{error}") from error
    return _own_folder(folder, name)


def _own_folder(folder: Path, from_hub: str | None = None) -> Path:
    """A checkpoint's folder, converted where it is in transformers' format.

    Args:
        from_hub: its name there, where that is where it is from: then it may ask for no plugins.
    """
    if os.path.isfile(folder / CONFIG_FILE):
        if from_hub is not None:
            plugins = read_yaml(folder / CONFIG_FILE).get("plugins") or []
            check_named(map(str, plugins if isinstance(plugins, list) else [plugins]), from_hub)
        return folder
    if not os.path.isfile(folder / "config.json"):
        return folder
    from evlgen.models.published.transformers_format import own_folder

    return own_folder(folder)


def pretrained_folder(
    name: str, model_types: Collection[str], revision: str | None, token: str | None, local_files_only: bool
) -> Path:
    """The folder that `BaseModel.from_pretrained` reads.

    Args:
        model_types: that could have been meant.
    """
    folder = _own_folder(Path(resolve(name)))
    if os.path.isfile(folder / CONFIG_FILE):
        if revision is not None:
            raise CheckpointError(f"{folder} is a folder here, and a revision is of a repository on the hub.")
        return folder
    if os.path.exists(folder) or looks_like_path(name):
        raise CheckpointError(f"{folder} holds no {CONFIG_FILE}: it was not written by save_pretrained.")
    try:
        folder = fetch_checkpoint(name, revision, token, local_files_only)
    except CheckpointError as error:
        raise CheckpointError(
            f"'{name}' is no folder, no model type ({', '.join(model_types)}), and {error}"
            f"{did_you_mean(name, model_types)}"
        ) from error
    return _own_folder(folder, name)
