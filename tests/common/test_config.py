"""Configuration: layers, provenance, checks, files."""

from __future__ import annotations

import dataclasses
import logging
import re
import subprocess
import sys

import pytest
import yaml

from evlgen.assemble import check_nothing_missing, make_builders
from evlgen.common.errors import ConfigError, DataError, RegistryError
from evlgen.config.build_info import Annotation, Source
from evlgen.config.config import Config, find_config, load_model_config, load_model_file
from evlgen.config.layers import Layer, Layers
from evlgen.config.run_config import RunConfig
from evlgen.files.io import PACKAGE_ROOT

PROJECT = """
model:
  arch: evlgen_opt
  model_type: pretrain_opt2.7b
datasets:
  coco_caption:
run:
  max_epoch: 5
"""


@pytest.fixture
def project(tmp_path):
    """Writes a project file: ``project()`` the plain one, ``project(text)`` another."""

    def write(text: str = PROJECT):
        path = tmp_path / "project.yaml"
        path.write_text(text)
        return path

    return write


def problems_of(path, *options: str) -> str:
    with pytest.raises(ConfigError) as error:
        Config.load(path, options)
    return str(error.value)


# ---- layers


def test_layers_win_in_order(project):
    text = PROJECT.replace("pretrain_opt2.7b", "pretrain_opt2.7b\n  max_txt_len: 20\n  connector: {r: 12}")
    config = Config.load(project(text), ["model.connector.r=[8, 2]", "run.batch_size_train=4"])
    assert config.model.connector["num_layers"] == 12  # the type's YAML
    assert config.model.max_txt_len == 20  # the project file
    assert config.model_plain()["connector"]["r"] == [8, 2]  # the options
    assert config.run.batch_size_train == 4
    assert config.datasets.coco_caption.build_info.images.storage == "coco/images"  # the dataset's YAML
    assert config.env.cache_root is None  # default.yaml


def test_every_key_knows_the_file_it_came_from(project):
    path = project(PROJECT + "  init_lr: 1e-5\n")
    config = Config.load(path, ["run.seed=7"])
    assert config.source("run.init_lr") == str(path)
    assert config.source("run.seed") == "--options"
    assert config.source("model.connector.r").endswith(
        "evlgen/configs/models/evlgen_opt/pretrain_opt2.7b.yaml"
    )
    assert config.source("datasets.coco_caption.build_info.images.storage").endswith("coco_caption.yaml")
    assert config.source("run.max_grad_norm") == str(path)  # its section is there
    assert config.source("env.cache_root").endswith("evlgen/configs/default.yaml")


def test_the_type_named_in_the_options_replaces_the_layer_of_the_type_in_the_file(project):
    text = PROJECT.replace("pretrain_opt2.7b", "pretrain_opt2.7b\n  max_txt_len: 20")
    config = Config.load(project(text), ["model.model_type=caption_coco_opt2.7b"])
    assert config.model.prompt == "a photo of"  # of the other type
    assert config.model.max_txt_len == 20  # the project file still wins over the type
    assert config.source("model.prompt").endswith("caption_coco_opt2.7b.yaml")


def test_keys_of_another_connector_are_dropped(project, tmp_path):
    write_plugin(tmp_path)
    text = PROJECT.replace(
        "pretrain_opt2.7b", "pretrain_opt2.7b\n  connector: {name: config_test_linear, width: 3}"
    )
    config = Config.load(project(text), plugins=["./config_test_plugin.py"])
    assert config.model_plain()["connector"] == {"name": "config_test_linear", "width": 3}


def test_a_connector_named_in_the_options_drops_the_project_files_keys_and_says_so(project, tmp_path, caplog):
    write_plugin(tmp_path)
    text = PROJECT.replace("pretrain_opt2.7b", "pretrain_opt2.7b\n  connector: {r: 12}")
    with caplog.at_level(logging.INFO):
        config = Config.load(
            project(text), ["model.connector.name=config_test_linear"], plugins=["./config_test_plugin.py"]
        )
    assert config.model_plain()["connector"] == {"name": "config_test_linear"}
    assert (
        "model.connector is 'config_test_linear' (--options): left out what was set for 'tomeformer'"
        in caplog.text
    )


def test_another_connector_drops_the_checkpoint_below_and_not_its_own(project):
    text = PROJECT.replace("pretrain_opt2.7b", "pretrain_opt2.7b\n  checkpoint: old.pth")
    named = "model.connector.name=mlp"
    assert Config.load(project(text), [named]).model.checkpoint is None
    assert Config.load(project(text), [named, "model.checkpoint=new.pth"]).model.checkpoint == "new.pth"
    assert Config.load(project(text), ["model.connector.r=3"]).model.checkpoint == "old.pth"


@pytest.mark.parametrize(
    ("option", "kept"),
    [
        ("model.language.name=Qwen/Qwen3-0.6B", False),
        ("model.vision.name=vit_base_patch16_siglip_224", False),
        ("model.language.name=mirror/opt-2.7b", True),
        ("model.language.name=/models/opt", True),  # a folder may hold the same model
    ],
)
def test_another_frozen_part_drops_the_checkpoint_below_too(project, option, kept):
    text = PROJECT.replace("pretrain_opt2.7b", "pretrain_opt2.7b\n  checkpoint: old.pth")
    assert (Config.load(project(text), [option]).model.checkpoint is not None) is kept


def test_the_same_part_keeps_the_defaults(project):
    text = PROJECT.replace(
        "pretrain_opt2.7b", "pretrain_opt2.7b\n  connector: {name: tomeformer, num_layers: 6}"
    )
    assert Config.load(project(text)).model_plain()["connector"] == {
        "name": "tomeformer",
        "num_layers": 6,
        "r": 19,
        "init": "bert-base-uncased",
    }


def test_another_vision_encoder_drops_pretrained_and_kwargs_only(project):
    config = Config.load(project(), ["model.vision.name=vit_base_patch16_224"])
    assert config.model.vision.pretrained is True  # the default
    assert config.model.vision.image_size == 224


def test_kwargs_of_the_same_vision_encoder_are_merged_deeply():
    base = {"vision": {"name": "x", "kwargs": {"a": 1, "b": {"c": 2}}}, "language": {"name": "y"}}
    over = {"vision": {"kwargs": {"b": {"d": 3}}}}
    merged = Layers([Layer("low", {"model": base}), Layer("high", {"model": over})]).merged()
    assert merged["model"]["vision"]["kwargs"] == {"a": 1, "b": {"c": 2, "d": 3}}


def test_another_processor_drops_the_keys_of_the_first(project):
    options = ["datasets.coco_caption.text_processor.eval={name: blip_question, max_words: 5}"]
    config = Config.load(project(), options)
    assert config.datasets_plain()["coco_caption"]["text_processor"]["eval"] == {
        "name": "blip_question",
        "max_words": 5,
    }
    options = ["datasets.coco_caption.text_processor.train.prompt=a photo of "]
    config = Config.load(
        project(), [*options, "datasets.coco_caption.text_processor.train.name=blip_caption"]
    )
    assert config.datasets.coco_caption.text_processor.train.prompt == "a photo of"
    higher = "datasets:\n  coco_caption:\n    text_processor: {train: {name: blip_caption, prompt: a}}\n"
    config = Config.load(
        project(PROJECT.replace("datasets:\n  coco_caption:\n", higher)),
        ["datasets.coco_caption.text_processor.train.name=blip_question"],
    )
    assert config.datasets_plain()["coco_caption"]["text_processor"]["train"] == {"name": "blip_question"}


def test_interpolations_reach_other_sections(project):
    config = Config.load(project(PROJECT + "  batch_size_train: ${model.vision.image_size}\n"))
    assert config.run.batch_size_train == 224


def test_an_interpolation_to_nowhere_names_the_key(project):
    text = problems_of(project(PROJECT + "  seed: ${run.sed}\n"))
    assert "run.seed" in text and "run.sed" in text and "project.yaml" in text


def test_a_section_that_names_all_its_parts_stands_alone(golden):
    model = load_model_file(golden / "evlgen_opt" / "model.yaml")
    assert "model_type" not in model
    assert model.connector.num_layers == 3 and "positions" not in model.connector


# ---- paths


def test_relative_paths_are_looked_up_beside_the_yaml(golden):
    folder = golden / "evlgen_opt"
    model = load_model_file(folder / "model.yaml")
    assert model.checkpoint == str(folder / "checkpoint_4.pth")
    assert model.vision.pretrained == str(folder / "vision_original_names.safetensors")
    assert model.language.name == str(folder / "language")
    assert model.vision.name == "eva_clip_g"


def test_what_is_not_beside_the_yaml_stays_as_it_is(project):
    text = PROJECT.replace(
        "pretrain_opt2.7b", "pretrain_opt2.7b\n  checkpoint: evlgen://assets/x\n  language: {name: a/b}"
    )
    config = Config.load(project(text))
    assert (config.model.checkpoint, config.model.language.name) == ("evlgen://assets/x", "a/b")


def test_dataset_paths_with_a_dot_are_beside_the_yaml_and_others_are_not(project, tmp_path):
    (tmp_path / "pictures").mkdir()
    storage = "datasets.coco_caption.build_info.images.storage"
    text = PROJECT.replace("coco_caption:", "coco_caption: {build_info: {images: {storage: PLACE}}}")
    config = Config.load(project(text.replace("PLACE", "./pictures")))
    assert config.datasets.coco_caption.build_info.images.storage == str(tmp_path / "pictures")
    config = Config.load(project(text.replace("PLACE", "pictures")))
    assert config.datasets.coco_caption.build_info.images.storage == "pictures"
    assert config.source(storage).endswith("project.yaml")


def test_a_packaged_file_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/default.yaml") == PACKAGE_ROOT / "configs" / "default.yaml"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "default.yaml").write_text("{}")
    assert find_config("configs/default.yaml") == tmp_path / "configs" / "default.yaml"


def test_a_missing_project_names_both_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        find_config("projects/nothing.yaml")
    assert str(tmp_path / "projects" / "nothing.yaml") in str(error.value)
    assert str(PACKAGE_ROOT / "projects" / "nothing.yaml") in str(error.value)


# ---- YAML


def test_a_tag_that_would_run_code_is_refused_and_not_run(project, tmp_path):
    proof = tmp_path / "proof"
    text = problems_of(project(f"run:\n  seed: !!python/object/apply:os.mkdir ['{proof}']\n"))
    assert "project.yaml, line 2, column 9" in text and "is refused: configurations are plain YAML" in text
    assert not proof.exists()


def test_a_syntax_error_names_file_line_and_column(project):
    assert "project.yaml, line 3, column 1: not plain YAML" in problems_of(
        project("run:\n  train_splits: [a\n}\n")
    )


def test_a_key_given_twice_is_named(project):
    assert "project.yaml, line 3, column 3: not plain YAML: the key 'seed' is given twice" in problems_of(
        project("run:\n  seed: 1\n  seed: 2\n")
    )


def test_a_file_that_is_no_mapping_is_named(project):
    assert "project.yaml holds no mapping" in problems_of(project("- a\n- b\n"))


def test_a_file_that_is_no_text_is_named(project):
    path = project()
    path.write_bytes(b"\xff\xfe\x00model")
    assert "project.yaml cannot be read" in problems_of(path)


def test_numbers_with_exponents_are_numbers(project):
    config = Config.load(
        project(PROJECT + "  init_lr: 1e-3\n"), ["run.min_lr=1e-6", "model.vision.kwargs.rate=1e-2"]
    )
    assert (config.run.init_lr, config.run.min_lr, config.model.vision.kwargs["rate"]) == (1e-3, 1e-6, 1e-2)


# ---- options


@pytest.mark.parametrize("option", ["run.seed", "=3", "run..seed=3", ""])
def test_a_malformed_option_gets_the_form(project, option):
    assert "write key=value, such as run.batch_size_train=32" in problems_of(project(), option)


def test_an_option_value_that_is_no_yaml_gets_the_remedy(project):
    text = problems_of(project(), "model.prompt=Question: {} Short answer:")
    assert "--options model.prompt=Question" in text and "quote it: 'model.prompt=\"...\"'" in text
    config = Config.load(project(), ['model.prompt="Question: {} Short answer:"'])
    assert config.model.prompt == "Question: {} Short answer:"


def test_an_option_can_be_empty_text_or_null(project):
    config = Config.load(project(), ["model.prompt=", "model.checkpoint=null", "run.prompt=null"])
    assert (config.model.prompt, config.model.checkpoint, config.run.prompt) == ("", None, None)


def test_a_later_option_wins(project):
    assert Config.load(project(), ["run.seed=1", "run.seed=2"]).run.seed == 2


# ---- checks


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("run.max_epohc=3", "run.max_epohc (--options): there is no such key. Did you mean 'max_epoch'"),
        ("modle.arch=x", "modle (--options): there is no such key. Did you mean 'model'?"),
        ("run.batch_size_train=0", "run.batch_size_train (--options): must be at least 1, not 0."),
        ("run.batch_size_eval=-4", "run.batch_size_eval (--options): must be at least 1, not -4."),
        ("run.num_workers=two", "run.num_workers (--options): must be int, not 'two'."),
        (
            "run.precision=fp8",
            "run.precision (--options): must be 'auto', 'fp32', 'bf16' or 'fp16', not 'fp8'.",
        ),
        (
            "run.task=captionin",
            "run.task (--options): no task is registered as 'captionin'. Did you mean 'captioning'",
        ),
        ("run.lr_sched=cosine", "run.lr_sched (--options): no lr_scheduler is registered as 'cosine'"),
        (
            "run.runner=runner_bas",
            "run.runner (--options): no runner is registered as 'runner_bas'. Did you mean",
        ),
        (
            "run.metrics=[cidre]",
            "run.metrics[0] (--options): no metric is registered as 'cidre'. Did you mean 'cider'?",
        ),
        ("run=3", "run (--options): must be a mapping of keys to values, not 3."),
        ("plugins=3", "plugins (--options): must be list of str, not 3."),
        ("env.cache=/tmp", "env.cache (--options): there is no such key. Did you mean 'cache_root'?"),
        ("run.amp=5", "run.amp (--options): must be bool, not 5."),
        (
            "model.arch=evlgen_opd",
            "model.arch (--options): no model is registered as 'evlgen_opd'. Did you mean",
        ),
        (
            "model.model_type=shape",
            "model.model_type (--options): evlgen_opt has no type 'shape'. Did you mean 'shapes'?",
        ),
        ("model.conector=1", "model.conector (--options): there is no such key. Did you mean 'connector'?"),
        (
            "model.connector.name=tome",
            "model.connector.name (--options): no connector is registered as 'tome'.",
        ),
        ("model.connector.rr=3", "model.connector.rr (--options): there is no such key. Did you mean 'r'?"),
        ("model.connector.r=-1", "model.connector.r (--options): must be at least 0, not -1."),
        ("model.connector.vision_dim=3", "model.connector.vision_dim (--options): there is no such key."),
        ("model.vision.image_size=big", "model.vision.image_size (--options): must be int, not 'big'."),
        (
            "model.vision.freez=true",
            "model.vision.freez (--options): there is no such key. Did you mean 'freeze'?",
        ),
        ("model.language=opt", "model.language (--options): must be a mapping"),
        (
            "datasets.coco_captions={}",
            "datasets.coco_captions (--options): no dataset is registered under this name. Did",
        ),
        (
            "datasets.coco_caption.build_inf=3",
            "datasets.coco_caption.build_inf (--options): there is no such key. Did",
        ),
        (
            "datasets.coco_caption.vis_processor.trian={name: blip_image_eval}",
            "datasets.coco_caption.vis_processor.trian (--options): there is no such key. Did you mean",
        ),
        (
            "datasets.coco_caption.vis_processor.eval.image_sise=3",
            "vis_processor.eval.image_sise (--options): there is no such key. Did you mean 'image_size'",
        ),
        (
            "datasets.coco_caption.vis_processor.eval.name=blip_image_evl",
            "vis_processor.eval.name (--options): no processor is registered as 'blip_image_evl'.",
        ),
        (
            "datasets.coco_caption.build_info.images.storage=3",
            "build_info.images.storage (--options): must be str, not 3; put it in quotes",
        ),
    ],
)
def test_each_wrong_setting_is_named_with_place_and_remedy(project, option, expected):
    assert expected in problems_of(project(), option)


def test_a_wrong_setting_names_its_file(project):
    path = project(PROJECT.replace("pretrain_opt2.7b", "pretrain_opt2.7b\n  connector: {r: -3}"))
    assert f"model.connector.r ({path}): must be at least 0, not -3." in problems_of(path)


def test_all_problems_of_all_sections_are_shown_at_once(project):
    text = problems_of(
        project(),
        "model.connector.r=-1",
        "datasets.coco_caption.data_type=video",
        "run.task=x",
        "model.vision.nam=a",
    )
    assert text.startswith("4 problems in the configuration:")
    assert all(key in text for key in ("model.connector.r", "data_type", "run.task", "model.vision.nam"))


def test_problems_of_the_run_section_hide_no_others(project):
    options = (
        "run.max_epohc=3",
        "run.batch_size_train=0",
        "model.connector.nme=mlp",
        "datasets.coco_caption.dat=x",
    )
    text = problems_of(project(), *options, "env.cache=x")
    assert text.startswith("5 problems in the configuration:")
    assert all(option.partition("=")[0] in text for option in options)
    without_arch = project("datasets: {coco_captoin: }\nrun: {max_epohc: 3}\n")
    text = problems_of(without_arch)
    assert text.count("model.arch: is required") == 1 and "coco_captoin" in text and "max_epohc" in text


def test_nothing_is_said_of_what_a_misspelt_part_replaces(project, caplog):
    caplog.set_level(logging.INFO)
    assert "no connector is registered" in problems_of(project(), "model.connector.name=tomefromer")
    assert "left out" not in caplog.text


@pytest.mark.parametrize(
    ("model", "run", "reason"),
    [
        (
            "evlgen_opt",
            "{task: dialogue, k_tests: 3}",
            "run.task (PATH): no task is registered as 'dialogue'",
        ),
        ("evlgen_opt", "{task: dialogue, max_epohc: 3}", "run.task (PATH): no task is registered"),
        ("albef", "{k_tests: 3}", "model.arch (PATH): no model is registered as 'albef'"),
        ("evlgen_opt", "{task: captioning, k_tests: 3}", "run.k_tests (PATH): there is no such key"),
    ],
)
def test_a_part_that_is_not_here_is_named_before_keys_that_may_be_its_own(project, model, run, reason):
    path = project(f"model: {{arch: {model}}}\ndatasets: {{coco_caption: }}\nrun: {run}\n")
    assert problems_of(path).startswith(reason.replace("PATH", str(path)))


def test_an_architecture_is_required(project):
    assert "model.arch: is required" in problems_of(project("run: {max_epoch: 1}\n"))


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("{max_epoch: 1, max_iters: 5}", "run.max_iters: max_epoch is set too"),
        ("{seed: 1}", "run.max_epoch: how long to train?"),
        ("{max_epoch: 1, runner: runner_iter}", "run.runner: runner_iter counts iterations"),
        ("{max_iters: 1, runner: runner_base}", "run.runner: runner_base counts epochs"),
        ("{max_epoch: 1, iters_per_inner_epoch: 5}", "run.iters_per_inner_epoch: it divides max_iters"),
        ("{evaluate: true}", "run.test_splits: evaluate: true needs at least one split"),
        ("{max_epoch: 1, train_splits: []}", "run.train_splits: training needs at least one split"),
        ("{max_epoch: 1, seed: -1}", "run.seed: must be at least 0, not -1"),
        ("{max_epoch: 1, seed: 4294967296}", "run.seed: must be at most 4294967295, not 4294967296"),
        ("{max_epoch: 1, beta2: 1}", "run.beta2: must be less than 1, not 1.0"),
        ("{max_epoch: 1, min_len: 40}", "run.min_len: is 40, more than max_len, 30"),
        ("{max_epoch: 1, min_lr: 1.0}", "run.min_lr: is 1, more than init_lr, 0.0001"),
        ("{max_epoch: 1, lr_sched: linear_warmup_step_lr}", "run.lr_decay_rate: linear_warmup_step_lr needs"),
        ("{max_epoch: 1, train_dataset_ratios: {coco_captoin: 1}}", "Did you mean 'coco_caption'?"),
    ],
)
def test_settings_that_contradict_each_other_are_named(project, run, expected):
    path = project(PROJECT.replace("run:\n  max_epoch: 5\n", f"run: {run}\n"))
    assert expected in problems_of(path).replace(f" ({path})", "")


def test_the_runner_follows_from_the_length(project):
    assert Config.load(project()).run.runner == "runner_base"
    assert Config.load(project(), ["run.max_epoch=null", "run.max_iters=10"]).run.runner == "runner_iter"


def test_a_file_without_a_run_section_is_a_valid_model(project):
    assert (
        Config.load(project("model: {arch: evlgen_opt, model_type: pretrain_opt2.7b}\n")).run == RunConfig()
    )


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("amp: true", "auto"),
        ("amp: false", "fp32"),
        ("amp: true\n  precision: fp16", "fp16"),
        ("seed: 1", "auto"),
    ],
)
def test_amp_of_lavis_becomes_precision(project, text, precision):
    assert Config.load(project(PROJECT + f"  {text}\n")).run.precision == precision


def test_lavis_keys_without_effect_give_one_warning(project, caplog):
    lavis = (
        "  device: cuda\n  world_size: 1\n  dist_url: env://\n  distributed: true\n  resume_ckpt_path: a/b\n"
    )
    config = Config.load(project(PROJECT + lavis))
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert all(
        key in warnings[0] for key in ("run.device", "run.world_size", "run.dist_url", "run.distributed")
    )
    assert config.run.resume == "a/b"


def test_nothing_changes_a_configuration(project):
    config = Config.load(project(), ["run.lr_scale={connector: 2}"])
    for section, key in ((config, "run"), (config.run, "seed"), (config.env, "cache_root")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, key, None)
    for section in (config.model, config.model.vision):
        with pytest.raises(dataclasses.FrozenInstanceError):
            section.checkpoint = "x"
    assert config.to_dict()["run"]["lr_scale"] == {"connector": 2.0}
    assert type(config.to_dict()["model"]["connector"]) is dict, "as it is written"
    coco = config.datasets.coco_caption
    for section in (coco, coco.build_info, coco.build_info.images):
        with pytest.raises(dataclasses.FrozenInstanceError):
            section.storage = "elsewhere"
    of_model = config.model.connector, config.model.vision.kwargs, config.run.lr_scale
    of_coco = coco.build_info.annotations, coco.vis_processor, coco.vis_processor.train
    for mapping in (*of_model, config.datasets, *of_coco):
        with pytest.raises(TypeError, match="does not change"):
            mapping["name"] = "other"


# ---- saving, models


def test_a_saved_configuration_is_read_back_as_the_same(project, tmp_path):
    write_plugin(tmp_path)
    options = ["model.prompt='1e-4'", "run.seed=7", "model.connector.r=[3, 0.5]", "run.output_dir=2024-05-01"]
    config = Config.load(project(), options, plugins=["./config_test_plugin.py"])
    elsewhere = tmp_path / "run" / "config.yaml"
    config.save(elsewhere)
    again = Config.load(elsewhere)
    assert again.to_dict() == config.to_dict()
    assert again.run == config.run
    assert again.model.prompt == "1e-4" and again.run.output_dir == "2024-05-01"
    assert again.plugins == (str((tmp_path / "config_test_plugin.py").resolve()),)
    assert yaml.safe_load(elsewhere.read_text())["run"]["seed"] == 7


def test_a_types_model_section_takes_overrides():
    model = load_model_config("evlgen_opt", "pretrain_opt2.7b", {"connector": {"r": 4}, "prompt": "a"})
    assert (model.arch, model.model_type) == ("evlgen_opt", "pretrain_opt2.7b")
    assert (model.connector.r, model.connector.num_layers, model.prompt) == (4, 12, "a")


def test_wrong_names_and_overrides_of_a_type_are_named():
    with pytest.raises(RegistryError, match="no model is registered as 'evlgen_opd'"):
        load_model_config("evlgen_opd")
    with pytest.raises(
        ConfigError, match="evlgen_opt has no type 'pretrain_opt2.7'. Did you mean 'pretrain_opt2.7b'"
    ):
        load_model_config("evlgen_opt", "pretrain_opt2.7")
    with pytest.raises(ConfigError, match=r"model\.connector\.rr \(overrides\): there is no such key"):
        load_model_config("evlgen_opt", "pretrain_opt2.7b", {"connector": {"rr": 4}})


def test_a_file_without_a_model_section_is_named(project):
    with pytest.raises(ConfigError, match="has no `model:` section"):
        load_model_file(project("run: {max_epoch: 1}\n"))


# ---- plugins and cost


def write_plugin(folder) -> None:
    """A connector of its own, as a user's file has it."""
    (folder / "config_test_plugin.py").write_text(
        "from torch import nn\n"
        "from evlgen.common.registry import registry\n"
        "from evlgen.config.schema import PositiveInt\n"
        "from evlgen.models.connectors.base import Connector\n\n\n"
        "class Linear(Connector):\n"
        "    def __init__(self, vision_dim: int, width: PositiveInt = 8, **framework) -> None:\n"
        "        super().__init__()\n\n\n"
        "if 'config_test_linear' not in registry.list_connectors():\n"
        "    registry.register_connector('config_test_linear')(Linear)\n"
    )


def test_plugins_of_the_file_are_loaded_from_beside_it(project, tmp_path):
    write_plugin(tmp_path)
    text = PROJECT.replace(
        "pretrain_opt2.7b", "pretrain_opt2.7b\n  connector: {name: config_test_linear, width: 0}"
    )
    path = project(text + "plugins: [./config_test_plugin.py]\n")
    assert f"model.connector.width ({path}): must be at least 1, not 0." in problems_of(path)


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE_ROOT.parent
    )
    return done.stdout.strip()


def test_structure_is_checked_before_torch_is_imported(project):
    code = (
        "import sys\n"
        "from evlgen.config.config import Config\n"
        "from evlgen.common.errors import ConfigError\n"
        f"try: Config.load({str(project())!r}, ['modle.arch=x'])\n"
        "except ConfigError as error: print('modle' in str(error), 'torch' in sys.modules)\n"
    )
    assert run_python(code) == "True False"


def test_importing_the_configuration_imports_nothing_heavy():
    heavy = ("torch", "transformers", "timm", "accelerate", "numpy", "PIL", "pyarrow", "decord", "iopath")
    code = f"import sys, evlgen.config.config; print([m for m in {heavy} if m in sys.modules])"
    assert run_python(code) == "[]"


# ---- values of another kind than their key's


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: {model_type: [shapes]}", "model.model_type"),
        ("model: {model_type: {a: 1}}", "model.model_type"),
        ("model: {vision: [1]}", "model.vision"),
        ("model: {connector: text}", "model.connector"),
        ("model: {connector: {name: 3}}", "model.connector.name"),
        ("datasets: {shapes_caption: [1]}", "datasets.shapes_caption"),
        ("datasets: {shapes_caption: {vis_processor: {eval: {name: [a]}}}}", "vis_processor.eval.name"),
        ("datasets: {shapes_caption: {vis_processor: {eval: {name: {a: 1}}}}}", "vis_processor.eval.name"),
        ("run: {task: 3}", "run.task"),
        ("run: [1]", "run"),
    ],
)
def test_a_list_a_mapping_or_a_number_in_the_wrong_place_is_named(project, text, named):
    assert named in problems_of(project(text), "model.arch=evlgen_opt")


@pytest.mark.parametrize("part", ["vision", "connector", "language"])
def test_an_empty_part_of_the_model_keeps_the_types_settings(project, tmp_path, part):
    config = Config.load(project(f"model:\n  arch: evlgen_opt\n  {part}:\nrun: {{max_epoch: 1}}\n"))
    built_in = Config.load(None, ["model.arch=evlgen_opt"])
    assert config.model_plain()[part]["name"] == built_in.model_plain()[part]["name"]
    config.save(tmp_path / "saved.yaml")
    assert Config.load(tmp_path / "saved.yaml").to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "key",
    [
        *("model.vision.pretrained", "model.connector.init", "model.language.name", "model.checkpoint"),
        "env.cache_root",
        "datasets.coco_caption.build_info.images.storage",
        "datasets.coco_caption.build_info.annotations.train.storage",
    ],
)
@pytest.mark.parametrize("name", ["x" * 5000, "/" + "x/" * 3000, "~nosuchuser/x"])
def test_a_name_that_no_file_can_have_is_a_file_that_is_not_there(monkeypatch, key, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("EVLGEN_CACHE", raising=False)
    config = Config.load("projects/evlgen/coco_ft.yaml", [f"{key}={name}"])
    with pytest.raises(DataError, match="not on this machine"):
        builders = make_builders(config)
        check_nothing_missing(config, builders)


def test_the_sum_of_a_published_file_stays_where_its_address_is_the_storage():
    path = "datasets.coco_caption.build_info.annotations.val"
    published = Config.load("projects/evlgen/coco_ft.yaml").datasets.coco_caption.build_info.annotations.val
    for storage, md5 in ((published.url, published.md5), ("https://other/x.json", None)):
        config = Config.load("projects/evlgen/coco_ft.yaml", [f"{path}.storage={storage}"])
        assert config.datasets.coco_caption.build_info.annotations.val.md5 == md5


VQA = "datasets.coco_vqa.build_info"


def prepared_vqa(tmp_path, project: str, *options: str):
    """``build_info`` of coco_vqa in a run, where a project sets these keys of it."""
    lines = [
        "model: {arch: evlgen_opt, model_type: shapes}",
        f"datasets: {{coco_vqa: {{build_info: {project}}}}}",
    ]
    lines.append("run: {task: vqa, train_splits: [train], max_epoch: 1}")
    (tmp_path / "p.yaml").write_text("\n".join(lines))
    config = Config.load(tmp_path / "p.yaml", options)
    return config.datasets.coco_vqa.build_info


def test_the_built_in_ground_truth_goes_with_the_annotation_it_is_of(tmp_path, caplog):
    caplog.set_level("INFO")
    info = prepared_vqa(tmp_path, "{annotations: {val: {storage: mine.json}}}")
    assert "val" not in info.ground_truth and info.annotations.val == Annotation("mine.json")
    assert (
        f"{VQA}.annotations.val.storage is 'mine.json' ({tmp_path / 'p.yaml'}): left out what belongs to the "
        "dataset's own: url, ground_truth.val" in caplog.text
    )


@pytest.mark.parametrize(
    ("project", "options"),
    [
        ("{annotations: {val: {storage: mine.json}}}", ["ground_truth.val.storage=gt.json"]),
        ("{ground_truth: {val: {storage: gt.json}}}", ["annotations.val.storage=mine.json"]),
        ("{annotations: {val: {storage: mine.json}}, ground_truth: {val: {storage: gt.json}}}", []),
        ("{}", ["ground_truth.val.storage=gt.json"]),
    ],
    ids=["truth in options", "annotation in options", "both in the project", "truth alone"],
)
def test_a_ground_truth_that_somebody_named_stays(tmp_path, project, options):
    info = prepared_vqa(tmp_path, project, *(f"{VQA}.{option}" for option in options))
    assert info.ground_truth.val == Source("gt.json")  # without the address of the built-in one


def test_a_mirror_is_taken_for_the_dataset_s_own_file(tmp_path):
    project = "{annotations: {val: {url: https://mirror/val.json}}, images: {md5: [a, b, c]}}"
    info = prepared_vqa(tmp_path, project)
    assert info.annotations.val.url == "https://mirror/val.json"
    assert info.annotations.val.storage == "coco/annotations/vqa_val_eval.json"
    assert info.images.md5 == ["a", "b", "c"] and len(info.images.url) == 3 and "val" in info.ground_truth


def test_what_a_saved_configuration_repeats_is_as_good_as_built_in(tmp_path):
    saved = tmp_path / "config.yaml"
    Config.load("projects/evlgen/coco_ft.yaml").save(saved)
    own = "datasets.coco_caption.build_info"
    for options, stays in (([], True), ([f"{own}.annotations.val.storage=mine.json"], False)):
        config = Config.load(saved, options)
        info = config.datasets.coco_caption.build_info
        assert ("val" in info.ground_truth) is stays and (info.annotations.val.md5 is not None) is stays


MIXED = """\
model: {arch: evlgen_opt}
datasets:
  coco_caption: {}
  laion115M:
  ccs14M:
run:
  max_iters: 5
  train_dataset_ratios: {laion115M: 15, ccs14M: 4, coco_caption: 1}
  lr_scale: {connector: 2}
"""


@pytest.mark.parametrize(
    ("options", "datasets", "ratios"),
    [
        ([], ["coco_caption", "laion115M", "ccs14M"], {"laion115M": 15, "ccs14M": 4, "coco_caption": 1}),
        (["datasets.laion115M=null"], ["coco_caption", "ccs14M"], {"ccs14M": 4, "coco_caption": 1}),
        (
            ["datasets={laion115M: null, ccs14M: null, gqa: {}}", "run.train_dataset_ratios.gqa=2"],
            ["coco_caption", "gqa"],
            {"coco_caption": 1, "gqa": 2},
        ),
        (
            ["datasets.laion115M=null", "run.train_dataset_ratios={ccs14M: 1}"],
            ["coco_caption", "ccs14M"],
            {"ccs14M": 1},
        ),
        (
            ["run.train_dataset_ratios={ccs14M: 1}", "run.train_dataset_ratios.coco_caption=3"],
            ["coco_caption", "laion115M", "ccs14M"],
            {"ccs14M": 1, "coco_caption": 3},
        ),
        (["run.train_dataset_ratios=null"], ["coco_caption", "laion115M", "ccs14M"], None),
        (
            ["run.train_dataset_ratios.ccs14M=null"],
            ["coco_caption", "laion115M", "ccs14M"],
            {"laion115M": 15, "coco_caption": 1},
        ),
        (
            ["datasets.ccs14M=null", "run.train_dataset_ratios.ccs14M=null"],
            ["coco_caption", "laion115M"],
            {"laion115M": 15, "coco_caption": 1},
        ),
    ],
)
def test_an_option_drops_a_dataset_or_replaces_the_ratios(tmp_path, options, datasets, ratios):
    path = tmp_path / "mixed.yaml"
    path.write_text(MIXED)
    cfg = Config.load(path, options)
    assert set(cfg.datasets) == set(datasets)
    assert cfg.run.train_dataset_ratios == ratios
    assert cfg.run.lr_scale == {"connector": 2}
    again = tmp_path / "saved.yaml"
    cfg.save(again)
    assert Config.load(again).to_dict() == cfg.to_dict()


def test_a_dataset_that_is_not_there_cannot_be_dropped(tmp_path):
    path = tmp_path / "mixed.yaml"
    path.write_text(MIXED)
    with pytest.raises(ConfigError, match=r"datasets\.laion115 \(--options\).*Did you mean 'laion115M'"):
        Config.load(path, ["datasets.laion115=null"])
    assert Config.load(path, ["run.lr_scale={vision: 3}"]).run.lr_scale == {"vision": 3}
    assert Config.load(path, ["run.lr_scale.connector=null"]).run.lr_scale == {}
    assert re.search(
        r"run\.train_dataset_ratios\.ccs14 \(--options\).*no such weight.*Did you mean 'ccs14M'",
        problems_of(path, "run.train_dataset_ratios.ccs14=null"),
    )
    path.write_text(MIXED.replace("ccs14M: 4", "ccs14M: "))
    assert "must be float (more than 0), not null; take the key out" in problems_of(path)
