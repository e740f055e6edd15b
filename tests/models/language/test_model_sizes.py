"""A configuration that describes far more than its weight files hold is refused before anything is built."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
import transformers

from evlgen.common.errors import CheckpointError
from evlgen.config.model_config import LanguageConfig, ModelConfig
from evlgen.models.language import build_language_model
from evlgen.weights.model_sizes import Held, check_counts, weights_held


@pytest.fixture(scope="module")
def folders(model_folder, seq2seq_folder, tmp_path_factory):
    """Small models whose configurations name their sizes in different ways."""

    def others(kind):
        folder = tmp_path_factory.mktemp(kind)
        shutil.copytree(model_folder("qwen2"), folder, dirs_exist_ok=True)
        small = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "num_attention_heads": 4}
        if kind == "gpt2":
            config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=340)
            transformers.GPT2LMHeadModel(config).save_pretrained(folder)
        else:
            text = {**small, "head_dim": 8, "num_key_value_heads": 2, "vocab_size": 340}
            image = {"mm_tokens_per_image": 4, "image_token_index": 5}
            vision = {**small, "image_size": 28, "patch_size": 14}
            config = transformers.Gemma3Config(text_config=text, vision_config=vision, **image)
            transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
        return folder

    made = {}

    def folder(kind):
        if kind not in made:
            known = {"t5": seq2seq_folder, "marian": seq2seq_folder, "gpt2": others, "gemma3": others}
            made[kind] = known.get(kind, model_folder)(kind)
        return made[kind]

    return folder


def changed(folder, into, changes):
    shutil.copytree(folder, into, dirs_exist_ok=True)
    config = json.loads((into / "config.json").read_text())
    for path, value in changes.items():
        *parents, key = path.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        section[key] = value
    (into / "config.json").write_text(json.dumps(config))
    return into


def load(folder, device="cpu"):
    cfg = ModelConfig("evlgen_causal", language=LanguageConfig(str(folder), precision="fp32"))
    return build_language_model(cfg, "causal", device)


LARGE = [
    *(("llama", key, 200_000_000) for key in ("num_labels", "num_attention_heads", "head_dim", "vocab_size")),
    *(("llama", key, 100_000) for key in ("num_hidden_layers", "hidden_size", "intermediate_size")),
    *(("gpt2", key, 100_000) for key in ("n_embd", "n_layer", "n_head", "n_inner", "n_positions")),
    *(("t5", key, 10**7) for key in ("d_model", "d_ff", "d_kv", "num_layers", "num_decoder_layers")),
    ("t5", "relative_attention_num_buckets", 10**7),
    *(("marian", key, 10**7) for key in ("encoder_layers", "decoder_ffn_dim", "max_position_embeddings")),
    *(("gemma3", f"text_config.{key}", 10**6) for key in ("hidden_size", "num_hidden_layers", "vocab_size")),
    *(("gemma3", f"vision_config.{key}", 10**6) for key in ("hidden_size", "image_size")),
    *(("bloom", key, 10**6) for key in ("n_layer", "hidden_size")),
    *(("mamba", key, 10**7) for key in ("state_size", "conv_kernel")),
    *(("llama", key, -5) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")),
    *(("gpt2", "n_layer", -1), ("gemma3", "text_config.num_hidden_layers", -1)),
    ("opt", "word_embed_proj_dim", 10**7),
    ("opt", "max_position_embeddings", 10**8),
    ("qwen3", "hidden_size", 3200),  # a hundred times as wide, below what one number may be
]


@pytest.mark.parametrize(("kind", "key", "value"), LARGE)
def test_a_size_beyond_the_weights_is_refused_at_once(folders, kind, key, value, tmp_path):
    folder = changed(folders(kind), tmp_path / "model", {key: value})
    start = time.process_time()
    with pytest.raises(CheckpointError, match="cannot be read: its configuration (gives|describes)") as error:
        load(folder)
    assert str(folder) in str(error.value)
    assert time.process_time() - start < 20


def test_texts_are_not_measured_by_such_a_folder(folders, tmp_path):
    with pytest.raises(CheckpointError, match="num_hidden_layers as 100000"):
        load(changed(folders("llama"), tmp_path / "m", {"num_hidden_layers": 100_000}), "meta")


@pytest.mark.parametrize(
    ("key", "value"),
    [("id2label", {str(i): "x" for i in range(200_000)}), ("layer_types", ["full_attention"] * 1_000_000)],
    ids=["id2label", "layer_types"],
)
def test_a_list_longer_than_any_model_has_is_refused_at_once(folders, key, value, tmp_path):
    start = time.process_time()
    with pytest.raises(CheckpointError, match=f"its configuration gives {key} with {len(value)} entries"):
        load(changed(folders("llama"), tmp_path / "model", {key: value}))
    assert time.process_time() - start < 20


def test_sizes_are_looked_at_before_the_weights_are_here(folders, tmp_path):
    folder = changed(folders("llama"), tmp_path / "model", {"num_hidden_layers": 100_000})
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="num_hidden_layers as 100000"):
        load(folder, "meta")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "gemma3", "mamba"])
def test_models_as_they_are_saved_are_read(folders, kind, tmp_path):
    harmless = {"vision_feature_layer": -2, "image_token_index": -200}
    harmless |= {"rope_theta": 10**9, "model_max_length": 10**30, "seed": 10**12, "num_labels": 50}
    assert load(changed(folders(kind), tmp_path / "model", harmless)).embed_dim == 32


def test_weights_of_pytorch_files_count_too(folders, tmp_path):
    folder = changed(folders("llama"), tmp_path / "model", {})
    before = weights_held(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert before == Held(sum(p.numel() for p in model.parameters()), len(list(model.parameters())))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert weights_held(folder).tensors == before.tensors
    assert load(folder).embed_dim == 32
    with pytest.raises(CheckpointError, match="describes a model of"):
        load(changed(folder, tmp_path / "wide", {"hidden_size": 3200}))


def test_configurations_of_large_models_are_not_refused():
    """Numbers of Llama 4, Qwen 2.5, DeepSeek V3, Falcon and Gemma 3n, and keys of training that some keep."""
    config = {
        **{"hidden_size": 8192, "intermediate_size": 49152, "vocab_size": 290_943, "num_hidden_layers": 126},
        **{"max_position_embeddings": 10_485_760, "max_window_layers": 80, "n_routed_experts": 256},
        **{
            "sliding_window": 4_194_304,
            "attention_chunk_size": 8_000_000,
            "rope_theta": 1e9,
            "eos_token_id": 2,
        },
        **{
            "num_parameters": 10**12,
            "training_tokens": 10**13,
            "layer_norm_epsilon": 1e-5,
            "num_experts": 16384,
        },
        "text_config": {"vocab_size_per_layer_input": 262_144, "altup_num_inputs": 4},
        "quantization_config": {"group_size": 10**12},
    }
    check_counts("x", config, Held(5_000_000, 300))
