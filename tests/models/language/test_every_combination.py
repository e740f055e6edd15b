"""Any vision encoder, any connector and any language model: one line of YAML each."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
import transformers

from evlgen.common.registry import registry
from evlgen.config.config import Config

SMALL = "kwargs: {patch_size: 8, embed_dim: 32, depth: 2, num_heads: 4}, pretrained: false, image_size: 32"
VISION = {
    "vit": f"{{name: vit_tiny_patch16_224, {SMALL}}}",
    "clip": f"{{name: vit_base_patch32_clip_quickgelu_224, {SMALL}}}",
    "eva02": f"{{name: eva02_tiny_patch14_224, {SMALL}}}",
    "siglip": f"{{name: vit_base_patch16_siglip_224, {SMALL}}}",
    "dinov2 with registers": f"{{name: vit_small_patch14_reg4_dinov2, {SMALL}}}",
    "clip_L": f"{{name: clip_L, {SMALL}}}",
    "eva_clip_g": f"{{name: eva_clip_g, {SMALL}}}",
    "of frames": f"{{name: vit_tiny_patch16_224, temporal: {{form: concat}}, {SMALL}}}",
}
BERT = "num_layers: 2, hidden_size: 32, num_attention_heads: 4, intermediate_size: 48"
CONNECTORS = {
    "linear": "{name: linear}",
    "mlp": "{name: mlp}",
    "pool": "{name: pool, grid: 2}",
    "pixel_shuffle": "{name: pixel_shuffle, factor: 2}",
    "c_abstractor": "{name: c_abstractor, grid: 2, depth: 1, hidden_size: 32}",
    "resampler": "{name: resampler, num_latents: 4, num_layers: 1, num_attention_heads: 2}",
    "tomeformer": f"{{name: tomeformer, r: 3, {BERT}}}",
    "qformer": f"{{name: qformer, num_query_token: 5, {BERT}}}",
}
LANGUAGE = ("opt", "llama", "qwen2", "qwen3", "gpt_neox", "gemma", "gemma3", "t5")


@pytest.fixture(scope="session")
def language_folder(model_folder, tmp_path_factory):
    """The folder of a random language model of a family."""
    folder = tmp_path_factory.mktemp("t5")

    def find(family: str):
        if family != "t5":  # linear gives a soft prompt for each token of each frame
            return model_folder(family, max_position_embeddings=128)
        if not (folder / "config.json").exists():
            tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder("opt"))
            tokenizer.save_pretrained(folder)
            sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
            ids = {"decoder_start_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
            config = transformers.T5Config(
                vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes, **ids
            )
            torch.manual_seed(0)
            transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
        return folder

    return find


def test_the_connectors_are_all_of_them():
    builtin = [n for n in registry.list_connectors() if "test" not in n]
    assert set(CONNECTORS) == set(builtin)


PAIRS = {
    *itertools.product(VISION, CONNECTORS, ["opt"]),
    *itertools.product(["vit"], CONNECTORS, LANGUAGE),
    *itertools.product(VISION, ["tomeformer"], ["t5", "gemma3"]),
}


@pytest.mark.parametrize(("vision", "connector", "language"), sorted(PAIRS))
def test_parts_fit_together(language_folder, vision, connector, language, caplog):
    options = [
        f"model.vision={VISION[vision]}",
        f"model.connector={CONNECTORS[connector]}",
        f"model.language.name={language_folder(language)}",
    ]
    caplog.set_level(logging.ERROR)
    torch.manual_seed(0)
    cfg = Config.load("projects/shapes/caption.yaml", options)
    model = registry.get_model_class(cfg.model.arch).from_config(cfg.model).train()
    image = torch.randn(2, 3, 32, 32)
    samples = {"image": image, "text_input": ["a red circle", "two blue stars"]}
    if vision == "of frames":
        samples["image"] = image.unsqueeze(2).repeat(1, 1, 3, 1, 1)
    loss = model(samples)["loss"]
    loss.backward()
    assert loss.isfinite() and loss > 0
    with_gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradients and all(name.startswith(("connector.", "ln_vision.")) for name in with_gradients)
    model.eval()
    texts = model.generate({"image": samples["image"]}, num_beams=2, max_length=3)
    answers = model.predict_answers({**samples, "text_input": "how many?"}, max_len=2, prompt="Q: {} A:")
    assert len(texts) == len(answers) == 2 and all(isinstance(text, str) for text in [*texts, *answers])
