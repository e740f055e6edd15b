"""Addresses in the config.yaml of somebody else's model folder: fetched only where the user agrees."""

from __future__ import annotations

import io
import logging
import pty
import shutil
import sys
from pathlib import Path

import pytest
from file_server import file_server
from omegaconf import OmegaConf
from PIL import Image

from evlgen import cli, load_model
from evlgen.common.errors import CheckpointError
from evlgen.common.registry import registry
from evlgen.config.consent import ask_on_terminal, check_addresses
from evlgen.datasets.shapes.world import draw, scene
from evlgen.files.io import resolve


@pytest.fixture
def server():
    with file_server() as server:
        yield server


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return load_model("evlgen_opt", "shapes").save_pretrained(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def strangers(tmp_path, monkeypatch, server, saved):
    """A folder of `save_pretrained` whose vision encoder is at an address that is up, and an image."""
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(saved, tmp_path / "given")
    weights = OmegaConf.load(folder / "config.yaml").model.vision.pretrained
    server.files["/vision.safetensors"] = Path(resolve(weights)).read_bytes()
    change(folder, "vision.pretrained", f"{server.address}/vision.safetensors")
    Image.fromarray(draw(scene("test", 3))).save(tmp_path / "image.png")
    return folder


def change(folder: Path, key: str, value: object) -> None:
    content = OmegaConf.load(folder / "config.yaml")
    OmegaConf.update(content, f"model.{key}", value)
    OmegaConf.save(content, folder / "config.yaml")


def captioned(folder: Path, *options: str) -> int:
    return cli.main(["caption", str(folder.parent / "image.png"), "--checkpoint", str(folder), *options])


def test_an_address_that_comes_with_weights_is_fetched_only_when_allowed(strangers, server, capsys):
    for command in ("caption", "visualize"):
        output = ["--output", str(strangers.parent / "x.png")] * (command == "visualize")
        argv = [command, str(strangers.parent / "image.png"), "--checkpoint", str(strangers), *output]
        assert cli.main(argv) == 1
        err = capsys.readouterr().err
        assert f"model.vision.pretrained: {server.address}/vision.safetensors" in err
        assert "--allow-downloads" in err and server.requests == []
    assert captioned(strangers, "--cfg-path", str(strangers / "config.yaml")) == 1
    assert server.requests == []
    assert captioned(strangers, "--allow-downloads") == 0
    assert len(server.requests) == 1
    assert captioned(strangers) == 0  # what was fetched with consent is here
    assert len(server.requests) == 1


def test_a_project_file_beside_weights_fetches_only_what_is_allowed(strangers, server, capsys, monkeypatch):
    content = OmegaConf.load(strangers / "config.yaml")
    content.datasets = {"coco_caption": {"build_info": {"images": {"storage": f"{server.address}/images"}}}}
    content.run = {"max_epoch": 1, "test_splits": ["test"], "output_dir": str(strangers.parent / "output")}
    OmegaConf.save(content, strangers / "config.yaml")
    named = ["--cfg-path", str(strangers / "config.yaml")]
    monkeypatch.setattr("evlgen.assemble.run_stages", lambda stages: None)
    to = ["--to", str(strangers.parent / "to")]
    budget = ["--budget", "1it", "--output", str(strangers.parent / "compared")]
    for command in (
        ["train"],
        ["evaluate"],
        ["data", "check", *to],
        ["data", "pack", "--split", "val", *to],
        ["sweep", "model.connector.r=0,2", *budget],
        ["compare", "--grid", "model.connector.r=0,2", *budget],
    ):
        assert cli.main([*command, *named]) == 1, command
        err = capsys.readouterr().err
        assert f"model.vision.pretrained: {server.address}/vision.safetensors" in err
        assert f"datasets.coco_caption.build_info.images.storage: {server.address}/images" in err
        assert "--allow-downloads" in err and "storage.googleapis.com" not in err  # built in
    own = ["model.vision.pretrained=false", "datasets.coco_caption.build_info.images.storage=images"]
    for more in (["--allow-downloads"], ["--options", *own]):
        assert cli.train([*named, *more]) == 0
    assert server.requests == []


@pytest.mark.parametrize(
    ("key", "scheme"), [("language.name", "s3"), ("connector.init", "http"), ("vision.pretrained", "HTTPS")]
)
def test_every_key_and_scheme_is_asked_about(strangers, server, key, scheme):
    address = f"{scheme}://127.0.0.1:{server.server_port}/x.gguf"
    change(strangers, "vision.pretrained", False)
    change(strangers, key, address)
    asked = []
    with pytest.raises(CheckpointError, match=f"model.{key}: {address}"):
        registry.get_model_class("evlgen_opt").from_pretrained(
            strangers, allow_downloads=lambda question: asked.append(question)
        )
    assert len(asked) == 1 and address in asked[0]
    assert server.requests == []


def test_texts_and_places_of_this_machine_are_no_addresses(tmp_path):
    section = {
        "prompt": "http://a b",
        "vision": {"pretrained": "evlgen://x"},
        "x": ["file:///y", "cache://z"],
    }
    check_addresses(section, tmp_path, False)


@pytest.mark.parametrize(("answer", "agreed"), [("y", True), ("n", False), ("", False)])
def test_somebody_at_a_terminal_is_asked(monkeypatch, tmp_path, answer, agreed):
    ours, theirs = pty.openpty()
    with open(theirs, "r+b", buffering=0) as terminal, open(ours, "r+b", buffering=0) as keyboard:
        for name in ("stdin", "stderr"):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(terminal, write_through=True))
        keyboard.write(f"{answer}\n".encode())
        section = {"vision": {"pretrained": "https://there/x\x1b[2J"}}
        if agreed:
            check_addresses(section, tmp_path / "config.yaml", ask_on_terminal)
        else:
            with pytest.raises(CheckpointError, match="--allow-downloads"):
                check_addresses(section, tmp_path / "config.yaml", ask_on_terminal)
        shown = b""
        while b"[y/N]" not in shown:  # what was typed comes back first
            shown += keyboard.read(4000)
        monkeypatch.undo()
    assert rb"vision.pretrained: https://there/x\x1b[2J" in shown and b"Fetch them? [y/N]" in shown


def test_where_there_is_no_terminal_nobody_is_asked(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert not ask_on_terminal("?") and capsys.readouterr().err == ""


def test_hub_ids_are_shown_before_they_are_fetched(strangers, caplog, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    change(strangers, "vision.pretrained", False)
    change(strangers, "language.name", "somebody/some-model")
    with caplog.at_level(logging.WARNING), pytest.raises(CheckpointError, match="somebody/some-model"):
        registry.get_model_class("evlgen_opt").from_pretrained(strangers)
    assert f"language model somebody/some-model, named in {strangers / 'config.yaml'}" in caplog.text


def test_a_project_file_beside_weights_has_no_stages(strangers, server, capsys):
    content = OmegaConf.load(strangers / "config.yaml")
    content.run = {"max_epoch": 1}
    content.datasets = {"shapes_caption": {}}
    content.stages = [{"model": {"vision": {"pretrained": f"{server.address}/other.safetensors"}}}]
    OmegaConf.save(content, strangers / "config.yaml")
    for command in (["train"], ["data", "check"]):
        assert cli.main([*command, "--cfg-path", str(strangers / "config.yaml"), "--allow-downloads"]) == 1
        assert "describes one run: no stages" in capsys.readouterr().err
    assert server.requests == []
