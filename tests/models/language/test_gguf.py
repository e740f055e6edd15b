"""Language models in one GGUF file: the same model as the folder it was made from."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
import transformers

from evlgen.common.errors import CheckpointError, ConfigError
from evlgen.config.model_config import LanguageConfig, LoraConfig, ModelConfig
from evlgen.files.io import PACKAGE_ROOT
from evlgen.models.language import build_language_model
from evlgen.weights.hub import looks_like_path, missing_model

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (extra: gguf)")

TOKENIZER = PACKAGE_ROOT / "assets" / "shapes" / "language"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    **{f"attn_{x}.{k}": f"self_attn.{x}_proj.{k}" for x in "qkv" for k in ("weight", "bias")},
    **{f"ffn_{x}.weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
}


@pytest.fixture(scope="module")
def model():
    """A Qwen2 of a few thousand weights."""
    torch.manual_seed(0)
    words = len(transformers.AutoTokenizer.from_pretrained(TOKENIZER))
    config = transformers.Qwen2Config(
        vocab_size=words, num_key_value_heads=2, tie_word_embeddings=False, **SIZES
    )
    return transformers.Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    """The same as llama.cpp's tools would write it, in full precision."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    content = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer = gguf.GGUFWriter(path, "qwen2")
    config = model.config
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types([3 if i in tokenizer.all_special_ids else 1 for i in range(len(words))])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in content["merges"]])
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    writer.add_tensor("output.weight", state["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        for theirs, ours in LAYER.items():
            writer.add_tensor(f"blk.{layer}.{theirs}", state[f"model.layers.{layer}.{ours}"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def language(name, **changes):
    section = LanguageConfig(name=str(name), precision="fp32", **changes)
    return build_language_model(ModelConfig(arch="evlgen_causal", language=section), "causal")


def test_it_reads_the_weights_and_words_of_the_model_it_was_made_from(model, file):
    read = language(file)
    assert read.KIND == "causal" and not getattr(read.model, "is_quantized", False)
    state = read.model.state_dict()
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == {
        key: tuple(value.shape) for key, value in state.items()
    }
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    ids = read.tokenizer("a red circle", add_special_tokens=False).input_ids
    assert read.tokenizer.decode(ids) == "a red circle"
    prompts = torch.randn(2, 3, 32)
    loss, count = read.loss(prompts, ["a red circle", "two stars"])
    assert loss.isfinite() and count > 4
    assert len(read.generate(prompts, ["", ""], num_beams=1, max_length=3)) == 2


def test_adapters_are_trained_on_it(file):
    pytest.importorskip("peft", reason="peft is not installed (extra: lora)")
    read = language(file, lora=LoraConfig(r=2, target_modules=["q_proj"]))
    assert read.trained_modules()


def test_what_cannot_be_read_is_named(file, tmp_path, monkeypatch):
    assert looks_like_path("model.gguf")
    with pytest.raises(CheckpointError, match="model.language.name 'gone.gguf': there is no file"):
        language("gone.gguf")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged.gguf"):
        language(damaged)
    part = tmp_path / "model-00001-of-00003.gguf"
    part.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="one part of several"):
        language(part)
    with pytest.raises(ConfigError, match="quantization"):
        language(file, quantization="8bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install "evlgen[gguf]"' in missing_model(str(file))
