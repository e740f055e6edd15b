"""BLIP-2 and LLaVA in transformers' format: read as ours and written from ours, with the same outputs in
transformers' own classes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    T5Config,
)

from evlgen import registry
from evlgen.cli import main
from evlgen.common.errors import CheckpointError
from evlgen.config.config import load_model_config, load_model_file
from evlgen.models.connectors.base import ConnectorInputs
from evlgen.models.published.conversion import convert
from evlgen.models.published.transformers_writing import write_transformers

_VOCABULARY = 408  # rows; the tokenizer has 400 tokens
_SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
_LANGUAGES = {
    "opt": OPTConfig(
        vocab_size=_VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
    ),
    "t5": T5Config(
        vocab_size=_VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=1,
        pad_token_id=1,
        eos_token_id=2,
    ),
    "llama": LlamaConfig(
        vocab_size=_VOCABULARY,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
        **_SMALL,
    ),
}
_TEXTS = ["a red circle", "two green hearts on the left side"]
PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer(golden):
    return AutoTokenizer.from_pretrained(golden / "evlgen_opt" / "language")


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory):
    """``theirs("opt")``: the folder of a small model of transformers with random weights, and the model."""
    made = {}

    def make(language, llava=False, **changes):
        key = (language, llava, str(changes))
        if key not in made:
            text = _LANGUAGES[language]
            if llava:
                vision = CLIPVisionConfig(**_SMALL, image_size=28, patch_size=14)
                settings = dict(vision_config=vision, text_config=text, image_token_index=405) | changes
                model = LlavaForConditionalGeneration(LlavaConfig(**settings))
            else:
                vision = {**_SMALL, "image_size": 28, "patch_size": 14}
                qformer = {**_SMALL, "num_hidden_layers": 4} | changes
                parts = dict(vision_config=vision, qformer_config=qformer, text_config=text)
                config = Blip2Config(**parts, num_query_tokens=5, image_token_index=405)
                model = Blip2ForConditionalGeneration(config)
            _randomise(model)
            folder = tmp_path_factory.mktemp("theirs")
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = folder, model.eval()
        return made[key]

    return make


@torch.no_grad()
def _randomise(model):
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        scale = 0.1 if "norm" not in name.lower() else 0.3
        value.normal_(0, scale, generator=generator)
        if "norm" in name.lower() and name.endswith("weight"):
            value += 1


def _read(folder, tmp_path):
    convert(folder, tmp_path / "own", "own")
    section = load_model_file(tmp_path / "own" / "config.yaml")
    return registry.get_model_class(section.arch).from_pretrained(tmp_path / "own")


@torch.no_grad()
def _assert_equal(ours, theirs):
    """Soft prompts, losses and greedy texts."""
    soft_prompts = ours.soft_prompts({"image": PIXELS})
    found = theirs.get_image_features(PIXELS)
    expected = torch.stack(list(found.pooler_output))
    torch.testing.assert_close(soft_prompts, expected, rtol=1e-4, atol=1e-5)
    marks = [theirs.config.image_token_id] * soft_prompts.shape[1]
    language = ours.language
    for index, text in enumerate(_TEXTS):
        (tokens,) = language.to_learn([text])
        read = [*tokens.before, *marks, *tokens.read]
        if theirs.config.text_config.is_encoder_decoder:
            labels = torch.tensor([tokens.learned])
            inputs = {"input_ids": torch.tensor([read]), "labels": labels}
        else:
            labels = [-100] * len(read) + tokens.learned
            inputs = {"input_ids": torch.tensor([read + tokens.learned]), "labels": torch.tensor([labels])}
        expected = theirs(pixel_values=PIXELS[index : index + 1], **inputs).loss
        loss = ours({"image": PIXELS[index : index + 1], "text_input": [text]})["loss"]
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    options = dict(num_beams=1, max_length=6, min_length=0)
    for row, ids in enumerate(ours.generate_tokens({"image": PIXELS}, **options)):
        (tokens,) = language.to_read([ours.prompt])
        read = torch.tensor([[*tokens.before, *marks, *tokens.read]])
        written = theirs.generate(
            pixel_values=PIXELS[row : row + 1],
            input_ids=read,
            max_new_tokens=6,
            num_beams=1,
            do_sample=False,
            eos_token_id=getattr(language, "end_token_ids", None),
            pad_token_id=language.pad_token_id,
        )[0].tolist()
        written = written[1:] if theirs.config.text_config.is_encoder_decoder else written
        written = written[read.shape[1] :] if written[: read.shape[1]] == read[0].tolist() else written
        assert written[: len(ids)] == ids


@pytest.mark.parametrize(
    ("language", "llava"), [("opt", False), ("t5", False), ("llama", False), ("llama", True)]
)
def test_outputs_are_equal_in_both_directions(theirs, tmp_path, language, llava):
    folder, model = theirs(language, llava)
    ours = _read(folder, tmp_path)
    _assert_equal(ours, model)
    line = ["convert", str(tmp_path / "own"), str(tmp_path / "back"), "--to", "transformers"]
    assert main(line) == 0
    back = type(model).from_pretrained(tmp_path / "back").eval()
    _assert_equal(ours, back)
    expected, found = model.state_dict(), back.state_dict()
    for key, value in expected.items():
        is_dropped = llava and (
            key.startswith("model.vision_tower.encoder.layers.2.") or "post_layernorm" in key
        )
        if not is_dropped and not key.endswith("qkv.bias"):  # the bias of keys has no effect
            assert torch.equal(found[key], value), key
    processor = AutoProcessor.from_pretrained(tmp_path / "back")
    from PIL import Image

    image = Image.effect_noise((40, 30), 90).convert("RGB")
    text = "<image>a red" if llava else "a red"
    inputs = processor(images=image, text=text, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 28, 28)
    count = ours.connector.num_soft_prompts(ours.vision.num_tokens)
    assert (inputs["input_ids"] == back.config.image_token_id).sum() == count
    assert back.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1


def test_a_folder_of_transformers_is_read_by_its_name(theirs, tmp_path, monkeypatch):
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path))
    folder, model = theirs("opt")
    cls = registry.get_model_class("blip2_opt")
    ours = cls.from_pretrained(folder)
    expected = model.get_image_features(PIXELS).pooler_output
    torch.testing.assert_close(ours.soft_prompts({"image": PIXELS}), expected, rtol=1e-4, atol=1e-5)
    (made,) = (tmp_path / "converted").iterdir()
    time = (made / "model.safetensors").stat().st_mtime_ns
    cls.from_pretrained(folder)
    assert (made / "model.safetensors").stat().st_mtime_ns == time  # converted once


@pytest.mark.parametrize("arch", ["blip2_opt", "evlgen_causal"])
def test_what_is_trained_here_is_written(golden, theirs, tmp_path, arch):
    parts = golden / "evlgen_opt"
    cfg = load_model_file(parts / "model.yaml")
    section = {"arch": arch, "vision": {**cfg.vision}, "language": {**cfg.language}}
    rows = 401  # 400 tokens, and one that stands for the image
    if arch == "blip2_opt":
        section["connector"] = {"name": "qformer", "num_query_token": 4, "num_layers": 2, "init": None}
        section["connector"] |= {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
        section["vision"] |= {"norm_eps": 1e-6}
    else:
        folder, _ = theirs("llama", True)
        convert(folder, tmp_path / "own", "own")
        section["language"] = {"name": str(tmp_path / "own" / "parts" / "language"), "precision": "fp32"}
        rows = _VOCABULARY  # some of them are free
        section["connector"] = {"name": "mlp", "keep_prefix": True}
        sizes = {"patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 4}
        section["vision"] = {"name": "clip_L", "image_size": 56, "pretrained": False, "kwargs": sizes}
        section["vision"] |= {"norm_eps": None, "precision": "fp32"}
    ours = registry.get_model_class(arch).from_config(section)
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    expected = ours.soft_prompts({"image": pixels})
    (tmp_path / "theirs").mkdir()
    write_transformers(ours, tmp_path / "theirs")
    cls = Blip2ForConditionalGeneration if arch == "blip2_opt" else LlavaForConditionalGeneration
    model = cls.from_pretrained(tmp_path / "theirs").eval()
    found = torch.stack(list(model.get_image_features(pixels).pooler_output))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(model.get_input_embeddings().weight) == rows


def test_what_has_no_equal_says_so(theirs, tmp_path, capsys):
    line = ["convert", "evlgen/assets/shapes/connector", str(tmp_path / "out"), "--to", "transformers"]
    assert main(line) == 1
    error = capsys.readouterr().err
    assert (
        "no class with a TomeFormer" in error and "evlgen push" in error and not (tmp_path / "out").exists()
    )

    changes = {
        "vision": {"tiles": {"max": 2}},
        "language": {"tome": {"layer": 1, "r": 2}},
        "checkpoint": None,
    }
    cuts = registry.get_model_class("evlgen_opt").from_config(
        load_model_config("evlgen_opt", "shapes", changes)
    )
    with pytest.raises(CheckpointError, match=r"no place for model\.vision\.tiles, model\.language\.tome\."):
        write_transformers(cuts, tmp_path)
    model = registry.get_model_class("evlgen_opt").from_pretrained("shapes")
    model.connector = registry.get_connector_class("mlp")(ConnectorInputs(128, 128))
    with pytest.raises(CheckpointError, match="no LayerNorm between .* model.vision.norm_eps: null"):
        write_transformers(model, tmp_path)
    folder, _ = theirs("llama", True, vision_feature_layer=[-2, -1])
    with pytest.raises(CheckpointError, match="reads several layers of its vision encoder"):
        convert(folder, tmp_path / "own", "own")
    folder, _ = theirs("opt", use_qformer_text_input=True)
    config = json.loads((folder / "config.json").read_text())
    hostile = tmp_path / "hostile"
    shutil.copytree(folder, hostile)
    config["text_config"]["_attn_implementation"] = "somebody/kernels"
    (hostile / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="config.json sets _attn_implementation, which could load code"):
        convert(hostile, tmp_path / "own", "own")
    with pytest.raises(CheckpointError, match="use_qformer_text_input is True, and only False has an equal"):
        convert(folder, tmp_path / "own", "own")
