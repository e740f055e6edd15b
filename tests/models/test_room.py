"""Texts that a language model has no positions for are refused before anything is built.

The tiny model has 128 positions, of which soft prompts take 8; OPT reads one token even of no prompt.
"""

from __future__ import annotations

import json

import pytest
from file_server import file_server
from huggingface_hub import close_session, constants
from omegaconf import OmegaConf

from evlgen.assemble import check_room, run
from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.config.config import Config

FITS = [
    ["run.max_len=119"],
    ["model.max_txt_len=120"],
    ["run.max_len=500", "run.valid_splits=[]"],  # nothing is written
    ["run.max_len=88", "run.task=vqa"],
    ["model.max_txt_len=121", "run.evaluate=true", "run.test_splits=[test]"],  # nothing is learned
    ["model.language.kind=causal", "model.max_txt_len=119"],
    ["run.task=captioning_scst", "run.valid_splits=[]", "run.max_len=119"],
    ["run.task=captioning_scst", "model.max_txt_len=121"],  # it learns what it wrote
]
TOO_LONG = [
    (["run.max_len=120"], 129, "run.max_len"),
    (["run.max_len=120", "run.valid_splits=[]", "run.test_splits=[test]"], 129, "run.max_len"),
    (["run.max_len=119", "run.prompt=a"], 129, "run.max_len"),
    (["run.max_len=119", "model.prompt=a"], 129, "run.max_len"),
    (["run.max_len=119", "model.connector.r=2"], 131, "run.max_len"),
    (["run.max_len=89", "run.task=vqa"], 129, "run.max_len"),  # questions of any length
    (["run.task=captioning_scst", "run.valid_splits=[]", "run.max_len=120"], 129, "run.max_len"),
    (["model.max_txt_len=121"], 129, "model.max_txt_len"),
    (["model.language.kind=causal", "model.max_output_txt_len=120"], 129, "model.max_txt_len"),
]


def check(path, options) -> None:
    cfg = Config.load(path, options)
    check_room(cfg, registry.get_task_class(cfg.run.task)(cfg.run))


@pytest.mark.parametrize("options", FITS, ids=" ".join)
def test_texts_up_to_the_last_position_are_accepted(tiny_project, options):
    check(tiny_project(), options)


@pytest.mark.parametrize(("options", "positions", "key"), TOO_LONG, ids=str)
def test_longer_ones_are_refused_with_the_key_to_lower(tiny_project, options, positions, key):
    message = rf"take {positions} positions, and the language model has 128\. Lower .*{key}"
    with pytest.raises(ConfigError, match=message):
        check(tiny_project(), options)


def test_frames_in_a_row_have_soft_prompts_of_their_own(tiny_project):
    """Of four frames of 17 tokens 59 are left, of eight 127."""
    path, name = tiny_project(), "shapes_video_caption"
    path.write_text(path.read_text().replace("shapes_caption", name))
    concat = ["model.arch=evlgen_video_opt", "model.vision.temporal={form: concat}", "model.checkpoint=null"]
    check(path, concat)
    with pytest.raises(ConfigError, match=r"take 159 positions, and the language model has 128\. Lower"):
        check(path, [*concat, f"datasets.{name}.vis_processor.train.n_frms=8"])
    mean = [concat[0], "model.vision.temporal={form: mean}", concat[2]]
    check(path, [*mean, f"datasets.{name}.vis_processor.train.n_frms=8"])


def test_a_run_is_refused_before_it_makes_its_folder_or_a_model(tiny_project, tmp_path):
    with pytest.raises(ConfigError, match=r"run\.max_len"):
        run(Config.load(tiny_project(), ["run.max_len=120"]))
    assert not (tmp_path / "output").exists()


def test_of_a_model_on_the_hub_only_the_settings_are_fetched_to_know_its_positions(
    tiny_project, golden, monkeypatch
):
    name = OmegaConf.load(golden / "evlgen_opt" / "model.yaml").model.language.name
    files = {file.name: file.read_bytes() for file in (golden / "evlgen_opt" / name).iterdir()}
    assert "model.safetensors" in files
    commit = 40 * "a"
    with file_server() as server:
        listed = [{"type": "file", "path": name, "size": len(files[name]), "oid": name} for name in files]
        info = {"id": "somebody/tiny", "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        for path in ("", "/revision/main"):
            server.files[f"/api/models/somebody/tiny{path}"] = json.dumps(info).encode()
        tree = f"/api/models/somebody/tiny/tree/{commit}?recursive=true&expand=false"
        server.files[tree] = json.dumps(listed).encode()
        server.headers = {"X-Repo-Commit": commit}
        for name, content in files.items():
            path = f"/somebody/tiny/resolve/{commit}/{name}"
            server.files[path], server.etags[path] = content, f'"{name}"'
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        close_session()
        with pytest.raises(ConfigError, match=r"take 129 positions.*run\.max_len"):
            check(tiny_project(), ["model.language.name=somebody/tiny", "run.max_len=120"])
        close_session()
        asked = [path.rpartition("/")[2] for path, _ in server.requests]
    assert "config.json" in asked and "model.safetensors" not in asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run.max_len=64"], r"first stage has 64\. Lower max_length \(run\.max_len\)"),
        (["model.max_txt_len=65"], "model.max_txt_len is 65, and text has 64 positions"),
    ],
)
def test_the_first_stage_has_its_own_positions(tiny_project, options, message):
    path = tiny_project()
    first_stage = ["model.arch=blip2", "model.model_type=shapes", "model.checkpoint=null"]
    path.write_text("".join(path.read_text().partition("datasets:")[1:]))
    with pytest.raises(ConfigError, match=message):
        check(path, [*first_stage, *options])
