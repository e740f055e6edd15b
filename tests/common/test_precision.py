"""`auto` is bf16 where the device multiplies in it."""

from __future__ import annotations

import pytest
import torch

from evlgen.common.precision import dtype_of, resolve_precision


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_auto_on_a_cpu_follows_its_units(monkeypatch, amx, avx512, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert resolve_precision("auto", "cpu") == expected
    assert resolve_precision("fp16", "cpu") == expected


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_gpu_follows_its_units(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    assert resolve_precision("auto", "cuda") == expected


def test_what_is_named_is_taken():
    assert resolve_precision("bf16", "cpu") == "bf16"
    assert resolve_precision("fp16", "cuda") == "fp16"
    assert dtype_of("bf16") is torch.bfloat16
