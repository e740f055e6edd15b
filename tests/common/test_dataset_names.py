"""Datasets under names of one's own: ``builder:`` says what they are."""

from __future__ import annotations

import pytest
from PIL import Image

from evlgen.assemble import build_datasets, make_builders
from evlgen.common.errors import ConfigError
from evlgen.config.config import Config

OPTIONS = ["model.arch=evlgen_opt", "model.model_type=shapes", "run.valid_splits=[]", "run.max_epoch=1"]
CATS_AND_DOGS = """
datasets:
  cats: {builder: image_text, annotations: {train: ./cats.csv}, text_processor: {train: {prompt: "one of "}}}
  dogs: {builder: image_text, annotations: {train: ./dogs.csv}}
run:
  train_dataset_ratios: {cats: 3, dogs: 1}
"""


@pytest.fixture
def project(tmp_path):
    for name in ("cats", "dogs"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.csv").write_text(f"image,caption\n{name}.png,{name}\n")
    (tmp_path / "project.yaml").write_text(CATS_AND_DOGS)
    return tmp_path / "project.yaml"


def test_one_builder_makes_several_datasets_each_with_its_defaults(project):
    cfg = Config.load(project, OPTIONS)
    assert cfg.datasets.dogs.vis_processor.train.name == "blip2_image_train"
    datasets = build_datasets(cfg, make_builders(cfg))
    texts = {name: splits["train"].load_text(0)["text_input"] for name, splits in datasets.items()}
    assert texts == {"cats": "one of cats", "dogs": "dogs"}


def test_a_saved_configuration_keeps_the_names(project, tmp_path):
    cfg = Config.load(project, OPTIONS)
    cfg.save(tmp_path / "saved.yaml")
    again = Config.load(tmp_path / "saved.yaml")
    assert again.to_dict() == cfg.to_dict() and again.datasets.cats.builder == "image_text"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "datasets.cats.builder=image_txt",
            r"datasets\.cats\.builder \(--options\): .*Did you mean 'image_text'",
        ),
        ("datasets.birds={}", r"datasets\.birds .*under this name.*of your own needs a `builder:` of these"),
        ("datasets.cats.anotations=x", r"datasets\.cats\.anotations .*Did you mean 'annotations'"),
        ("run.train_dataset_ratios={image_text: 1}", r"run\.train_dataset_ratios"),
    ],
)
def test_a_wrong_name_is_said_at_its_place(project, option, message):
    with pytest.raises(ConfigError, match=message):
        Config.load(project, [*OPTIONS, option])


def test_options_alone_make_a_dataset(project, monkeypatch):
    monkeypatch.chdir(project.parent)
    cfg = Config.load(
        None, [*OPTIONS, "datasets.image_text.annotations=cats.csv", "datasets.image_text.split.val=0"]
    )
    assert len(make_builders(cfg)["image_text"].get_split("train")) == 1
