"""Frozen weights in 8 or 4 bits, by bitsandbytes (Dettmers et al., *LLM.int8()*, 2022; *QLoRA*, 2023)."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from evlgen.common.errors import ConfigError


def quantization_options(quantization: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What transformers' ``from_pretrained`` takes for ``model.language.quantization``.

    Args:
        quantization: ``none``, ``8bit`` or ``4bit`` (normal float).
        dtype: the type products are computed in.
        device: where the model will run; quantised weights are put there as they are read.

    Raises:
        ConfigError: no GPU, or bitsandbytes is not installed.
    """
    if quantization == "none":
        return {}
    if device.type != "cuda" or not torch.cuda.is_available():
        found = "there is none on this machine" if device.type == "cuda" else f"the run is on '{device.type}'"
        raise ConfigError(
            f"model.language.quantization: {quantization} needs an NVIDIA or AMD GPU, and {found}. Run it "
            "where there is one, or set model.language.quantization: none."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.language.quantization: {quantization} needs bitsandbytes, which is not installed. "
            'Install it with `pip install "evlgen[quantized]"`, or set model.language.quantization: none.'
        )
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return {"quantization_config": config, "device_map": {"": device}}
