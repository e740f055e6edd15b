"""Low-rank adapters in a frozen language model."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.config.model_config import LoraConfig
from evlgen.models.language import CausalLanguageModel, OPTLanguageModel, Seq2SeqLanguageModel

TEXTS = ["a red circle", "two blue stars", "a cat"]
FAMILIES = ("opt", "llama", "qwen3", "gpt_neox", "gemma2", "bloom")


def awaken(model) -> None:
    """Adapters that change something, as after training."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.trained_modules():
            for weight in module.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_alone_are_trained_and_in_float32(model_folder, soft_prompts, family, dtype):
    folder = str(model_folder(family))
    plain = CausalLanguageModel(folder, dtype=dtype).requires_grad_(False)
    model = CausalLanguageModel(folder, dtype=dtype, lora=LoraConfig(r=2))
    soft = soft_prompts(model)
    with torch.no_grad():
        assert torch.equal(model.loss(soft, TEXTS)[0], plain.loss(soft, TEXTS)[0]), "they start as nothing"
    trained = {id(p) for m in model.trained_modules() for p in m.parameters()}
    assert trained and trained == {id(p) for p in model.parameters() if p.requires_grad}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    awaken(model)
    model.loss(soft, TEXTS)[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generation_is_with_the_adapters(model_folder, soft_prompts, family, num_beams):
    """As by a model whose weights they are added to."""
    folder = str(model_folder(family))
    model = CausalLanguageModel(folder, lora=LoraConfig(r=2)).eval()
    soft = soft_prompts(model)
    options = {"num_beams": num_beams, "max_length": 6, "min_length": 4}
    before = model.generate(soft, [""] * 3, **options)
    awaken(model)
    merged = CausalLanguageModel(folder).eval()
    names = dict(merged.model.named_modules())
    for name, layer in model.model.named_modules():
        if hasattr(layer, "base_layer"):
            names[name].weight += layer.get_delta_weight("default")
    after = model.generate(soft, [""] * 3, **options)
    assert after == merged.generate(soft, [""] * 3, **options) != before
    assert model.loss(soft, TEXTS)[0].item() == pytest.approx(merged.loss(soft, TEXTS)[0].item(), rel=1e-4)


def test_layers_can_be_named_and_have_dropout_in_training(model_folder, soft_prompts):
    lora = LoraConfig(r=3, alpha=6.0, dropout=0.5, target_modules=["gate_proj", "layers.0.self_attn.o_proj"])
    model = CausalLanguageModel(str(model_folder("llama")), lora=lora).eval()
    names = {n.split(".lora_")[0] for n, p in model.model.named_parameters() if p.requires_grad}
    assert names == {
        *(f"model.layers.{i}.mlp.gate_proj" for i in range(2)),
        "model.layers.0.self_attn.o_proj",
    }
    awaken(model)
    soft = soft_prompts(model)
    assert model.loss(soft, TEXTS)[0].item() == model.loss(soft, TEXTS)[0].item()
    for module in model.trained_modules():
        module.train()
    assert model.loss(soft, TEXTS)[0].item() != model.loss(soft, TEXTS)[0].item()


def test_adapters_in_a_whole_model_are_trained_saved_and_loaded(golden, tmp_path):
    from omegaconf import OmegaConf
    from safetensors.torch import load_file

    from evlgen.config.config import load_model_file

    cfg = load_model_file(golden / "evlgen_opt" / "model.yaml")
    changes = {"language": {"lora": {"r": 2, "dropout": 0.1}}}
    cls = registry.get_model_class("evlgen_opt")
    model = cls.from_config(OmegaConf.merge(cfg, OmegaConf.create(changes))).train()
    adapters = model.language.trained_modules()
    assert all(part.training for module in adapters for part in module.modules())
    assert not model.language.model.training
    samples = {
        "image": load_file(golden / "evlgen_opt" / "expected.safetensors")["image"],
        "text_input": TEXTS,
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for _ in range(2):
        model(samples)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in changed if n.startswith("language.")} == {n for n in before if ".lora_" in n} != set()
    model.eval().save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {n for n in saved if n.startswith("language.")} == {n for n in before if ".lora_" in n}
    loaded = cls.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(samples)["loss"], model(samples)["loss"])
    assert loaded.generate(samples, max_length=4) == model.generate(samples, max_length=4)


def test_adapters_of_an_encoder_decoder(seq2seq_folder, soft_prompts):
    model = Seq2SeqLanguageModel(str(seq2seq_folder("t5")), lora=LoraConfig(r=2)).eval()
    awaken(model)
    model.loss(soft_prompts(model), TEXTS)[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_a_layer_that_is_not_there_is_named_with_the_nearest(model_folder):
    lora = LoraConfig(target_modules=["q_prj"])
    with pytest.raises(ConfigError, match="has no layer 'q_prj'. Did you mean .*'q_proj'"):
        OPTLanguageModel(str(model_folder("opt")), lora=lora)


def test_embeddings_take_no_adapter(model_folder):
    lora = LoraConfig(target_modules=["embed_tokens"])
    with pytest.raises(ConfigError, match="takes no adapter on its embedding 'embed_tokens'"):
        OPTLanguageModel(str(model_folder("opt")), lora=lora)


def test_a_layer_that_takes_no_adapter_is_named(model_folder):
    lora = LoraConfig(target_modules=["final_layer_norm"])
    with pytest.raises(ConfigError, match="peft cannot put adapters into a opt model: .*layers: fc1"):
        OPTLanguageModel(str(model_folder("opt")), lora=lora)


def test_without_peft_the_message_says_how_to_get_it(model_folder, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "peft" else found(n, *a))
    with pytest.raises(ConfigError, match=r"needs peft, .* `pip install peft`"):
        OPTLanguageModel(str(model_folder("opt")), lora=LoraConfig())
