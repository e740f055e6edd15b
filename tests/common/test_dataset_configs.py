"""Each dataset's section is its builder's dataclass, and is written as it was given."""

from __future__ import annotations

import copy
import dataclasses
import operator

import pytest

from evlgen.assemble import make_builders
from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.config.config import Config
from evlgen.config.dataset_config import DatasetConfig, FrozenDict, FrozenList
from evlgen.config.schema import config_of
from evlgen.config.yaml_io import read_yaml
from evlgen.datasets.shapes_dataset import ShapesCaptionBuilder, ShapesConfig

SHAPES = ["model.arch=evlgen_opt", "model.model_type=shapes", "run.max_epoch=1"]


def builders_of_the_package() -> list[str]:
    found = {name: registry.get_builder_class(name) for name in registry.list_datasets()}
    return [name for name, cls in found.items() if cls.__module__.startswith("evlgen.")]


@pytest.mark.parametrize("name", builders_of_the_package())
def test_each_builder_declares_its_section(name):
    required = [f"datasets.{name}.annotations=x.csv"] if "annotations" in fields_of(name) else []
    config = Config.load(None, [*SHAPES, f"datasets={{{name}: {{}}}}", *required])
    section = config.datasets[name]
    assert type(section) is config_of(registry.get_builder_class(name)) and section.builder == name
    assert "builder" not in config.datasets_plain()[name]
    with pytest.raises(ConfigError, match=rf"datasets\.{name}\.vis_procesor .*Did you mean 'vis_processor'"):
        Config.load(None, [*SHAPES, f"datasets={{{name}: {{vis_procesor: 3}}}}", *required])


def fields_of(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(config_of(registry.get_builder_class(name)))}


def test_a_section_is_written_as_it_was_given(tmp_path):
    config = Config.load(None, [*SHAPES, "datasets={mine: {builder: shapes_caption, val_size: 9}}"])
    assert config.datasets.mine.val_size == 9 and isinstance(config.datasets.mine, ShapesConfig)
    config.save(tmp_path / "config.yaml")
    written = read_yaml(tmp_path / "config.yaml")["datasets"]["mine"]
    given = {"builder", "dataset_card", "data_type", "train_size", "val_size", "test_size", "seed"}
    assert set(written) == {*given, "vis_processor", "text_processor"}
    again = Config.load(tmp_path / "config.yaml")
    assert again.datasets == config.datasets and again.to_yaml() == config.to_yaml()


def test_builders_are_given_the_section_itself():
    config = Config.load(None, [*SHAPES, "datasets={shapes_caption: {val_size: 9}}"])
    assert make_builders(config)["shapes_caption"].config is config.datasets.shapes_caption


@pytest.fixture
def own_builders(monkeypatch):
    entries = dict(registry._entries["builder"])

    @registry.register_builder("counted")
    class Counted(ShapesCaptionBuilder):
        """A constructor of its own: its parameters are the keys."""

        DEFAULT_CONFIG = None

        def __init__(self, name, cache_root, vis_processor: dict, text_processor: dict, count: int = 3):
            super().__init__(name, cache_root, vis_processor, text_processor, train_size=count)

    @registry.register_builder("open")
    class Open(ShapesCaptionBuilder):
        DEFAULT_CONFIG = None

        def __init__(self, extra: str = "", **options):
            super().__init__(**options)
            self.extra = extra

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class ColourConfig(ShapesConfig):
        colour: str

    @registry.register_builder("coloured")
    class Coloured(ShapesCaptionBuilder):
        CONFIG = ColourConfig
        DEFAULT_CONFIG = None

    yield
    monkeypatch.setitem(registry._entries, "builder", entries)


PROCESSORS = "vis_processor: {eval: {name: blip_image_eval}}, text_processor: {}"


@pytest.mark.usefixtures("own_builders")
def test_builders_of_the_users_own_have_sections_too():
    sections = {
        "counted": f"{{{PROCESSORS}, count: 5}}",
        "open": f"{{{PROCESSORS}, extra: a, seed: 4}}",
        "coloured": f"{{{PROCESSORS}, colour: red}}",
    }
    config = Config.load(None, [*SHAPES, *(f"datasets.{name}={text}" for name, text in sections.items())])
    assert all(isinstance(section, DatasetConfig) for section in config.datasets.values())
    assert (config.datasets.counted.count, config.datasets.open.extra, config.datasets.open.seed) == (
        5,
        "a",
        4,
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.datasets.counted.count = 6
    builders = make_builders(config)
    assert builders["counted"].sizes["train"] == 5 and builders["open"].seed == 4
    assert builders["coloured"].config.colour == "red"
    with pytest.raises(ConfigError, match=r"datasets\.counted\.cuont .*Did you mean 'count'"):
        Config.load(None, [*SHAPES, f"datasets.counted={{{PROCESSORS}, cuont: 5}}"])
    with pytest.raises(ConfigError, match=r"datasets\.coloured\.colour.*is required: str"):
        Config.load(None, [*SHAPES, f"datasets.coloured={{{PROCESSORS}}}"])


def test_lists_of_a_configuration_do_not_change_and_are_plain_in_its_text():
    config = Config.load(None, [*SHAPES, "run.train_splits=[train]", "model.connector.r=[4, 2]"])
    for change in (config.run.train_splits.append, config.model.connector["r"].append):
        with pytest.raises(TypeError, match="does not change"):
            change("val")
    plain = config.to_dict()
    assert type(plain["run"]["train_splits"]) is type(plain["model"]["connector"]["r"]) is list
    assert "train_splits:\n  - train\n" in config.to_yaml()


def test_a_frozen_mapping_is_copied_as_one_and_does_not_change():
    frozen = FrozenDict({"a": {"b": [{"c": 1}]}})
    again = copy.deepcopy(frozen)
    assert again == frozen and again.a.b[0].c == 1 and type(again["a"]) is FrozenDict
    assert type(again.a.b) is FrozenList and isinstance(again.a.b, list)
    for change in (
        *(lambda: frozen.a.update(b=2), lambda: frozen.a.pop("b"), lambda: setattr(frozen, "a", 1)),
        *(lambda: frozen.a.b.append(2), lambda: frozen.a.b.sort(), lambda: operator.iadd(frozen.a.b, [1])),
        *(lambda: operator.setitem(frozen.a.b, 0, 1), lambda: frozen.a.b[0].update(c=2)),
    ):
        with pytest.raises(TypeError, match="does not change"):
            change()
    with pytest.raises(AttributeError):
        frozen.d  # noqa: B018
