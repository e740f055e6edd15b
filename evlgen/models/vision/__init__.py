"""Vision encoders."""

from __future__ import annotations

import torch

from evlgen.common.errors import ConfigError
from evlgen.common.precision import dtype_of
from evlgen.common.registry import registry
from evlgen.config.model_config import VisionConfig
from evlgen.models.ops import check_fp8, use_fp8
from evlgen.models.vision.base import VisionEncoder
from evlgen.models.vision.temporal import ATTENTIVE_FORMS, add_temporal_attention
from evlgen.models.vision.timm_encoder import ClipL, EvaClipG, TimmEncoder

__all__ = [
    "ClipL",
    "EvaClipG",
    "TimmEncoder",
    "VisionEncoder",
    "build_vision_encoder",
    "vision_encoder_class",
]


def vision_encoder_class(name: str) -> type[VisionEncoder]:
    """The registered class of a name, or the class at a dotted path; any other name is a timm model's."""
    return registry.get_vision_encoder_class(name if registry.has("vision_encoder", name) else "timm")


def build_vision_encoder(
    cfg: VisionConfig, device: str | torch.device = "cpu", temporal: str | None = None
) -> VisionEncoder:
    """The vision encoder of a config, frozen weights in the config's precision as ``device`` computes it.

    Args:
        temporal: a form of `TemporalConfig` for videos; the attentive ones add weights to the encoder.
    """
    is_fp8, device = cfg.precision == "fp8", torch.device(device)
    if is_fp8:
        _check_fp8(cfg, device)
    encoder = vision_encoder_class(cfg.name)(
        name=cfg.name,
        image_size=cfg.image_size,
        pretrained=cfg.pretrained,
        dtype=dtype_of(cfg.precision, device)
        if cfg.freeze
        else torch.float32,  # what is trained is in float32
        drop_path_rate=cfg.drop_path_rate,
        kwargs=cfg.kwargs,
    )
    if temporal in ATTENTIVE_FORMS:
        add_temporal_attention(encoder, temporal)
    if cfg.tome_r:
        _check_merges(cfg, temporal)
        encoder.merge_tokens(cfg.tome_r)
    if is_fp8:
        use_fp8(encoder, device, apart=encoder.trained_modules())
    if cfg.grad_checkpoint and (not cfg.freeze or encoder.trained_modules()):
        offload = str(cfg.grad_checkpoint).endswith("offload")
        if str(cfg.grad_checkpoint).startswith("fairscale"):
            encoder.checkpoint_with_fairscale(offload)
        else:
            encoder.checkpoint(offload)
    return encoder


def _check_fp8(cfg: VisionConfig, device: torch.device) -> None:
    key = "model.vision.precision"
    if not cfg.freeze:
        raise ConfigError(
            f"{key}: fp8 is for a frozen vision encoder, and model.vision.freeze is false. Set {key}: auto."
        )
    check_fp8(key, device)


def _check_merges(cfg: VisionConfig, temporal: str | None) -> None:
    """Raises `ConfigError` where tokens must not merge inside the encoder."""
    if not cfg.freeze:
        raise ConfigError(
            f"model.vision.tome_r {cfg.tome_r} merges tokens in a frozen encoder, and model.vision.freeze is "
            "false. Set tome_r to 0."
        )
    if temporal is not None:
        raise ConfigError(
            f"model.vision.tome_r {cfg.tome_r} merges the tokens of each frame in its own way, and temporal "
            f"form '{temporal}' puts together those of all frames. Set tome_r to 0."
        )
