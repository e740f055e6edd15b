"""Language models as readers of soft prompts."""

from __future__ import annotations

import torch

from evlgen.common.errors import ConfigError
from evlgen.common.precision import dtype_of
from evlgen.common.registry import registry
from evlgen.config.model_config import LanguageConfig, ModelConfig
from evlgen.models.language.base import LanguageModel
from evlgen.models.language.causal import CausalLanguageModel, is_encoder_decoder
from evlgen.models.language.loading import config_content, find_model
from evlgen.models.language.opt import OPTLanguageModel
from evlgen.models.language.seq2seq import Seq2SeqLanguageModel
from evlgen.models.language.vicuna import VicunaLanguageModel
from evlgen.models.ops import check_fp8, language_attention, use_fp8

__all__ = [
    "CausalLanguageModel",
    "LanguageModel",
    "OPTLanguageModel",
    "Seq2SeqLanguageModel",
    "VicunaLanguageModel",
    "build_language_model",
]


def build_language_model(
    cfg: ModelConfig, preferred: str, device: str | torch.device = "cpu"
) -> LanguageModel:
    """The language model of a config, frozen weights in the config's precision as ``device`` computes it.

    Args:
        preferred: the kind an architecture names. It is taken where the config names none and it reads the
            model; else ``seq2seq`` for an encoder-decoder, ``opt`` for an OPT, ``causal`` for the rest.

    Raises:
        ConfigError, CheckpointError: see `HuggingFaceLanguageModel`; adapters or quantisation without
            ``freeze: true``.
    """
    language, device = cfg.language, torch.device(device)
    _check_frozen(language)
    is_fp8 = language.precision == "fp8"
    if is_fp8:
        check_fp8("model.language.precision", device)
    dtype = dtype_of(language.precision, device) if language.freeze else torch.float32
    model = registry.get_language_model_class(language.kind or _kind_of(language.name, preferred))(
        name=language.name,
        dtype=dtype,
        prompt=cfg.prompt,
        max_txt_len=cfg.max_txt_len,
        max_output_txt_len=cfg.max_output_txt_len,
        attention=language_attention(device, dtype),
        quantization=language.quantization,
        lora=language.lora,
        chat_template=language.chat_template,
        **({"pack": True} if language.pack else {}),  # a plugin's may not know these
        **({} if language.tome is None else {"tome": language.tome}),
        device=device,
    )
    if is_fp8:
        head = model.model.get_output_embeddings()  # what it gives decides a token: it stays in bf16
        use_fp8(model, device, apart=[head, *model.trained_modules()])
    return model


def _kind_of(name: str, preferred: str) -> str:
    config = config_content(name, find_model(name))
    if registry.get_language_model_class(preferred).reads(config):
        return preferred
    if is_encoder_decoder(config):
        return "seq2seq"
    return "opt" if OPTLanguageModel.reads(config) else "causal"


def _check_frozen(language: LanguageConfig) -> None:
    if language.precision == "fp8" and language.quantization != "none":
        raise ConfigError(
            f"model.language.precision: fp8 and model.language.quantization: {language.quantization} are two "
            "ways to keep the same weights. Set one of them to auto or none."
        )
    if language.freeze:
        return
    for key, is_set in (
        ("lora", language.lora is not None),
        ("quantization", language.quantization != "none"),
        ("precision", language.precision == "fp8"),
    ):
        if is_set:
            raise ConfigError(
                f"model.language.{key} is for a frozen language model, and model.language.freeze is false. "
                f"Set freeze: true, or leave {key} out."
            )
