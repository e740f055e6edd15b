"""Plugins: files, modules and entry points."""

from __future__ import annotations

import pickle
import sys

import pytest
import torch
import yaml

from evlgen import cli
from evlgen.common.errors import ConfigError, EVLGenError, RegistryError
from evlgen.common.plugins import load_entry_points, load_plugins
from evlgen.common.registry import registry
from evlgen.config.config import Config

PLUGIN = """
from evlgen.common.registry import registry
from evlgen.processors.base_processor import BaseProcessor

LOADED = []


@registry.register_processor("{name}")
class Shout(BaseProcessor):
    def __init__(self, times: int = 1) -> None:
        self.times = times

    def __call__(self, item):
        return item.upper() * self.times
"""


@pytest.fixture(autouse=True)
def clean_imports(monkeypatch):
    """What a test imports or registers is gone after it."""
    entries = {kind: dict(names) for kind, names in registry._entries.items()}
    modules = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for kind, names in entries.items():
        gone = set(registry._entries[kind]) - set(names)
        for name in gone:
            if not registry._entries[kind][name].__module__.startswith("evlgen."):
                del registry._entries[kind][name]
    for name in set(sys.modules) - modules:
        if name.startswith("evlgen_plugin_") or name in ("acme_parts", "acme_parts.shout", "neighbour"):
            del sys.modules[name]


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_is_loaded_from_beside_the_yaml(tmp_path):
    path = write(tmp_path, "shout.py", PLUGIN.format(name="shout"))
    assert load_plugins(["./shout.py"], tmp_path) == [str(path.resolve())]
    assert registry.get_processor_class("shout")(2)("a") == "AA"


def test_a_file_is_loaded_from_the_working_folder_where_the_yaml_has_none(tmp_path, monkeypatch):
    path = write(tmp_path, "here/shout.py", PLUGIN.format(name="shout"))
    monkeypatch.chdir(tmp_path / "here")
    assert load_plugins(["shout.py"], tmp_path) == [str(path.resolve())]


def test_loading_twice_under_two_names_runs_the_file_once(tmp_path):
    path = write(tmp_path, "shout.py", PLUGIN.format(name="shout"))
    assert load_plugins(["./shout.py", str(path), "./shout.py"], tmp_path) == [str(path.resolve())]
    first = registry.get_processor_class("shout")
    load_plugins(["./shout.py"], tmp_path)
    assert registry.get_processor_class("shout") is first


def test_two_files_of_one_name_are_two_plugins(tmp_path):
    write(tmp_path, "a/part.py", PLUGIN.format(name="shout_a"))
    write(tmp_path, "b/part.py", PLUGIN.format(name="shout_b"))
    load_plugins(["a/part.py", "b/part.py"], tmp_path)
    assert {"shout_a", "shout_b"} <= set(registry.list_processors())


def test_instances_of_plugin_classes_can_be_pickled(tmp_path):
    write(tmp_path, "shout.py", PLUGIN.format(name="shout"))
    load_plugins(["./shout.py"], tmp_path)
    shout = registry.get_processor_class("shout")(3)
    assert pickle.loads(pickle.dumps(shout)).times == 3


def test_a_plugin_imports_its_neighbours_and_leaves_the_path_as_it_was(tmp_path):
    write(tmp_path, "neighbour.py", "VALUE = 7")
    write(tmp_path, "user.py", "from neighbour import VALUE\nassert VALUE == 7\n")
    before = list(sys.path)
    load_plugins(["./user.py"], tmp_path)
    assert sys.path == before


def test_a_missing_file_names_the_places_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EVLGenError) as error:
        load_plugins(["./gone.py"], tmp_path / "project")
    assert str(tmp_path / "project" / "gone.py") in str(error.value)
    assert f"nor at {tmp_path / 'gone.py'}" in str(error.value)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("x = 1\nraise RuntimeError('no luck')", "failed at line 2: RuntimeError: no luck"),
        (
            "import not_a_module_at_all",
            "failed at line 1: ModuleNotFoundError: No module named 'not_a_module_at_all'",
        ),
        ("x = 1\ndef broken(:\n", "failed at line 2: SyntaxError"),
    ],
)
def test_an_error_inside_a_plugin_names_plugin_cause_and_line(tmp_path, text, cause):
    path = write(tmp_path, "bad.py", text)
    with pytest.raises(EVLGenError) as error:
        load_plugins(["./bad.py"], tmp_path)
    assert f"plugin './bad.py' ({path.resolve()}) {cause}" in str(error.value)


def test_a_plugin_that_failed_is_run_again_after_it_was_repaired(tmp_path):
    path = write(tmp_path, "shout.py", "raise RuntimeError")
    with pytest.raises(EVLGenError):
        load_plugins(["./shout.py"], tmp_path)
    path.write_text(PLUGIN.format(name="shout") + "# repaired\n")
    load_plugins(["./shout.py"], tmp_path)
    assert "shout" in registry.list_processors()


def test_a_wrong_base_class_in_a_plugin_is_named_with_the_plugin(tmp_path):
    text = "from evlgen.common.registry import registry\n@registry.register_processor('p')\nclass P: pass\n"
    write(tmp_path, "bad.py", text)
    with pytest.raises(EVLGenError, match="plugin './bad.py' .* must derive from"):
        load_plugins(["./bad.py"], tmp_path)


def test_a_module_is_imported_by_its_dotted_name(tmp_path, monkeypatch):
    write(tmp_path, "acme_parts/__init__.py", "")
    write(tmp_path, "acme_parts/shout.py", PLUGIN.format(name="acme_shout"))
    monkeypatch.syspath_prepend(tmp_path)
    assert load_plugins(["acme_parts.shout"]) == ["acme_parts.shout"]
    assert "acme_shout" in registry.list_processors()


@pytest.mark.parametrize("name", ["acme_nowhere", "acme_nowhere.shout", "json.nowhere"])
def test_a_missing_module_gets_the_remedy(name):
    with pytest.raises(
        EVLGenError, match=f"plugin '{name}': Python finds no such module. Install its package"
    ):
        load_plugins([name])


def install(folder, module_text):
    """A tiny installed distribution: its module and the metadata that pip would have written."""
    write(folder, "acme_parts/__init__.py", module_text)
    write(
        folder, "acme_parts-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: acme-parts\nVersion: 1.0\n"
    )
    write(folder, "acme_parts-1.0.dist-info/entry_points.txt", "[evlgen.plugins]\nacme = acme_parts\n")


def test_entry_points_of_installed_packages_are_loaded_and_twice_is_harmless(tmp_path, monkeypatch):
    install(tmp_path, PLUGIN.format(name="acme_shout"))
    monkeypatch.syspath_prepend(tmp_path)
    assert "acme" in load_entry_points()
    first = registry.get_processor_class("acme_shout")
    load_entry_points()
    assert registry.get_processor_class("acme_shout") is first


def test_an_entry_point_that_fails_names_its_package(tmp_path, monkeypatch):
    install(tmp_path, "raise RuntimeError('no luck')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EVLGenError) as error:
        load_entry_points()
    assert str(error.value) == (
        "plugin 'acme' of acme-parts (acme_parts) failed: RuntimeError: no luck. "
        "Repair or uninstall that package."
    )


OWN_CONNECTOR = """
from torch import nn

from evlgen.config.schema import PositiveInt
from evlgen.models.connectors import Connector, ConnectorInputs


class Halves(Connector):
    def __init__(self, inputs: ConnectorInputs, depth: PositiveInt = 1) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs.vision_dim, inputs.language_dim)

    def forward(self, tokens):
        return self.proj(tokens[:, ::2])

    def num_soft_prompts(self, num_tokens):
        return -(-num_tokens // 2)


class NoConnector(nn.Module):
    pass
"""


def test_a_part_is_named_by_its_dotted_path(tmp_path, monkeypatch):
    (tmp_path / "own_halves.py").write_text(OWN_CONNECTOR)
    monkeypatch.syspath_prepend(tmp_path)
    start = ["model.arch=evlgen_opt", "model.model_type=shapes"]
    cfg = Config.load(None, [*start, "model.connector.name=own_halves.Halves", "model.connector.depth=2"])
    assert cfg.plugins == ("own_halves",)
    assert cfg.model_plain()["connector"] == {"name": "own_halves.Halves", "depth": 2}
    model = registry.get_model_class("evlgen_opt").from_config(cfg.model_plain())
    assert type(model.connector).__name__ == "Halves"
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.connector.proj.weight, model.connector.proj.weight)
    with pytest.raises(ConfigError, match=r"model\.connector\.dept .*Did you mean 'depth'"):
        Config.load(None, [*start, "model.connector.name=own_halves.Halves", "model.connector.dept=2"])
    with pytest.raises(ConfigError, match="'own_halves.NoConnector' .* must derive from .*Connector"):
        Config.load(None, [*start, "model.connector.name=own_halves.NoConnector"])
    with pytest.raises(ConfigError, match="no connector is registered as 'own_halves.Halfs'"):
        Config.load(None, [*start, "model.connector.name=own_halves.Halfs"])


def test_a_dotted_path_of_a_module_that_nobody_imported_runs_nothing(tmp_path, monkeypatch):
    (tmp_path / "own_stranger.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RegistryError, match="no connector is registered as 'own_stranger.Part'"):
        registry.get_connector_class("own_stranger.Part")
    assert "own_stranger" not in sys.modules


@pytest.fixture
def given(tmp_path, monkeypatch):
    """A folder of somebody else's, with weights, a configuration and code that leaves a mark; the user is in
    another one."""
    folder = tmp_path / "given"
    mark = f"open({str(tmp_path / 'it_ran')!r}, 'w').close()\n"
    for name in ("evil.py", "evil_package/__init__.py", "evil_package/part.py"):
        write(folder, name, mark)
    write(folder, "checkpoints/step_000001/model.safetensors", "")
    write(folder, "checkpoints/step_000001/config.yaml", "")
    write(tmp_path, "here/mine.py", PLUGIN.format(name="shout"))
    write(folder, "mine.py", mark)
    monkeypatch.chdir(tmp_path / "here")
    yield folder
    assert not (tmp_path / "it_ran").exists()


def describe(file, plugins, **model):
    run = {"task": "captioning", "max_epoch": 1}
    model = {"arch": "evlgen_opt", "model_type": "shapes", **model}
    content = {"plugins": plugins, "model": model, "datasets": {"shapes_caption": {}}, "run": run}
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.parametrize("name", ["config.yaml", "project.yaml"])
def test_nothing_that_a_file_beside_weights_names_is_imported(given, monkeypatch, name):
    write(given, "model.safetensors", "")
    monkeypatch.syspath_prepend(given)  # as where the command is started there with `python -m`
    link = given.parent / "link"
    link.symlink_to(given)
    for plugin in ("./evil.py", str(given / "evil.py"), "evil_package.part", "evil", "../given/evil.py"):
        for folder in (given, link):
            with pytest.raises(EVLGenError, match="needs plugins: .*Nothing that comes with weights is run"):
                Config.load(describe(folder / name, [plugin]))
    file = describe(given / name, [], connector={"name": "evil_package.part.Part"})
    with pytest.raises(EVLGenError, match="needs plugins: evil_package.part"):
        Config.load(file)
    assert "evil_package" not in sys.modules

    file = describe(given / name, [], connector={"name": "evlgen.models.connectors.pool.Pool"})
    assert Config.load(file).plugins == ("evlgen.models.connectors.pool",)
    for options, plugins in ([[], ["./mine.py"]], [["plugins=[mine.py]"], []]):
        loaded = Config.load(describe(given / name, ["./mine.py"]), options, plugins).plugins
        assert loaded == (str(given.parent / "here" / "mine.py"),)  # not the one beside the file


def test_the_file_of_a_run_imports_what_the_run_did_but_nothing_from_its_folder(given, monkeypatch):
    own = str(given.parent / "here" / "mine.py")
    assert Config.load(describe(given / "config.yaml", [own])).plugins == (own,)
    monkeypatch.syspath_prepend(given)
    (given.parent / "here" / "link.py").symlink_to(given / "evil.py")
    beside = str(given.parent / "here" / "link.py")
    for plugin in ("./evil.py", str(given / "evil.py"), "evil_package.part", "evil", beside):
        with pytest.raises(EVLGenError, match="needs plugins"):
            Config.load(describe(given / "config.yaml", [own, plugin]))


def test_a_run_with_a_plugin_goes_on_from_its_own_folder(write_project, tmp_path, capsys):
    plugin = write(tmp_path, "shout.py", PLUGIN.format(name="shout"))
    processors = {"text_processor": {"train": {"name": "shout"}}}
    project = write_project(
        tmp_path,
        plugins=["./shout.py"],
        datasets={"shapes_caption": processors},
        run={"max_epoch": 1, "valid_splits": [], "test_splits": []},
    )
    assert cli.train(["--cfg-path", str(project)]) == 0
    run = (tmp_path / "output" / "latest").resolve()
    more = ["--options", "run.resume=auto", "run.max_epoch=2"]
    assert cli.train(["--cfg-path", str(run / "config.yaml"), *more]) == 0
    assert {path.name for path in (tmp_path / "output").iterdir()} == {run.name, "latest"}
    assert sorted(p.name for p in (run / "checkpoints").glob("step_*")) == ["step_00000006", "step_00000012"]
    for name in [name for name in sys.modules if name.startswith("evlgen_plugin_shout")]:
        del sys.modules[name]  # as in another process
    beside = ["--cfg-path", str(run / "checkpoints" / "latest" / "config.yaml"), *more]
    assert cli.train(beside) == 1
    assert f"needs plugins: {plugin}" in capsys.readouterr().err
    assert cli.train([*beside, "--plugins", str(plugin)]) == 0
