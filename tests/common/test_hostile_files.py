"""Files that would run code when they are loaded: every loader refuses them, and none runs them."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evlgen.common.errors import CheckpointError, ConfigError
from evlgen.common.registry import registry
from evlgen.config.config import Config, load_model_file
from evlgen.config.model_config import VisionConfig
from evlgen.files.io import PACKAGE_ROOT
from evlgen.models.connectors import ConnectorInputs, TomeFormer
from evlgen.models.language.opt import OPTLanguageModel
from evlgen.models.vision import build_vision_encoder
from evlgen.weights.weights import read_weights


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


def _zip(content: dict, path: Path) -> None:
    torch.save(content, path)


def _legacy(content: dict, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def _plain(content: dict, path: Path) -> None:
    path.write_bytes(pickle.dumps({"model": content["evil"]}))


LAYOUTS = {"zip": _zip, "legacy": _legacy, "plain pickle": _plain}


@pytest.fixture(params=LAYOUTS)
def hostile(request, tmp_path) -> Callable[[Path], Path]:
    """Writes a hostile file of each layout; after the test nothing of it may have run."""
    ran = tmp_path / "ran"

    def write(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        LAYOUTS[request.param]({"weight": torch.zeros(2), "evil": Evil(ran)}, path)
        return path

    yield write
    assert not ran.exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_files_of_this_test_run_code_where_nothing_hinders_them(tmp_path, layout) -> None:
    LAYOUTS[layout]({"weight": torch.zeros(2), "evil": Evil(tmp_path / "ran")}, tmp_path / "x.pth")
    if layout == "plain pickle":
        pickle.loads((tmp_path / "x.pth").read_bytes())
    else:
        torch.load(tmp_path / "x.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.bin", "x", "folder/pytorch_model.bin"])
def test_weights_of_any_name(tmp_path, hostile, name: str) -> None:
    path = hostile(tmp_path / name)
    with pytest.raises(CheckpointError, match="is refused"):
        read_weights(path if "/" not in name else path.parent)


def test_a_pickle_that_is_called_safetensors(tmp_path, hostile) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(hostile(tmp_path / "x.safetensors"))


def test_one_shard_of_several(tmp_path, hostile) -> None:
    _index(tmp_path, hostile(tmp_path / "pytorch_model-00001-of-00002.bin"))
    with pytest.raises(CheckpointError, match="is refused"):
        read_weights(tmp_path)


@pytest.fixture(scope="module")
def model(golden):
    return registry.get_model_class("evlgen_opt").from_config(golden / "evlgen_opt" / "model.yaml")


def test_a_checkpoint_loaded_over_a_model(tmp_path, hostile, model) -> None:
    with pytest.raises(CheckpointError, match="is refused"):
        model.load_checkpoint(hostile(tmp_path / "x.pth"))
    with pytest.raises(CheckpointError, match="is refused"):
        model.load_checkpoint(hostile(tmp_path / "folder" / "pytorch_model.bin").parent)


def test_a_model_folder_from_somebody_else(tmp_path, hostile, model) -> None:
    model.save_pretrained(tmp_path / "given")
    (tmp_path / "given" / "model.safetensors").unlink()
    hostile(tmp_path / "given" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is refused"):
        type(model).from_pretrained(tmp_path / "given")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_language_models_folder(tmp_path, hostile, golden, sharded: bool) -> None:
    folder = tmp_path / "language"
    shutil.copytree(golden / "evlgen_opt" / "language", folder)
    (folder / "model.safetensors").unlink()
    if sharded:
        _index(folder, hostile(folder / "pytorch_model-00001-of-00002.bin"))
    else:
        hostile(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.language\.name .* is refused"):
        OPTLanguageModel(str(folder))


def test_the_bert_that_a_connector_starts_from(tmp_path, hostile) -> None:
    hostile(tmp_path / "bert" / "pytorch_model.bin")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    (tmp_path / "bert" / "config.json").write_text(json.dumps({**sizes, "model_type": "bert"}))
    with pytest.raises(CheckpointError, match=r"model\.connector\.init .* is refused"):
        TomeFormer(ConnectorInputs(24, 16), num_layers=2, r=1, init=str(tmp_path / "bert"))


def test_a_vision_encoders_own_file(tmp_path, hostile) -> None:
    section = VisionConfig(name="test_vit", image_size=160, pretrained=str(hostile(tmp_path / "x.pth")))
    with pytest.raises(CheckpointError, match="is refused"):
        build_vision_encoder(section)


def test_weights_that_a_careless_timm_reads_by_itself(tmp_path, hostile, monkeypatch) -> None:
    import timm.models._builder as builder

    def careless(path, **_):
        return torch.load(path, weights_only=False)

    monkeypatch.setattr(builder, "load_state_dict", careless)
    monkeypatch.setattr(builder, "_resolve_pretrained_source", lambda _: ("file", str(tmp_path / "x.pth")))
    hostile(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="timm could not get the weights"):
        build_vision_encoder(VisionConfig(name="test_vit", image_size=160, pretrained=True))


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "training_state/optimizer.safetensors", "training_state/random.safetensors"],
)
def test_a_run_that_goes_on(tmp_path, hostile, model, name: str) -> None:
    from accelerate import Accelerator

    from evlgen.runners.checkpointer import Checkpointer
    from evlgen.runners.optimizer import build_optimizer
    from evlgen.runners.training_state import TrainingState

    optimizer = build_optimizer(model, 1e-4, 0.05, 0.999)
    with Checkpointer(tmp_path / "checkpoints", 1, {}, Accelerator(cpu=True)) as checkpointer:
        checkpointer.save(model, optimizer, TrainingState(iteration=3), {})
    folder = next((tmp_path / "checkpoints").glob("step_*"))
    assert checkpointer.resume(str(folder), model, optimizer, TrainingState()) == {}
    hostile(folder / name)
    hostile(folder / "pytorch_model.bin")  # which nothing reads where there are safetensors
    hostile(folder / "training_state" / "optimizer.bin")
    with pytest.raises(CheckpointError, match=r"run\.resume: .* cannot be (read|continued)"):
        checkpointer.resume(str(folder), model, optimizer, TrainingState())
    assert checkpointer.resume("auto", model, optimizer, TrainingState()) is None


def _index(folder: Path, hostile: Path) -> None:
    torch.save({"other": torch.zeros(2)}, folder / "pytorch_model-00002-of-00002.bin")
    names = {"weight": hostile.name, "other": "pytorch_model-00002-of-00002.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


# PyYAML's tags that make objects, call functions or import modules
TAGS = [
    "!!python/object/apply:os.mkdir ['{}']",
    "!!python/object/new:os.mkdir ['{}']",
    "!!python/object/apply:os.mkdir {{args: ['{}']}}",
    "!!python/object:evlgen.config.config.Config {{a: '{}'}}",
    "!!python/name:os.system '{}'",
    "!!python/module:this '{}'",
    "!!python/tuple ['{}']",
    "!<tag:yaml.org,2002:python/object/apply:os.mkdir> ['{}']",
    "!!set {{'{}'}}",
    "!mine '{}'",
]


@pytest.fixture(params=TAGS)
def tagged(request, tmp_path) -> str:
    """A value with a tag; after the test nothing of it may have run."""
    yield request.param.format(tmp_path / "ran")
    assert not (tmp_path / "ran").exists()


REFUSED = "is refused: configurations are plain YAML"


def test_a_project_file_with_a_tag(tmp_path, tagged) -> None:
    (tmp_path / "project.yaml").write_text(f"model: {{arch: evlgen_opt}}\nrun:\n  seed: {tagged}\n")
    with pytest.raises(ConfigError, match=f"line 3.*{REFUSED}"):
        Config.load(tmp_path / "project.yaml")


def test_an_option_with_a_tag(tagged) -> None:
    with pytest.raises(ConfigError, match=REFUSED):
        Config.load("projects/shapes/caption.yaml", [f"run.seed={tagged}"])


def test_a_models_own_configuration_with_a_tag(tmp_path, tagged, model) -> None:
    model.save_weights(tmp_path)
    with open(tmp_path / "config.yaml", "a") as file:
        file.write(f"  prompt: {tagged}\n")
    with pytest.raises(ConfigError, match=REFUSED):
        load_model_file(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=REFUSED):
        type(model).from_pretrained(tmp_path)


def test_a_datasets_defaults_with_a_tag(tmp_path, tagged, monkeypatch) -> None:
    (tmp_path / "defaults.yaml").write_text(f"datasets:\n  shapes_caption:\n    train_size: {tagged}\n")
    builder = registry.get_builder_class("shapes_caption")
    monkeypatch.setattr(builder, "DEFAULT_CONFIG", str(tmp_path / "defaults.yaml"))
    with pytest.raises(ConfigError, match=f"defaults.yaml.*{REFUSED}"):
        Config.load("projects/shapes/caption.yaml")


# module -> functions that build whatever a file asks for; and where they may stand all the same
LOADERS = {
    "torch": {"load"},
    "pickle": {"load", "loads", "Unpickler"},
    "yaml": {"load", "load_all", "full_load", "unsafe_load", "Loader", "FullLoader", "UnsafeLoader"},
    "joblib": {"load"},
    "shelve": {"open"},
    "marshal": {"load", "loads"},
    "OmegaConf": {"load"},
}
CHECKED = {
    ("weights/weights.py", "torch.load"),
    ("config/yaml_io.py", "yaml.load"),
    ("loaders/data.py", "pickle.loads"),  # of a batch that a process of the same loader made
    ("datasets/compact_records.py", "pickle.loads"),  # of bytes that the same object made, never of a file's
}


def test_no_other_place_of_the_package_loads_what_could_run_code() -> None:
    found = set()
    for path in PACKAGE_ROOT.rglob("*.py"):
        place = path.relative_to(PACKAGE_ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.attr in LOADERS.get(node.value.id, ()):
                    found.add((place, f"{node.value.id}.{node.attr}"))
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
                assert isinstance(node.value, ast.Constant) and node.value.value is False, place
    assert found == CHECKED
