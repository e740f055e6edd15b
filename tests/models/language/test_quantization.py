"""Weights in 8 or 4 bits: what is asked of transformers, and what is said where they cannot be."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from evlgen.common.errors import ConfigError
from evlgen.config.model_config import LanguageConfig, ModelConfig
from evlgen.models.language import build_language_model
from evlgen.models.language.quantization import quantization_options

GPU = torch.device("cuda")


@pytest.fixture
def with_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_without_quantisation_nothing_is_asked():
    assert quantization_options("none", torch.float32, torch.device("cpu")) == {}


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_on_a_cpu_the_key_and_the_remedy_are_named(model_folder, bits):
    language = LanguageConfig(str(model_folder("llama")), quantization=bits)
    message = f"model.language.quantization: {bits} needs .* GPU, and the run is on 'cpu'.*quantization: none"
    with pytest.raises(ConfigError, match=message):
        build_language_model(ModelConfig("evlgen_opt", language=language), "opt", "cpu")


def test_without_the_gpu_of_a_run_that_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="GPU, and there is none on this machine"):
        quantization_options("4bit", torch.bfloat16, GPU)


def test_without_bitsandbytes_the_message_says_how_to_get_it(with_gpu, monkeypatch):
    found = importlib.util.find_spec
    hidden = "bitsandbytes"
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == hidden else found(n, *a))
    with pytest.raises(ConfigError, match=r'needs bitsandbytes, .* `pip install "evlgen\[quantized\]"`'):
        quantization_options("8bit", torch.bfloat16, GPU)


def test_what_transformers_is_asked_for(with_gpu):
    pytest.importorskip("bitsandbytes")
    eight = quantization_options("8bit", torch.float16, GPU)
    assert eight["quantization_config"].load_in_8bit and eight["device_map"] == {"": GPU}
    four = quantization_options("4bit", torch.bfloat16, GPU)["quantization_config"]
    assert four.load_in_4bit and four.bnb_4bit_quant_type == "nf4"
    assert four.bnb_4bit_compute_dtype == torch.bfloat16
