"""Which floating-point type a device computes in."""

from __future__ import annotations

import contextlib

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device: str | torch.device) -> str:
    """``auto`` becomes bf16 where the device multiplies in it, else fp32; ``fp8``, which is for linear layers
    alone, becomes bf16; anything else stays.

    bf16 units: CUDA from compute capability 8.0, CPUs with AMX or AVX512-bf16. fp16 on a CPU is emulated, far
    slower and short of range there, so published configs' fp16 becomes what ``auto`` gives.
    """
    device = torch.device(device)
    if precision == "fp8":  # what is not a linear layer; see `evlgen.models.ops.fp8`
        return "bf16"
    if precision == "auto" or (precision == "fp16" and device.type == "cpu"):
        return "bf16" if computes_in_bf16(device) else "fp32"
    return precision


def computes_in_bf16(device: torch.device) -> bool:
    """True where bf16 matrix products run in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def dtype_of(precision: str, device: str | torch.device = "cpu") -> torch.dtype:
    """The torch dtype of ``auto``, ``fp32``, ``bf16``, ``fp16`` or ``fp8`` on a device."""
    return DTYPES[resolve_precision(precision, device)]


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """In its block operations compute in the types of their inputs, whatever autocast is on around it."""
    if not torch.amp.is_autocast_available(device.type):  # the meta device
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
