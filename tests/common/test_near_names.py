"""A path that is not there: the name like it that is there."""

from __future__ import annotations

import pytest

from evlgen.common.errors import CheckpointError, ConfigError, DataError
from evlgen.config.build_info import BuildInfo
from evlgen.config.config import find_config
from evlgen.datasets.file_builder import FileBuilder
from evlgen.datasets.shard_builders import WebShardsBuilder
from evlgen.datasets.table_dataset import ImageTextBuilder
from evlgen.files.io import near_name
from evlgen.models.zoo import load_model_of
from evlgen.weights.hub import missing_model
from evlgen.weights.needed import missing_encoder, missing_parts
from evlgen.weights.weights import read_weights


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("photos/train.csv", "photos/val.csv", "my.yaml", "weights.pth"):
        (tmp_path / name).touch()
    (tmp_path / "gpt2-small").mkdir()


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("photos/trian.csv", "train.csv"),
        ("photos/Train.csv", "train.csv"),
        ("photo/train.csv", "photos"),
        ("photos/test.json", None),
        ("photos/val2/x", None),
        ("photos/train.csv", None),  # it is there
        ("\0", None),
        ("x" * 5000, None),
    ],
)
def test_the_first_part_that_is_missing_is_compared_with_what_its_folder_has(path, hint):
    assert near_name(path) == (f" Did you mean '{hint}'?" if hint else "")


def test_every_kind_of_file_that_a_user_names_has_a_hint():
    table = ImageTextBuilder("mine", ".", {}, {}, {"train": "photos/trian.csv"}, root="photo")
    annotation, root = table.missing(["train"])
    assert "Did you mean 'train.csv'? Put it there, or set datasets.mine.annotations." in annotation
    assert "Did you mean 'photos'? Put it there, or set datasets.mine.root." in root
    info = {"annotations": {"train": {"storage": "photos/trian.csv"}}, "images": {"storage": "photo"}}
    annotation, root = FileBuilder("mine", ".", {}, {}, info).missing()
    assert "Did you mean 'train.csv'? Put it there" in annotation
    assert "Did you mean 'photos'? Put it there" in root
    shards = {"storage": "photos/trian.csv"}
    (line,) = WebShardsBuilder("mine", ".", {}, {}, shards).missing()
    assert "Did you mean 'train.csv'? Put the shards there" in line
    with pytest.raises(ConfigError, match=r"Did you mean 'my\.yaml'\?"):
        find_config("may.yaml")
    assert "there is no file" in missing_encoder("weight.pth") and "'weights.pth'" in missing_encoder(
        "weight.pth"
    )
    assert "Did you mean 'gpt2-small'?" in missing_model("./gpt2-smal")
    with pytest.raises(CheckpointError, match=r"at weight\.pth\. Did you mean 'weights\.pth'\?"):
        read_weights("weight.pth")
    with pytest.raises(DataError, match=r"no checkpoint at .*gpt2-smal\. Did you mean 'gpt2-small'\?"):
        load_model_of(None, "./gpt2-smal", [], "cpu")
    (part,) = missing_parts("vit", False, None, {}, "weight.pth")
    assert part.why == "there is no such file or folder; see model.checkpoint. Did you mean 'weights.pth'?"


def test_build_info_of_a_builder_is_one_however_it_is_given():
    info = {"annotations": {"val": {"storage": "photos/val.csv"}}, "images": {"storage": "photos"}}
    first = FileBuilder("mine", ".", {}, {}, info).build_info
    assert isinstance(first, BuildInfo) and FileBuilder("mine", ".", {}, {}, first).build_info == first
