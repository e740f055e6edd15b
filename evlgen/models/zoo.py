"""Loading models by name, with the processors that go with them."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from evlgen.common.errors import ConfigError, DataError, did_you_mean
from evlgen.common.registry import registry
from evlgen.config.config import Config, load_model_config, load_model_file
from evlgen.config.consent import Consent, check_project
from evlgen.config.lavis import own_names
from evlgen.config.schema import show
from evlgen.files.io import near_name
from evlgen.models.base_model import BaseModel
from evlgen.models.checkpoint_io import checkpoint_path
from evlgen.models.protocols import HasVision, offers, reads_videos, tiling_of
from evlgen.processors import build_processor
from evlgen.processors.base_processor import BaseProcessor, UnchangedProcessor
from evlgen.weights.checkpoints import CONFIG_FILE
from evlgen.weights.hub_checkpoints import is_hub_id

logger = logging.getLogger(__name__)

Processors = dict[str, BaseProcessor]


def load_model(
    name: str,
    model_type: str | None = None,
    is_eval: bool = True,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
) -> BaseModel:
    """A registered model, built and loaded.

    Args:
        name: architecture, ``evlgen_opt``; see `model_zoo`. Or a published name of one, ``liptome_opt``.
        model_type: one of its types; by default the bundled one.
        is_eval: eval mode; false for training mode.
        device: where it goes.
        checkpoint: weights loaded over the type's own: folder, file or address.

    Raises:
        RegistryError, ConfigError: no such architecture or type.
        CheckpointError: weights that are missing or do not fit; says how to get them.
    """
    own_name, own_type = own_names(name, model_type)
    model_class = registry.get_model_class(own_name)
    if model_type is None:
        model_type = own_type = model_class.DEFAULT_MODEL_TYPE
        logger.warning("no model type was named: '%s' of %s is loaded. Others: model_zoo", own_type, own_name)
    if own_type not in model_class.MODEL_TYPES:
        raise ConfigError(
            f"{own_name} has no model type "
            f"'{model_type}'.{did_you_mean(str(model_type), model_class.MODEL_TYPES)} "
            f"Types: {', '.join(model_class.MODEL_TYPES)}."
        )
    overrides = {} if checkpoint is None else {"checkpoint": str(checkpoint)}
    # names as given: a published one stands for more settings
    cfg = load_model_config(name, model_type, overrides)
    return model_class.from_config(cfg, device).to(device).train(not is_eval)


def load_preprocess(
    model: BaseModel | HasVision | Mapping[str, Any], num_frames: int | None = 4
) -> tuple[Processors, Processors]:
    """The visual and text processors that fit a model, each as ``{"train": .., "eval": ..}``, with the vision
    encoder's image size, mean and std: BLIP-2's for images, and ALPRO's where the model reads video.

    Args:
        model: the model; or, as in LAVIS, a section that names the processors, ``{vis_processor: {eval:
            {name: blip_image_eval, image_size: 364}}, text_processor: ..}``. Where it names none, items stay
            as they are.
        num_frames: of a video, for a model; None: all that it has.

    Raises:
        ConfigError, RegistryError: what the section names is wrong.
    """
    if isinstance(model, Mapping):
        return _named_processors(model, "vis_processor"), _named_processors(model, "text_processor")
    if not offers(model, HasVision):
        raise ConfigError(
            f"load_preprocess takes a model, or a section that names processors, not {type(model).__name__}."
        )
    vision = model.vision
    pixels = {"image_size": vision.image_size, "mean": list(vision.image_mean), "std": list(vision.image_std)}
    if (tiling := tiling_of(model)) is not None:
        pixels["max_tiles"] = tiling.max
    if reads_videos(model):
        train = {"name": "alpro_video_train", "augment": "none"}  # as EVLGen's video models are trained
        names = {"train": train, "eval": {"name": "alpro_video_eval"}}
        pixels["n_frms"] = num_frames
    else:
        names = {"train": {"name": "blip2_image_train"}, "eval": {"name": "blip_image_eval"}}
    visuals = {role: build_processor({**names[role], **pixels}) for role in names}
    prompt = model.prompt if isinstance(model, BaseModel) else ""
    prompts = {"train": f"{prompt} " if prompt else "", "eval": ""}  # in generation the model puts its own
    texts = {role: build_processor({"name": "blip_caption", "prompt": p}) for role, p in prompts.items()}
    return visuals, texts


def _named_processors(config: Mapping[str, Any], key: str) -> Processors:
    sections = config.get(key) or {}
    if not isinstance(sections, Mapping):
        raise ConfigError(f"{key}: must be a mapping of train and eval to processors, not {show(sections)}.")
    return {
        role: build_processor(sections[role], f"{key}.{role}") if sections.get(role) else UnchangedProcessor()
        for role in ("train", "eval")
    }


def load_model_and_preprocess(
    name: str, model_type: str | None = None, is_eval: bool = True, device: str | torch.device = "cpu"
) -> tuple[BaseModel, Processors, Processors]:
    """`load_model` and `load_preprocess` in one: the model, its visual processors, its text
    processors."""
    model = load_model(name, model_type, is_eval, device)
    return (model, *load_preprocess(model))


class ModelZoo:
    """The registered architectures and their types; printing it shows a table."""

    def __iter__(self):
        """(architecture, list of types) pairs."""
        for name in registry.list_models():
            yield name, list(registry.get_model_class(name).MODEL_TYPES)

    def __len__(self) -> int:
        return sum(len(types) for _, types in self)

    def __str__(self) -> str:
        rows = [("Architectures", "Types"), *((name, ", ".join(types)) for name, types in self)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {types}" for name, types in rows]
        return "\n".join([lines[0], "=" * max(map(len, lines)), *lines[1:]])

    __repr__ = __str__


model_zoo = ModelZoo()


def load_model_of(
    cfg_path: str | None,
    checkpoint: str | None,
    options: Sequence[str],
    device: str,
    allow_downloads: bool | Consent = False,
) -> BaseModel:
    """The model of a project file, of a checkpoint (a folder, or ``user/name`` or ``user/name@revision`` on
    the hub), or the bundled one.

    Args:
        allow_downloads: see `BaseModel.from_pretrained`.
    """
    if cfg_path is not None:
        cfg = Config.load(cfg_path, options)
        check_project(cfg, allow_downloads)
        model = cfg.model
        if checkpoint is not None:
            path = str(checkpoint_path(checkpoint)) if is_hub_id(checkpoint) else checkpoint
            model = dataclasses.replace(model, checkpoint=path)
        return registry.get_model_class(model.arch).from_config(model, device).to(device)
    if options:
        raise ConfigError("--options change a configuration: name one with --cfg-path.")
    if checkpoint is None:
        return load_model("evlgen_opt", device=device)
    folder = checkpoint_path(checkpoint)
    best = folder / "checkpoints" / "best"
    file = (best if os.path.isdir(best) else folder) / CONFIG_FILE
    if not os.path.exists(folder):
        beside = folder.parent / "latest"
        hint = f" {beside} is there: a run chooses a best one by `agg_metrics`, which it did not have."
        has_latest = folder.name == "best" and os.path.exists(beside)
        raise DataError(f"there is no checkpoint at {checkpoint}.{hint if has_latest else near_name(folder)}")
    if not os.path.isfile(file):
        raise DataError(
            f"{checkpoint} is no folder with a {CONFIG_FILE}, so the model it belongs to is not known: name "
            "it with --cfg-path."
        )
    arch = load_model_file(file).arch
    model_class = registry.get_model_class(arch)
    return model_class.from_pretrained(file.parent, device, allow_downloads).to(device)
