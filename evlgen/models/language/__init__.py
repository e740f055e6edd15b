"""Language models as readers of soft prompts."""

from __future__ import annotations

import torch

from evlgen.common.precision import dtype_of
from evlgen.common.registry import registry
from evlgen.models.language.base import LanguageModel
from evlgen.models.language.opt import OPTLanguageModel
from evlgen.models.model_config import ModelConfig
from evlgen.models.ops import language_attention

__all__ = ["LanguageModel", "OPTLanguageModel", "build_language_model"]


def build_language_model(cfg: ModelConfig, preferred: str, device: torch.device) -> LanguageModel:
    """The language model of a config.

    Args:
        preferred: the registered kind an architecture names.
    """
    dtype = dtype_of(cfg.language.precision, device) if cfg.language.freeze else torch.float32
    return registry.get_language_model_class(preferred)(
        name=cfg.language.name,
        dtype=dtype,
        prompt=cfg.prompt,
        max_txt_len=cfg.max_txt_len,
        attention=language_attention(device, dtype),
    )
