"""What is known of a vision-language model before its weights are read: how long texts are to it, and whether
they have room."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from evlgen.common.errors import EVLGenError
from evlgen.common.registry import registry
from evlgen.config.model_config import ModelConfig
from evlgen.models.connectors.base import ConnectorInputs
from evlgen.models.language import LanguageModel, build_language_model
from evlgen.models.language.loading import find_model, num_positions, read_config
from evlgen.models.protocols import offers
from evlgen.models.text_lengths import TextLengths, TextReader
from evlgen.models.tiles import Tiling
from evlgen.models.vision import build_vision_encoder
from evlgen.weights.hub import missing_model, with_settings


def text_lengths(cfg: ModelConfig, kind: str, temporal: str | None) -> TextLengths | None:
    """See `BaseModel.text_lengths`.

    Args:
        kind: of language model that the architecture names.
        temporal: the form of a model of videos.
    """
    if missing_model(cfg.language.name):
        return None
    language = _language_without_weights(cfg, kind)
    num_soft = functools.cache(lambda views: _num_soft_prompts(cfg, language.embed_dim, views))
    tiling = _tiling(cfg)

    def num_soft_of_shape(shape: Sequence[int]) -> int:
        if tiling is not None:
            return tiling.num_soft(shape, num_soft)
        frames = shape[1] if len(shape) == 4 else 1
        if temporal == "each":
            return frames * num_soft(1)
        return num_soft(frames if temporal == "concat" else 1)

    limit = min(cfg.max_sequence_len, language.max_positions or cfg.max_sequence_len)
    return TextLengths(language, num_soft_of_shape, limit) if offers(language, TextReader) else None


def check_room(
    cfg: ModelConfig,
    kind: str,
    temporal: str | None,
    prompt: str | None,
    num_new: int,
    learns: bool,
    num_frames: int,
) -> None:
    """See `BaseModel.check_room`.

    Args:
        kind, temporal: see `text_lengths`.
    """
    name = with_settings(cfg.language.name)
    if name is None:
        return
    cfg = dataclasses.replace(cfg, language=dataclasses.replace(cfg.language, name=name))
    limit = num_positions(read_config(name, find_model(name)))
    # nearly all models have far more room than is needed: seen without building anything
    texts = len((prompt or "").encode()) + cfg.max_txt_len + (cfg.max_output_txt_len or cfg.max_txt_len)
    around = 256 if cfg.language.chat_template else 8  # tokens of a template, of a start
    # of queries, maybe
    counts = [n for key, n in cfg.connector.items() if key.startswith("num_") and isinstance(n, int)]
    tiling = _tiling(cfg)
    views = num_frames if temporal in ("concat", "each") else 1 if tiling is None else tiling.max + 1
    most = views * max((cfg.vision.image_size // 8) ** 2, *counts, 0)
    if limit is not None and texts + around + num_new + most > limit:
        language = _language_without_weights(cfg, kind)

        def num_soft(views: int) -> int:
            return _num_soft_prompts(cfg, language.embed_dim, views)

        if tiling is not None:
            most = tiling.most_soft(num_soft)
        else:
            most = num_frames * num_soft(1) if temporal == "each" else num_soft(views)
        language.check_room(most, prompt, num_new, learns)


def _language_without_weights(cfg: ModelConfig, kind: str) -> LanguageModel:
    plain = dataclasses.replace(cfg.language, freeze=True, quantization="none", lora=None)
    return build_language_model(dataclasses.replace(cfg, language=plain), kind, torch.device("meta"))


def _tiling(cfg: ModelConfig) -> Tiling | None:
    """How images are cut into tiles; its weights are none."""
    return None if cfg.vision.tiles is None else Tiling(cfg.vision.tiles, cfg.vision.image_size, 1, 1.0)


def _num_soft_prompts(cfg: ModelConfig, language_dim: int, views: int) -> int:
    """The soft prompts of an image (of a video, of a frame; of ``views`` in a row); 1 where weights are
    needed to tell."""
    settings = {key: value for key, value in cfg.connector.items() if key not in ("name", "init")}
    try:
        with torch.device("meta"):
            plain = dataclasses.replace(cfg.vision, pretrained=False, grad_checkpoint=False)
            vision = build_vision_encoder(plain, "meta")
            connector_class = registry.get_connector_class(cfg.connector.get("name", "tomeformer"))
            connector = connector_class.build(ConnectorInputs.behind(vision, language_dim, 1.0), **settings)
        return connector.num_soft_prompts(views * vision.num_tokens)
    except (EVLGenError, ArithmeticError, RuntimeError, TypeError, ValueError):
        return 1  # a part of a plugin, which may do anything; what is wrong is said when it is built
