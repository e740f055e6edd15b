"""Damaged weight files and model folders are named, whatever is wrong with them."""

from __future__ import annotations

import io
import json
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from evlgen.common.errors import CheckpointError
from evlgen.models.connectors.bert_weights import bert_sizes
from evlgen.weights.hub import local_model_folder, missing_model
from evlgen.weights.weights import check_weights_file, first_not_finite, read_weights, shards_of


@pytest.fixture
def language(golden, tmp_path):
    """A copy of the golden language model's folder."""
    return shutil.copytree(golden / "evlgen_opt" / "language", tmp_path / "language")


def change(file, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_zip_file_in_several_volumes(tmp_path) -> None:
    torch.save({"x": torch.zeros(3)}, tmp_path / "x.pth")
    whole = bytearray((tmp_path / "x.pth").read_bytes())
    locator = whole.rindex(b"PK\x06\x07")
    whole[locator + 16] = 2  # disks in all
    (tmp_path / "x.pth").write_bytes(whole)
    with pytest.raises(zipfile.BadZipFile):
        zipfile.is_zipfile(io.BytesIO(whole))
    for read in (read_weights, check_weights_file):
        with pytest.raises(CheckpointError, match="cannot be read.*multiple disks"):
            read(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "x" * 300, "a\0b", "", "none.safetensors", "a\\b", 3]
)
def test_an_index_that_names_no_file_beside_it(tmp_path, name) -> None:
    (tmp_path / "x").touch()
    (tmp_path / "folder").mkdir()
    index = tmp_path / "folder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="none beside it"):
        shards_of(index)


@pytest.mark.parametrize("key", ["dropout", "attention_dropout", "layerdrop", "hidden_dropout_prob"])
@pytest.mark.parametrize("value", [-0.1, 1.5, 4, "0.1", True, [0.1]])
def test_a_rate_that_is_none(language, key, value) -> None:
    change(language / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=f"config.json gives {key}"):
        local_model_folder(str(language))


def test_a_tokenizer_setting_of_another_kind(language) -> None:
    from evlgen.models.language.opt import OPTLanguageModel

    change(language / "tokenizer_config.json", model_max_length="x")
    with pytest.raises(CheckpointError, match="cannot be read"):
        OPTLanguageModel(str(language))


def test_heads_of_a_bert_that_do_not_divide_its_width(tmp_path) -> None:
    config = {"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="hidden_size 32 is no multiple of num_attention_heads 3"):
        bert_sizes(str(tmp_path), 2)
    with pytest.raises(ValueError, match="hidden_size 32 is no multiple"):
        bert_sizes(None, 2, hidden_size=32, num_attention_heads=3)


def test_an_address_is_no_model_and_is_not_fetched(monkeypatch) -> None:
    monkeypatch.setattr("evlgen.weights.hub.resolve", lambda name: pytest.fail(f"{name} was fetched"))
    assert "address" in missing_model("https://host/model")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64]
)
def test_weights_that_are_not_finite_are_refused_in_every_layout(tmp_path, dtype, number) -> None:
    good = {"a": torch.zeros(3, 2, dtype=dtype), "empty": torch.zeros(0), "ids": torch.arange(3)}
    bad = {**good, "b": torch.zeros(2, 3, dtype=dtype)}
    bad["b"][1, 1] = number
    for name in ("x.pth", "x.safetensors"):
        save = torch.save if name == "x.pth" else save_file
        save(good, tmp_path / name)
        assert read_weights(tmp_path / name).keys() == good.keys()
        save(bad, tmp_path / name)
        with pytest.raises(CheckpointError, match="x.* is refused: its tensor b holds numbers"):
            read_weights(tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"b": "x.safetensors"}}')
    with pytest.raises(CheckpointError, match="its tensor b holds numbers"):
        read_weights(tmp_path)


@pytest.mark.parametrize("kind", [k for k in dir(torch) if k.startswith(("float8", "float4"))])
def test_the_smallest_number_types_are_looked_at_too(kind) -> None:
    numbers = torch.zeros(4, dtype=torch.uint8).view(getattr(torch, kind))
    assert first_not_finite({"x": numbers}) is None
    if kind.startswith("float8_e") and "m0" not in kind:
        nan = torch.tensor([0.0, float("nan")]).to(getattr(torch, kind))
        assert first_not_finite({"x": numbers, "y": nan}) == "y"


@pytest.mark.parametrize("pickled", [False, True])
def test_a_language_model_with_a_number_that_is_not_finite(language, pickled) -> None:
    from evlgen.models.language.opt import OPTLanguageModel

    weights = load_file(language / "model.safetensors")
    name = next(n for n in weights if n.endswith("layers.0.fc1.weight"))
    weights[name][0, 0] = float("inf")
    if pickled:
        (language / "model.safetensors").unlink()
        torch.save(weights, language / "pytorch_model.bin")
    else:
        save_file(weights, language / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.language.name .* is refused: its tensor .*fc1.weight"):
        OPTLanguageModel(str(language))


def test_a_number_beyond_half_precision_is_not_read_as_infinity(language, golden) -> None:
    from omegaconf import OmegaConf

    from evlgen.common.registry import registry
    from evlgen.models.language.opt import OPTLanguageModel

    weights = load_file(language / "model.safetensors")
    next(v for n, v in weights.items() if n.endswith("layers.0.fc1.weight"))[0, 0] = 1e6
    save_file(weights, language / "model.safetensors", {"format": "pt"})
    OPTLanguageModel(str(language))
    with pytest.raises(CheckpointError, match="read as torch.float16, is refused: its tensor"):
        OPTLanguageModel(str(language), dtype=torch.float16)

    section = OmegaConf.load(golden / "evlgen_opt" / "model.yaml").model.vision
    weights = load_file(golden / "evlgen_opt" / section.pretrained)
    next(v for n, v in weights.items() if n.endswith("blocks.0.mlp.fc1.weight"))[0, 0] = 1e6
    save_file(weights, language / "vision.safetensors")
    options = {"pretrained": str(language / "vision.safetensors"), "kwargs": {**section.kwargs}}
    encoder = registry.get_vision_encoder_class(section.name)
    encoder(section.name, section.image_size, **options)
    with pytest.raises(CheckpointError, match="vision.safetensors, read as torch.float16, is refused"):
        encoder(section.name, section.image_size, dtype=torch.float16, **options)
