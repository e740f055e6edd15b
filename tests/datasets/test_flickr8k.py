"""Flickr8k as it is published: a list of captions, and a list of file names for each split."""

from __future__ import annotations

import pytest
from PIL import Image

from evlgen.common.errors import DataError
from evlgen.common.registry import registry
from evlgen.config.yaml_io import read_yaml
from evlgen.datasets.base_dataset import Skipped
from evlgen.files.io import PACKAGE_ROOT

TOKENS = """a.jpg#0\tA dog runs .
a.jpg#1\tThe dog .
b.jpg#0\tTwo cats , one of them black .
not a caption
c.jpg.1#0\tNobody lists this one .
"""


@pytest.fixture
def builder(tmp_path, monkeypatch):
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path))
    images = tmp_path / "flickr8k" / "Flicker8k_Dataset"
    images.mkdir(parents=True)
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (8, 8)).save(images / name)
    folder = tmp_path / "flickr8k"
    (folder / "Flickr8k.token.txt").write_text(TOKENS)
    (folder / "Flickr_8k.trainImages.txt").write_text("a.jpg\n")
    (folder / "Flickr_8k.devImages.txt").write_text("b.jpg\nd.jpg\n")
    (folder / "Flickr_8k.testImages.txt").write_text("\n")
    cls = registry.get_builder_class("flickr8k")
    vis = {"name": "blip_image_eval", "image_size": 8}
    text = {"name": "blip_caption"}
    info = read_yaml(PACKAGE_ROOT / cls.DEFAULT_CONFIG)["datasets"]["flickr8k"]["build_info"]
    return cls("flickr8k", tmp_path, {"train": vis, "eval": vis}, {"train": text, "eval": text}, info)


def test_training_sees_a_sample_for_each_caption_scoring_one_for_each_image(builder):
    train = builder.get_split("train")
    samples = [train[i] for i in range(len(train))]
    texts = [s["text_input"] for s in samples if not isinstance(s, Skipped)]
    assert texts == ["a dog runs", "the dog"]
    (bad,) = [s for s in samples if isinstance(s, Skipped)]
    assert bad.id == "line 4 of Flickr8k.token.txt" and "not of the form" in bad.reason
    assert builder.get_split("val").references() == {"b.jpg": ["Two cats , one of them black ."]}


def test_a_listed_image_without_captions_is_counted(builder):
    val = builder.get_split("val")
    skipped = [val[i] for i in range(len(val)) if isinstance(val[i], Skipped)]
    assert ("d.jpg", "no caption") in {(s.id, s.cause) for s in skipped}


def test_an_empty_list_is_named(builder):
    with pytest.raises(DataError, match="Flickr_8k.testImages.txt names no images"):
        builder.get_split("test")


def test_what_is_missing_is_named_with_the_command_that_says_where_it_is_to_be_had(builder, tmp_path):
    (tmp_path / "flickr8k" / "Flickr8k.token.txt").unlink()
    (line,) = builder.missing(["train"])
    assert "Flickr8k.token.txt" in line and "evlgen download flickr8k" in line
