"""Damaged weight files and model folders are named, whatever is wrong with them."""

from __future__ import annotations

import io
import json
import shutil
import zipfile

import pytest
import torch

from evlgen.common.errors import CheckpointError
from evlgen.common.hub import local_model_folder, missing_model
from evlgen.common.weights import check_weights_file, read_weights, shards_of
from evlgen.models.connectors.bert_weights import bert_sizes


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
    monkeypatch.setattr("evlgen.common.hub.resolve", lambda name: pytest.fail(f"{name} was fetched"))
    assert "address" in missing_model("https://host/model")
