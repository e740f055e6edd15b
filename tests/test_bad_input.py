"""What a user gets wrong is named at the command line: the thing, the place, the remedy; non-zero exit, no
traceback."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch

from evlgen import cli


@pytest.fixture
def refused(tiny_project, capsys):
    """Runs train.py's main on a changed tiny project and returns what it said on standard error."""

    def run(*options, **sections):
        path = tiny_project(**sections)
        code = cli.train(["--cfg-path", str(path), *(["--options", *options] if options else [])])
        message = capsys.readouterr().err.rpartition("error: ")[2]
        assert code == 1
        assert message and "Traceback" not in message
        return message

    return run


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("model.arch=evlgen_otp", ["model.arch", "evlgen_otp", "'evlgen_opt'", "--options"]),
        ("model.connector.name=tomformer", ["model.connector.name", "'tomeformer'"]),
        ("run.task=captionin", ["run.task", "'captioning'"]),
        ("run.lr_sched=cosine", ["run.lr_sched", "linear_warmup_cosine_lr"]),
        ("run.runner=runner_itr", ["run.runner", "'runner_iter'"]),
        ("model.conector.r=3", ["model.conector", "'connector'", "--options"]),
        ("run.batchsize_train=3", ["run.batchsize_train", "'batch_size_train'"]),
        ("model.connector.rr=3", ["model.connector.rr", "--options"]),
        ("model.vision.precision=fp9", ["model.vision.precision", "bf16"]),
        ("run.batch_size_train=many", ["run.batch_size_train", "many", "int"]),
        ("run.batch_size_train=0", ["run.batch_size_train", "at least 1"]),
        ("run.batch_size_eval=-4", ["run.batch_size_eval", "at least 1"]),
        ("model.connector.r=-2", ["model.connector.r", "at least 0"]),
        ("model.connector.r=[3,3,3,3]", ["r=[3, 3, 3, 3]", "3 layers"]),
        ("model.connector.r=[3,3]", ["inflection", "r=[3, 3]"]),
        ("model.vision.image_size=60", ["image_size 60", "patch size 14", "56"]),
        ("run.valid_splits=[vall]", ["run.valid_splits", "'vall'", "'val'"]),
        ("run.test_splits=[tset]", ["run.test_splits", "'tset'", "'test'"]),
        (
            "datasets.shapes_caption.vis_processor.eval.name=blip_image_evl",
            ["blip_image_evl", "'blip_image_eval'"],
        ),
        ("datasets.shapes_caption.train_sise=3", ["train_sise", "'train_size'"]),
        ("datasets.shape_caption.train_size=3", ["shape_caption", "'shapes_caption'"]),
        (
            "datasets.shapes_caption.vis_processor.eval.image_size=64",
            ["image_size", "64", "model.vision.image_size", "56"],
        ),
        ("run.train_dataset_ratios={coco: 2}", ["run.train_dataset_ratios", "coco"]),
        ("run.metrics=[bluee]", ["bluee", "'bleu'"]),
        ("model.language.name=/nowhere/opt", ["/nowhere/opt", "language model"]),
        ("model.vision.pretrained=/nowhere/eva.pth", ["/nowhere/eva.pth", "vision encoder"]),
        ("model.checkpoint=/nowhere/checkpoint.pth", ["/nowhere/checkpoint.pth"]),
    ],
)
def test_a_mistake_in_the_configuration(refused, option, named):
    message = refused(option)
    assert [n for n in named if n not in message] == []


def test_all_mistakes_are_named_at_once(refused):
    message = refused("run.batch_size_train=0", "run.max_epoc=3", "run.seed=abc")
    assert "run.batch_size_train" in message and "'max_epoch'" in message and "run.seed" in message


def test_the_file_a_mistake_came_from_is_named(refused):
    assert "project.yaml" in refused(run={"init_lrr": 1.0})


def test_a_project_file_that_is_not_there(capsys):
    assert cli.train(["--cfg-path", "projects/evlgen/coco_tf.yaml"]) == 1
    message = capsys.readouterr().err
    assert "projects/evlgen/coco_ft.yaml" in message


class _Evil:
    """Runs code when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_a_pickle_with_code_in_it_is_refused_and_not_run(refused, tmp_path):
    torch.save({"model": {"x": torch.zeros(1)}, "evil": _Evil(tmp_path / "ran")}, tmp_path / "evil.pth")
    with open(tmp_path / "evil.bin", "wb") as file:
        pickle.dump({"model": _Evil(tmp_path / "ran")}, file)
    for name in ("evil.pth", "evil.bin"):
        assert "is refused" in refused(f"model.checkpoint={tmp_path / name}")
        assert "is refused" in refused(f"model.vision.pretrained={tmp_path / name}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 10, 3000, 600000])
def test_a_truncated_checkpoint(refused, golden, tmp_path, keep):
    whole = (golden / "evlgen_opt" / "checkpoint_4.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[:keep])
    assert "cannot be read" in refused(f"model.checkpoint={tmp_path / 'cut.pth'}")


def test_a_truncated_safetensors_file(refused, golden, tmp_path):
    whole = (golden / "evlgen_opt" / "vision_original_names.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in refused(f"model.vision.pretrained={tmp_path / 'cut.safetensors'}")


def test_a_tokenizer_without_a_pad_token(refused, golden, tmp_path):
    folder = tmp_path / "language"
    shutil.copytree(golden / "evlgen_opt" / "language", folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = json.loads((folder / name).read_text())
        del content["pad_token"]
        (folder / name).write_text(json.dumps(content))
    message = refused(f"model.language.name={folder}")
    assert "no pad token" in message and "tokenizer_config.json" in message


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_language_model(refused, golden, tmp_path, damage):
    folder = tmp_path / "language"
    shutil.copytree(golden / "evlgen_opt" / "language", folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    if damage == "cut":
        weights.write_bytes(whole[:5000])
    message = refused(f"model.language.name={folder}")
    assert "model.language.name" in message and "cannot be read" in message


def test_a_connector_of_another_depth(refused):
    assert "another architecture" in refused("model.connector.num_layers=2")
    assert "another architecture" in refused("model.connector.num_layers=4")


def test_a_language_model_of_another_kind(refused, tmp_path):
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path / "gpt2")
    message = refused("model.language.kind=opt", f"model.language.name={tmp_path / 'gpt2'}")
    assert "is a gpt2 model, which model.language.kind 'opt' does not read" in message


def test_an_output_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused(f"run.output_dir={tmp_path / 'file' / 'inside'}")
    assert "run.output_dir" in message and "takes no files" in message


@pytest.fixture
def coco(tmp_path):
    """A data root in COCO's layout with one image; returns the options that use it."""
    from PIL import Image

    (tmp_path / "coco" / "images" / "val2014").mkdir(parents=True)
    (tmp_path / "coco" / "annotations").mkdir()
    Image.new("RGB", (80, 60), "red").save(
        tmp_path / "coco" / "images" / "val2014" / "COCO_val2014_000000000007.jpg"
    )
    record = {"image": "val2014/COCO_val2014_000000000007.jpg", "caption": "a red wall"}
    for split in ("train", "val", "test"):
        content = [record] if split == "train" else [{**record, "caption": ["a red wall", "a wall"]}]
        (tmp_path / "coco" / "annotations" / f"coco_karpathy_{split}.json").write_text(json.dumps(content))
    return tmp_path


COCO = {"datasets": {"coco_caption": {}}}


def _coco_refused(refused, root, monkeypatch):
    monkeypatch.setenv("EVLGEN_CACHE", str(root))
    return refused(**COCO)


def test_a_missing_image_folder(refused, coco, monkeypatch):
    shutil.rmtree(coco / "coco" / "images")
    message = _coco_refused(refused, coco, monkeypatch)
    assert "the image folder is not at" in message and "python -m evlgen download coco" in message


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('[{"image": "x.jpg",]', ["coco_karpathy_train.json", "line 1"]),
        ('[{"image": "x.jpg"}]', ["record 0", "caption"]),
        ('{"a": 1}', ["list"]),
        ("[]", ["no records"]),
    ],
)
def test_a_damaged_annotation(refused, coco, monkeypatch, content, named):
    (coco / "coco" / "annotations" / "coco_karpathy_train.json").write_text(content)
    message = _coco_refused(refused, coco, monkeypatch)
    assert [n for n in named if n not in message] == []


def test_too_many_broken_images_stop_the_run_and_are_listed(refused, coco, monkeypatch, tmp_path):
    (coco / "coco" / "images" / "val2014" / "COCO_val2014_000000000007.jpg").write_bytes(b"not an image")
    monkeypatch.setenv("EVLGEN_CACHE", str(coco))
    ratios = "run.train_dataset_ratios={coco_caption: 1, shapes_caption: 0.000001}"
    message = refused("run.max_epoch=1", "run.max_skipped_share=0.1", ratios, **COCO)
    assert "could not be read" in message and "run.max_skipped_share" in message
    listed = (tmp_path / "output" / "latest" / "skipped.jsonl").read_text()
    assert "COCO_val2014_000000000007.jpg" in listed


def test_a_checkpoint_to_resume_that_is_not_there(refused):
    assert "run.resume" in refused("run.resume=/nowhere/checkpoints/step_1")


def test_evaluating_without_weights_is_refused(refused):
    message = refused("run.evaluate=true", "run.test_splits=[test]", "model.checkpoint=null")
    assert "model.checkpoint" in message


def test_local_paths_are_missing_even_where_the_hub_answers(refused, monkeypatch):
    monkeypatch.setattr("evlgen.weights.hub.hub_reachable", lambda: True)
    assert "/nowhere/opt" in refused("model.language.name=/nowhere/opt")


def test_every_options_flag_counts(tiny_project, capsys):
    path = str(tiny_project())
    assert (
        cli.train(["--cfg-path", path, "--options", "run.batch_size_train=0", "--options", "run.seed=1"]) == 1
    )
    assert "run.batch_size_train" in capsys.readouterr().err


def test_a_traceback_only_with_debug(tiny_project):
    from evlgen.common.errors import ConfigError

    path = tiny_project()
    with pytest.raises(ConfigError):
        cli.train(["--cfg-path", str(path), "--debug", "--options", "run.batch_size_train=0"])
