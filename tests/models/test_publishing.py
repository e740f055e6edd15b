"""Checkpoints on the hub: pushed, read back and refused, by the real client and a server on this machine."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml
from hub_server import TOKEN, Repository, hub_server
from huggingface_hub import ModelCard, close_session, constants
from PIL import Image

from evlgen import registry
from evlgen.assemble import run
from evlgen.cli import main
from evlgen.common.errors import CheckpointError, ConfigError, EVLGenError
from evlgen.config.config import Config, load_model_file
from evlgen.config.machine import MACHINE_FILE
from evlgen.models.language.chat import read_template
from evlgen.models.publishing.card import Sample, write_card
from evlgen.models.publishing.folder import copy_for_others
from evlgen.models.publishing.run_facts import RunFacts
from evlgen.weights import hub_checkpoints
from evlgen.weights.hub_checkpoints import fetch_checkpoint, push_folder

MODEL = registry.get_model_class("evlgen_opt")
BUNDLED = "evlgen/assets/shapes/connector"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with nothing in it, an empty cache, and nobody logged in."""
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub_checkpoints, "_WAITS", (0.01,) * 4)
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        close_session()
        yield server
        close_session()


@pytest.fixture
def ada(hub, monkeypatch):
    """Ada is logged in."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture(scope="module")
def trained(write_project, tmp_path_factory):
    """The folder of a run of two iterations."""
    folder = tmp_path_factory.mktemp("trained")
    run(Config.load(write_project(folder, run={"max_epoch": 1, "max_iters": None, "valid_freq": 1})))
    return (folder / "output" / "latest").resolve()


@pytest.fixture(scope="module")
def plain_files(trained, tmp_path_factory):
    """What a push of the run sends, without samples: names and contents."""
    folder = tmp_path_factory.mktemp("plain")
    copy_for_others(trained / "checkpoints" / "best", folder, with_parts=True)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def put(server, files, name="ada/model", **marks):
    """Puts files into a repository as somebody else has done."""
    repository = server.repositories[name] = Repository(private=marks.pop("private", False))
    repository.commit("main", files, "files")
    for key, value in marks.items():
        setattr(repository, key, value)
    return repository


def test_a_run_is_pushed_with_its_card_and_read_back(ada, trained, tmp_path, capsys):
    assert main(["push", str(trained), "ada/model", "--with-parts", "--licence", "mit", "--private"]) == 0
    repository = ada.repositories["ada/model"]
    assert repository.private and capsys.readouterr().out.startswith(f"{ada.address}/ada/model/commit/")
    files = repository.files()
    assert {"config.yaml", "model.safetensors", "checkpoint.sha256", "README.md"} < set(files)
    assert "training_state/optimizer.safetensors" not in files
    assert not any(
        str(trained.parent.parent.parent).encode() in files[n] for n in ("config.yaml", "README.md")
    )

    image = Image.effect_noise((64, 64), 90).convert("RGB")
    ours = MODEL.from_pretrained(trained / "checkpoints" / "best")
    theirs = MODEL.from_pretrained("ada/model")
    for key, value in ours.trained_state_dict().items():
        assert torch.equal(value, theirs.trained_state_dict()[key]), key
    assert ours.generate(image, max_length=5) == theirs.generate(image, max_length=5)

    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit" and card.data.library_name == "evlgen"
    scores = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert {"Bleu_4", "CIDEr", "eval_loss", "image_worth"} <= set(scores)
    for text in (
        "the Shapes world",
        "minutes of training",
        "`tomeformer`",
        "24 samples seen",
        "@inproceedings",
    ):
        assert text in card.text
    assert "--cfg-path model/config.yaml --options model.checkpoint=model run.test_splits=[val]" in card.text
    machine = json.loads((trained / MACHINE_FILE).read_text())
    rows = dict(re.findall(r"^\| (\S.*?) \| (.+) \|$", card.text.split("## Training")[1], re.M))
    assert rows["hardware"].startswith(machine["cpu"]) and f"{machine['cores']} cores" in rows["hardware"]
    limits = card.text.split("## Limits\n\n")[1].split("\n\n")[0].splitlines()
    assert len(limits) == 4 and f"is worth {scores['image_worth']:.2f} nats a token" in limits[-1]
    samples = re.findall(r"!\[\]\((samples/\d\.png)\) \| .* \| drawn by EVLGen", card.text)
    assert len(samples) == 6 and set(samples) <= set(files)


def test_a_revision_is_read_and_a_model_pushed_from_python(ada, plain_files, tmp_path):
    folder = tmp_path / "first"
    folder.mkdir()
    for name in ("config.yaml", "model.safetensors"):
        (folder / name).write_bytes(plain_files[name])
    (folder / "parts").mkdir()
    put(ada, plain_files)
    model = MODEL.from_pretrained("ada/model")
    before = model.connector.proj_out.bias.detach().clone()
    with torch.no_grad():
        model.connector.proj_out.bias += 1
    address = model.push_to_hub("ada/model", branch="more", with_parts=True, commit_message="a bias")
    assert ada.repositories["ada/model"].messages[-1] == "a bias" and "/commit/" in address

    def bias(**options):
        return MODEL.from_pretrained("ada/model", **options).connector.proj_out.bias

    assert torch.equal(bias(), before)
    assert torch.equal(bias(revision="more"), before + 1)
    assert torch.equal(bias(revision="more", local_files_only=True), before + 1)
    assert "/discussions/1" in model.push_to_hub("ada/model", create_pr=True, with_parts=True)
    wanted = fetch_checkpoint("hf://ada/model@more")
    model.load_checkpoint("hf://ada/model")
    assert torch.equal(model.connector.proj_out.bias, before) and (wanted / "config.yaml").is_file()


def test_the_caption_command_reads_the_hub(hub, plain_files, tmp_path, capsys):
    put(hub, plain_files)
    Image.effect_noise((64, 64), 90).save(tmp_path / "a.png")
    line = ["caption", str(tmp_path / "a.png"), "--max-length", "3", "--checkpoint"]
    assert main([*line, "ada/model"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'a.png'}: ")
    assert main([*line, "ada/other"]) == 1
    assert "ada/other cannot be fetched" in (error := capsys.readouterr().err)
    assert f"there is no checkpoint at {'ada/other'}" in error and "no such model, or it is private" in error


@pytest.mark.parametrize(
    ("marks", "token", "message"),
    [
        (dict(private=True), None, "no such model, or it is private and nobody is logged in.*hf auth login"),
        (dict(private=True), "hf_of_bob", "no such model, or .*(this token|nobody)"),
        (dict(gated=True), None, "it is gated, and nobody is logged in. Accept its conditions at http"),
        (dict(gated=True), "hf_of_bob", "it is gated, and the account of this token has not been granted"),
    ],
)
def test_a_repository_that_may_not_be_read_says_why(hub, plain_files, monkeypatch, marks, token, message):
    put(hub, plain_files, **marks)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(CheckpointError, match=message):
        MODEL.from_pretrained("ada/model")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (fetch_checkpoint("ada/model") / "model.safetensors").is_file()


def test_what_is_not_there_is_named(hub, plain_files):
    put(hub, plain_files)
    put(hub, {"model.safetensors": b""}, "ada/other")
    put(hub, {"config.json": b'{"model_type": "llava_next"}', "model.safetensors": b""}, "ada/theirs")
    with pytest.raises(CheckpointError, match="has no branch, tag or commit 'v9'.*/ada/model/tree/main"):
        MODEL.from_pretrained("ada/model", revision="v9")
    with pytest.raises(
        CheckpointError, match="ada/other has no config.yaml: it is not a checkpoint of evlgen"
    ):
        MODEL.from_pretrained("ada/other")
    with pytest.raises(CheckpointError, match="a llava_next model. Read from transformers' format are"):
        MODEL.from_pretrained("ada/theirs")
    with pytest.raises(CheckpointError, match="'ada/nothing' is no folder, no model type .*no such model"):
        MODEL.from_pretrained("ada/nothing")


def test_what_was_fetched_serves_without_a_connection(hub, plain_files, monkeypatch, caplog):
    put(hub, plain_files)
    folder = fetch_checkpoint("ada/model")
    hub.faults += [("GET /api/models", 503)] * 20
    assert fetch_checkpoint("ada/model") == folder and "Going on with what was fetched" in caplog.text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert fetch_checkpoint("ada/model") == folder
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        fetch_checkpoint("ada/unseen")


def test_downloads_go_on_after_faults(hub, plain_files):
    put(hub, plain_files)
    size = len(plain_files["model.safetensors"])
    hub.faults += [("GET /api/models/ada/model$", 503), ("GET .*model.safetensors", ("cut", size // 2))]
    folder = fetch_checkpoint("ada/model")
    assert (folder / "model.safetensors").read_bytes() == plain_files["model.safetensors"]


def test_pushes_go_on_after_faults(ada, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"weights" * 1000)
    ada.faults += [("POST /api/repos/create", 503), ("POST .*/commit/main", 500)]
    push_folder(tmp_path / "a", "ada/model", "files")
    assert ada.repositories["ada/model"].files()["model.safetensors"] == b"weights" * 1000
    assert sum(asked.startswith("PUT /lfs/") for asked in ada.requests) == 1  # not sent again


def test_a_push_without_rights_says_why(hub, monkeypatch, tmp_path):
    with pytest.raises(CheckpointError, match="needs a token with the right to write: log in with"):
        push_folder(tmp_path, "ada/model", "files")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(CheckpointError, match="bob/model cannot be pushed.*this token may not do that"):
        push_folder(tmp_path, "bob/model", "files")
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with pytest.raises(CheckpointError, match="cannot be pushed.*does not accept the token"):
        push_folder(tmp_path, "ada/model", "files")
    with pytest.raises(CheckpointError, match="'model' is not the name of a repository"):
        push_folder(tmp_path, "model", "files")


def test_plugins_of_a_repository_are_refused_unless_the_user_names_them(hub, plain_files, tmp_path, capsys):
    mark = tmp_path / "it_ran"
    code = f"open({str(mark)!r}, 'w').close()"
    config = yaml.safe_load(plain_files["config.yaml"])
    config = yaml.safe_dump({**config, "plugins": ["./hub_part.py"]}).encode()
    put(hub, {**plain_files, "config.yaml": config, "hub_part.py": code.encode()})
    with pytest.raises(EVLGenError, match=r"ada/model needs plugins: ./hub_part.py. Nothing .* is run"):
        MODEL.from_pretrained("ada/model")
    folder = fetch_checkpoint("ada/model")
    assert not (folder / "hub_part.py").exists()

    # also where all files were fetched, and the configuration is named
    whole = tmp_path / "whole"
    (whole / ".cache" / "huggingface").mkdir(parents=True)
    (whole / "config.yaml").write_bytes(config)
    (whole / "hub_part.py").write_text(code)
    for path in (folder, whole):
        with pytest.raises(EVLGenError, match="needs plugins: ./hub_part.py"):
            Config.load(path / "config.yaml")
    assert not mark.exists()

    own = tmp_path / "own"
    own.mkdir()
    (own / "hub_part.py").write_text(code)
    Image.effect_noise((64, 64), 90).save(tmp_path / "a.png")
    line = ["caption", str(tmp_path / "a.png"), "--max-length", "2", "--checkpoint", "ada/model"]
    assert main(line) == 1 and not mark.exists()
    assert main([*line, "--plugins", str(own / "hub_part.py")]) == 0 and mark.exists()


def test_parts_that_only_this_machine_has_are_named(trained, tmp_path, capsys):
    line = ["push", str(trained), "ada/model", "--dry-run", str(tmp_path / "dry")]
    assert main(line) == 1
    error = capsys.readouterr().err
    assert "model.vision.pretrained" in error and "model.language.name" in error and "--with-parts" in error
    line[-1] = str(tmp_path / "other")
    vision = "model.vision.pretrained=evlgen://assets/shapes/vision.safetensors"
    options = ["--options", "model.language.name=evlgen://assets/shapes/language", vision]
    with pytest.raises(ConfigError, match="not empty"):  # in a run's own folder
        main([*line[:-1], str(trained), *options, "--debug"])
    folder = tmp_path / "renamed"
    folder.mkdir()
    copy_for_others(trained / "checkpoints" / "best", folder, options[1:])
    assert (
        "assets/shapes/language" in (folder / "config.yaml").read_text() and not (folder / "parts").exists()
    )


def test_a_chat_template_of_ones_own_goes_along(trained, tmp_path):
    text = "Q: {{ messages[0].content }} A:"
    (tmp_path / "mine.jinja").write_text(text)
    (tmp_path / "model.yaml").write_text("model: {arch: evlgen_opt, language: {chat_template: mine.jinja}}")
    found = load_model_file(tmp_path / "model.yaml").language.chat_template
    assert found == str(tmp_path / "mine.jinja")
    options = [
        "model.vision.pretrained=evlgen://assets/shapes/vision.safetensors",
        "model.language.name=evlgen://assets/shapes/language",
        f"model.language.chat_template={found}",
    ]
    folder = tmp_path / "published"
    folder.mkdir()
    copy_for_others(trained / "checkpoints" / "best", folder, options)
    assert str(tmp_path) not in (folder / "config.yaml").read_text()
    assert read_template(load_model_file(folder / "config.yaml").language.chat_template) == text


def test_images_are_shown_only_with_their_licence(tmp_path, capsys):
    assert main(["push", BUNDLED, "ada/model", "--samples", str(tmp_path)]) == 1
    assert "--samples-licence" in capsys.readouterr().err


def test_text_of_users_is_text_in_the_card():
    config = {"model": {"arch": "evlgen_opt", "vision": {"name": "eva_clip_g"}}, "plugins": ["a`|b.py"]}
    samples = [Sample("0.png", "a | <script>x</script> [y](z)\n# head", "by `me`")]
    card = write_card("ada/model", config, samples=samples)
    row = next(line for line in card.splitlines() if "samples/0.png" in line)
    assert row.count("|") == 4 and "<script>" not in card and "[y](" not in card
    assert "\n# head" not in card


def test_the_card_says_on_what_and_how_long_it_was_trained_and_what_could_not_be_read():
    facts = RunFacts(
        iteration=150_000,
        samples=9_600_000,
        seconds=37.25 * 3600,
        evaluations=[
            {"split": "test", "samples": 5000, "CIDEr": 1.23456, "image_worth": 0.815, "skipped": 3}
        ],
        machine={"device": "NVIDIA H200", "processes": 8, "cpu": "AMD EPYC", "cores": 96, "torch": "2.14.1"},
    )
    card = write_card("ada/model", {"model": {"arch": "evlgen_opt"}, "run": {"init_lr": 1e-4}}, facts)
    for line in (
        "| iterations | 150,000, 9,600,000 samples seen |",
        "| hardware | 8 x NVIDIA H200 |",
        "| time | 37.2 hours of training, without evaluation |",
        "| versions | torch 2.14.1 |",
        "| CIDEr | image_worth |",
        "| 1.2346 | 0.8150 |",
        "- On the split above the right image is worth 0.81 nats a token to it.",
        "- 3 samples could not be read and were left out of the scores.",
    ):
        assert line in card.splitlines(), line
    (short,) = re.findall(
        "time [|] (.+) [|]", write_card("a/b", {"model": {"arch": "evlgen_opt"}}, RunFacts(seconds=90))
    )
    assert short == "1.5 minutes of training, without evaluation"
    unknown = write_card("ada/model", {"model": {"arch": "evlgen_opt"}})
    assert "hardware" not in unknown and "## Limits" in unknown  # nothing is made up
