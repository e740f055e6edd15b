"""Vision encoders."""

from __future__ import annotations

import torch

from evlgen.common.precision import dtype_of
from evlgen.common.registry import registry
from evlgen.models.model_config import VisionConfig
from evlgen.models.vision.base import VisionEncoder
from evlgen.models.vision.temporal import ATTENTIVE_FORMS, add_temporal_attention
from evlgen.models.vision.timm_encoder import EvaClipG, TimmEncoder

__all__ = ["EvaClipG", "TimmEncoder", "VisionEncoder", "build_vision_encoder", "vision_encoder_class"]


def vision_encoder_class(name: str) -> type[VisionEncoder]:
    """The registered class of a name; any other name is a timm model's."""
    known = registry.list_vision_encoders()
    return registry.get_vision_encoder_class(name if name in known else "timm")


def build_vision_encoder(
    cfg: VisionConfig, device: str | torch.device = "cpu", temporal: str | None = None
) -> VisionEncoder:
    """The vision encoder of a config, frozen weights in the config's precision as ``device`` computes it.

    Args:
        temporal: a form of `TemporalConfig` for clips; the attentive ones add weights to the encoder.
    """
    encoder = vision_encoder_class(cfg.name)(
        name=cfg.name,
        image_size=cfg.image_size,
        pretrained=cfg.pretrained,
        dtype=dtype_of(cfg.precision, device)
        if cfg.freeze
        else torch.float32,  # what is trained is in float32
        grad_checkpoint=cfg.grad_checkpoint,
        drop_path_rate=cfg.drop_path_rate,
        kwargs=cfg.kwargs,
    )
    if temporal in ATTENTIVE_FORMS:
        add_temporal_attention(encoder, temporal)
    return encoder
