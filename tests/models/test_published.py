"""Project files and checkpoints in the layouts of LAVIS and EVLGen, and the way back."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from evlgen.cli import main
from evlgen.common.errors import CheckpointError, ConfigError
from evlgen.common.registry import registry
from evlgen.config.config import Config, load_model_config, load_model_file
from evlgen.config.lavis import own_names
from evlgen.config.run_config import RunConfig
from evlgen.models.published.checkpoints import to_own_names, to_published_names
from evlgen.models.vision.temporal import TemporalAttention
from evlgen.models.zoo import load_model
from evlgen.weights.weights import read_pickle, read_weights

PROJECTS = Path(__file__).parent / "published_projects"
LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"


# ---- project files


def load_project(name: str) -> Config:
    """A published project file as it is."""
    return Config.load(PROJECTS / f"{name}.yaml")


FACTS = {
    "blip2_caption_coco_ft": {
        "arch": "blip2_opt",
        "model_type": "caption_coco_opt2.7b",
        "checkpoint": f"{LAVIS}blip2_pretrained_opt2.7b.pth",  # load_finetuned: False over the type's
        "vision.grad_checkpoint": True,
        "vision.freeze": False,
        "vision.image_size": 364,
    },
    "blip2_caption_coco_opt2.7b_eval": {
        "checkpoint": f"{LAVIS}blip2_caption_opt2.7b.pth",
        "vision.grad_checkpoint": False,
        "connector.num_query_token": 32,
    },
    "blip2_pretrain_stage1": {"arch": "blip2", "checkpoint": None, "vision.freeze": True},
    "blip2_pretrain_stage2": {"arch": "blip2_opt", "checkpoint": f"{LAVIS}blip2_pretrained.pth"},
    "blip2_vqav2_zeroshot_opt_eval": {"checkpoint": f"{LAVIS}blip2_pretrained_opt2.7b.pth"},
    "blip2_caption_coco_opt6.7b_eval": {"checkpoint": f"{LAVIS}blip2_caption_opt6.7b.pth"},
    "blip2_caption_nocaps_out_domain_flant5xl_eval": {
        "arch": "blip2_t5",
        "language.name": "google/flan-t5-xl",
    },
    "blip2_caption_nocaps_out_domain_flant5xxl_eval": {"language.name": "google/flan-t5-xxl"},
    "blip2_gqa_zeroshot_flant5xl_eval": {"checkpoint": f"{LAVIS}blip2_pretrained_flant5xl.pth"},
    "blip2_vqav2_zeroshot_flant5xl_eval": {"checkpoint": f"{LAVIS}blip2_pretrained_flant5xl.pth"},
    "blip2_okvqa_zeroshot_flant5xl_eval": {
        "arch": "blip2_t5",
        "checkpoint": f"{LAVIS}blip2_pretrained_flant5xl.pth",
    },
    "blip2_ret_coco_eval": {
        "arch": "blip2",
        "checkpoint": f"{LAVIS}blip2_finetune_coco.pth",
        "vision.image_size": 364,
        "vision.grad_checkpoint": False,
        "max_txt_len": 35,
    },
    "blip2_ret_flickr_eval": {"checkpoint": f"{LAVIS}blip2_finetune_coco.pth", "vision.image_size": 364},
    "evlgen_pretrain_opt2.7b": {
        "arch": "evlgen_opt",
        "model_type": "pretrain_opt2.7b",
        "checkpoint": None,
        "connector.name": "tomeformer",
        "connector.num_layers": 12,
        "connector.r": 19,
        "language.name": "facebook/opt-2.7b",
    },
    "evlgen_pretrain_vicuna7b": {
        "arch": "evlgen_vicuna",
        "checkpoint": None,
        "language.name": "/cache/vicuna-7b-v1.3",
        "max_output_txt_len": 32,
    },
    "evlgen_caption_coco_opt2.7b_eval": {"checkpoint": "/checkpoints/EVLGen/checkpoint_250004.pth"},
    "evlgen_gqa_zeroshot_opt2.7b_eval": {"arch": "evlgen_opt", "connector.r": 19},
    "evlgen_okvqa_zeroshot_opt2.7b_eval": {"checkpoint": "/checkpoints/EVLGen/checkpoint_250004.pth"},
    "evlgen_video_caption_msrvtt_opt2.7b_eval": {"vision.temporal.form": "residual", "checkpoint": None},
    "evlgen_vqav2_zeroshot_vicuna7b_eval": {
        "arch": "evlgen_vicuna",
        "vision.name": "clip_L",
        "vision.precision": "fp16",
        "vision.drop_path_rate": 0,
        "checkpoint": "/checkpoints/EVLGen/clip_L/checkpoint_60000.pth",
    },
    "evlgen_video_caption_msrvtt_opt2.7b_ft": {
        "arch": "evlgen_video_opt",
        "checkpoint": None,
        "vision.temporal.form": "residual",
        "vision.precision": "fp32",
    },
}


def value_at(section: dict, path: str):
    for key in path.split("."):
        section = section[key]
    return section


#: published files that ask for what is not here, and the one reason
REFUSED = {
    "blip2_caption_coco_flant5xl_eval": "blip2_caption_coco_flant5xl_eval.yaml is empty",
    "blip2_retrieval_coco_ft": "run.lr_layer_decay",
}


def test_every_published_project_is_read_or_names_the_one_reason_why_not():
    """The 15 files of salesforce/LAVIS, lavis/projects/blip2, and the 8 of yiren-jian/EVLGen,
    lavis/projects/EVLGen*; shortened: fewer img_ids, other folders."""
    names = {p.stem for p in PROJECTS.glob("*.yaml")}
    assert {*FACTS, *REFUSED} == names
    assert [sum(n.startswith(prefix) for n in names) for prefix in ("blip2", "evlgen")] == [15, 8]
    for name, reason in REFUSED.items():
        with pytest.raises(ConfigError) as error:
            load_project(name)
        assert reason in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(FACTS))
def test_a_published_project_is_read_as_it_is(name, caplog):
    config = load_project(name)
    model = config.model_plain()
    assert {path: value_at(model, path) for path in FACTS[name]} == FACTS[name]
    assert not set(model) & {"vit_model", "image_size", "tome_r", "load_finetuned", "pretrained", "alpha"}
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "run.device" in warnings[0]
    assert "run.inference_method" not in warnings[0]
    assert ("model.alpha" in warnings[0]) == (name.startswith("evlgen_") and "eval" not in name)


def test_the_run_section_means_the_same():
    run = load_project("evlgen_pretrain_opt2.7b").run
    assert (run.runner, run.max_iters, run.iters_per_inner_epoch) == ("runner_iter", 250000, 5000)
    assert (run.init_lr, run.min_lr, run.warmup_lr, run.warmup_steps) == (1e-4, 1e-5, 1e-6, 5000)
    assert (run.batch_size_train, run.precision, run.valid_splits, run.resume) == (200, "auto", ["val"], None)
    stage2 = load_project("blip2_pretrain_stage2").run
    assert (stage2.task, stage2.runner, stage2.valid_splits) == ("image_text_pretrain", "runner_base", [])
    answers = load_project("blip2_vqav2_zeroshot_opt_eval").run
    assert (answers.task, answers.inference_method) == ("vqa", "generate")
    assert (answers.prompt, answers.evaluate) == ("Question: {} Short answer:", True)
    assert load_project("blip2_okvqa_zeroshot_flant5xl_eval").run.apply_lemmatizer is True
    assert run.train_dataset_ratios == {"laion115M": 15, "ccs14M": 4, "coco_caption": 1}


# (task, architecture, published max_len and min_len) -> new tokens: the start token counts, but not in the
# max_new_tokens of T5's captions and of OPT's and T5's answers
NEW_TOKENS = {
    ("captioning", "blip2_opt", 30, 8): (29, 7),
    ("captioning", "liptome_opt", 30, 8): (29, 7),
    ("captioning", "liptome_video_opt", 20, 5): (19, 4),
    ("captioning", "liptome_vicuna", 30, 8): (29, 7),
    ("captioning", "blip2_t5", 80, 10): (80, 9),
    ("captioning", "blip2_opt", None, None): (29, 0),
    ("captioning", "blip2_t5", None, None): (30, 0),
    ("captioning", "blip2_opt", 1, 0): (1, 0),
    ("vqa", "liptome_opt", 10, 1): (10, 0),
    ("gqa", "blip2_t5", 10, 1): (10, 0),
    ("vqa", "liptome_vicuna", 10, 1): (9, 0),
    ("aok_vqa", "blip2_opt", None, 3): (10, 2),
}


@pytest.mark.parametrize(("setting", "expected"), NEW_TOKENS.items())
def test_lengths_of_published_files_count_the_start_token(project, setting, expected):
    task, arch, longest, shortest = setting
    given = {"max_len": longest, "min_len": shortest}
    lengths = "".join(f"{key}: {value}, " for key, value in given.items() if value is not None)
    run = f"run: {{task: {task}, {lengths}max_epoch: 1, device: cuda, world_size: 1}}\n"
    beta = ", beta: 0" if "liptome" in arch else ""
    path = project(f"{{arch: {arch}{beta}}}", run)
    found = Config.load(path).run
    assert (found.max_len, found.min_len) == expected
    options = Config.load(path, ["run.max_len=25", "run.min_len=2"]).run
    assert (options.max_len, options.min_len) == (25, 2), "options are in this project's words"


def test_lengths_of_own_files_and_of_a_saved_configuration_stay(project, tmp_path):
    run = "run: {task: captioning, max_len: 30, min_len: 8, max_epoch: 1}\n"
    found = Config.load(project("{arch: evlgen_opt, model_type: pretrain_opt2.7b}", run)).run
    assert (found.max_len, found.min_len) == (30, 8)
    published = load_project("evlgen_pretrain_opt2.7b")
    published.save(tmp_path / "saved.yaml")
    again = Config.load(tmp_path / "saved.yaml").run
    assert (again.max_len, again.min_len) == (published.run.max_len, published.run.min_len) == (29, 7)


# What files in the published words mean where this project's own files mean something else.
IN_THEIR_WORDS = "device: cuda, seed: 42, lr_sched: linear_warmup_cosine_lr, init_lr: 1e-5, min_lr: 0, "
OPT = "{arch: blip2_opt, model_type: pretrain_opt2.7b}"
LIPTOME = "{arch: liptome_opt, model_type: pretrain_opt2.7b, beta: 0}"


@pytest.mark.parametrize(
    ("model", "run", "expected"),
    [
        # splits: no validation where none is named; to evaluate means on both lists
        (OPT, "max_epoch: 1, evaluate: false", {"valid_splits": [], "test_splits": []}),
        (
            OPT,
            "max_epoch: 1, valid_splits: [val, test]",
            {"valid_splits": ["val", "test"], "test_splits": []},
        ),
        (OPT, "max_epoch: 1, evaluate: true, valid_splits: [val]", {"test_splits": ["val"]}),
        (OPT, "evaluate: true, valid_splits: [val], test_splits: [test]", {"test_splits": ["val", "test"]}),
        (OPT, "evaluate: true, valid_splits: [], test_splits: [test]", {"test_splits": ["test"]}),
        # lengths
        (
            OPT,
            "runner: runner_iter, max_iters: 2e4, iters_per_inner_epoch: 2e3",
            {"max_iters": 20_000, "iters_per_inner_epoch": 2000, "runner": "runner_iter"},
        ),
        (
            OPT,
            "runner: runner_iter, max_iters: 100, max_epoch: 5",
            {"max_iters": 100, "max_epoch": None, "runner": "runner_iter"},
        ),
        (
            OPT,
            "max_iters: 100, iters_per_inner_epoch: 10, max_epoch: 5",
            {"max_iters": None, "iters_per_inner_epoch": None, "max_epoch": 5, "runner": "runner_base"},
        ),
        # empty keys are left out
        (OPT, "max_epoch: 1, val_freq: , num_workers: , amp: ", {"valid_freq": 1, "num_workers": 2}),
        # the warm-up starts at init_lr, and without amp there is no mixed precision in training
        (OPT, "max_epoch: 1, warmup_steps: 10", {"warmup_lr": 1e-5, "precision": "fp32"}),
        (OPT, "max_epoch: 1, warmup_lr: 1e-8, amp: true", {"warmup_lr": 1e-8, "precision": "auto"}),
        (OPT, "max_epoch: 1, warmup_start_lr: 1e-8", {"warmup_lr": 1e-8}),
        (OPT, "evaluate: true, test_splits: [test]", {"precision": "auto"}),
        # captions of LAVIS, of EVLGen, and answers
        (OPT, "max_epoch: 1, task: captioning", {"repetition_penalty": 1.15, "length_penalty": 0}),
        (OPT, "max_epoch: 1, task: captioning, length_penalty: 1.", {"length_penalty": 1}),
        (OPT, "evaluate: true, task: vqa, test_splits: [val]", {"num_beams": 3}),
    ],
)
def test_keys_that_a_published_file_leaves_out_mean_what_they_mean_there(project, model, run, expected):
    """lavis/runners/runner_base.py, runner_iter.py, common/optims.py, tasks/captioning.py and vqa.py."""
    found = vars(Config.load(project(model, f"run: {{{IN_THEIR_WORDS}{run}}}\n")).run)
    assert {key: found[key] for key in expected} == expected


def test_in_ones_own_files_they_mean_what_this_project_says(project):
    own = RunConfig(init_lr=1e-5, min_lr=0, max_epoch=1)
    keys = ("warmup_lr", "valid_splits", "precision", "repetition_penalty", "length_penalty", "num_beams")
    for model in ("{arch: evlgen_opt}", OPT):
        run = Config.load(project(model, "run: {init_lr: 1e-5, min_lr: 0, max_epoch: 1}\n")).run
        assert {key: getattr(run, key) for key in keys} == {key: getattr(own, key) for key in keys}
    evlgen = Config.load(project(LIPTOME, f"run: {{{IN_THEIR_WORDS}max_epoch: 1, task: captioning}}\n")).run
    assert evlgen.repetition_penalty == own.repetition_penalty, "EVLGen's task does not pass it on"


def test_options_over_a_published_file_win_over_what_it_leaves_out(project):
    path = project(OPT, f"run: {{{IN_THEIR_WORDS}max_epoch: 1, test_splits: [test], task: captioning}}\n")
    run = Config.load(path, ["run.warmup_lr=1e-7", "run.repetition_penalty=1", "run.valid_splits=[val]"]).run
    assert (run.warmup_lr, run.repetition_penalty, run.valid_splits) == (1e-7, 1, ["val"])
    assert Config.load(path, ["run.init_lr=1e-3"]).run.warmup_lr == 1e-3
    assert Config.load(path, ["run.evaluate=true", "run.test_splits=[val]"]).run.test_splits == ["val"]
    with pytest.raises(ConfigError, match=r"max_iters .* max_epoch is set too"):
        Config.load(path, ["run.max_iters=3"])


def test_what_a_video_file_of_evlgen_leaves_out():
    train = load_project("evlgen_video_caption_msrvtt_opt2.7b_ft").datasets.msrvtt_caption.vis_processor.train
    assert (train.name, train.augment) == ("alpro_video_train", "none")


def test_a_model_of_evlgen_is_not_trained_without_its_contrastive_loss_unasked(project):
    """``beta`` is 0.1 in yiren-jian/EVLGen where it is left out."""
    keys = "arch: liptome_opt, model_type: pretrain_opt2.7b"
    path = project(f"{{{keys}}}", "run: {max_epoch: 1}\n")
    with pytest.raises(ConfigError, match=r"model\.beta \(.*\): is left out, which means 0\.1"):
        Config.load(path)
    assert Config.load(path, ["model.beta=0"]).model.arch == "evlgen_opt"
    assert Config.load(path, ["run.evaluate=true", "run.test_splits=[test]"]).model.arch == "evlgen_opt"
    assert load_model_file(path).arch == "evlgen_opt", "a model's file trains nothing"
    cfg = load_model_config("liptome_vicuna", "pretrain_vicuna7b")
    assert (cfg.max_txt_len, cfg.max_output_txt_len) == (128, 256)
    assert load_model_config("evlgen_vicuna", "pretrain_vicuna7b").max_txt_len == 32


@pytest.mark.parametrize(
    ("model", "run", "reasons"),
    [
        ("{arch: blip_caption, vit_type: base}", "task: captioning, k_tests: 1", ["model.arch"]),
        ("{arch: blip2, model_type: coco}", "task: multimodal_classification, k_tests: 1", ["run.task"]),
        ("{arch: albef_nlvr}", "task: multimodal_classification", ["model.arch", "run.task"]),
        (OPT, "task: captioning, k_tests: 1, max_epoch: 1", ["run.k_tests"]),
        ("{arch: blip2_t5_instruct, model_type: flant5xl}", "task: captioning, k_tests: 1", ["run.k_tests"]),
    ],
)
def test_an_architecture_or_task_that_is_not_here_is_named_first(project, model, run, reasons):
    rest = f"datasets: {{nlvr: {{type: x}}}}\nrun: {{{IN_THEIR_WORDS}{run}}}\n"
    with pytest.raises(ConfigError) as error:
        Config.load(project(model, rest if reasons != ["run.k_tests"] else rest.replace("nlvr", "gqa")))
    message = str(error.value)
    assert all(reason in message for reason in reasons)
    assert not any(other in message for other in {"run.k_tests", "datasets.nlvr", "vit_type"} - set(reasons))


def test_the_val_split_of_gqas_published_type_is_its_testdev_set(tmp_path):
    """LAVIS's balanced_testdev.yaml has the testdev questions under ``val``."""
    rest = "run: {task: gqa, evaluate: true, test_splits: [val]}\nmodel: {arch: evlgen_opt}\n"
    for kind, file in (("balanced_testdev", "testdev"), ("balanced_sft_raw", "val")):
        path = tmp_path / f"{kind}.yaml"
        path.write_text(f"datasets: {{gqa: {{type: {kind}}}}}\n{rest}")
        storage = Config.load(path).datasets.gqa.build_info.annotations.val.storage
        assert storage == f"gqa/annotations/{file}_balanced_questions.json"


@pytest.fixture
def project(tmp_path):
    """Writes a project file with a ``model`` section and further text; returns its path."""

    def write(model: str, rest: str = "") -> Path:
        path = tmp_path / "project.yaml"
        path.write_text(f"model: {model}\n{rest}", encoding="utf-8")
        return path

    return write


def test_flat_keys_in_options_win_over_the_file_and_its_own_keys(project):
    path = project("{arch: liptome_opt, model_type: pretrain_opt2.7b, tome_r: 7, vision: {image_size: 224}}")
    model = Config.load(path, ["model.tome_r=12", "model.image_size=364", "model.freeze_vit=false"]).model
    assert (model.connector["r"], model.vision.image_size, model.vision.freeze) == (12, 364, False)
    assert Config.load(path, ["model.connector.r=3"]).model.connector["r"] == 3


def test_in_one_file_this_projects_key_wins(project):
    path = project("{arch: evlgen_opt, model_type: pretrain_opt2.7b, tome_r: 7, connector: {r: 5}}")
    assert Config.load(path).model.connector["r"] == 5
    path = project(
        "{arch: liptome_video_opt, model_type: pretrain_opt2.7b, checkpoint: a.pth, pretrained: b.pth, "
        "vision: {temporal: {form: mean}}}"
    )
    model = Config.load(path).model
    assert (model.checkpoint, model.vision.temporal.form) == ("a.pth", "mean")


@pytest.mark.parametrize(
    ("keys", "options", "expected"),
    [
        ("load_finetuned: true, finetuned: f.pth, pretrained: p.pth", [], "f.pth"),
        ("load_finetuned: false, finetuned: f.pth, pretrained: p.pth", [], "p.pth"),
        ("load_finetuned: false, load_pretrained: false, finetuned: f.pth, pretrained: p.pth", [], None),
        ("load_pretrained: true, load_finetuned: false, pretrained: ''", [], None),
        ("load_pretrained: true, load_finetuned: false", [], None),
        ("pretrained: p.pth", [], "p.pth"),
        ("finetuned: f.pth, pretrained: p.pth", ["model.load_finetuned=False"], "p.pth"),
        ("load_pretrained: false, pretrained: p.pth", ["model.load_pretrained=true"], "p.pth"),
        ("load_pretrained: true, pretrained: p.pth", ["model.checkpoint=o"], "o"),
        ("checkpoint: o", ["model.finetuned=f.pth"], "f.pth"),
        ("checkpoint: o", [], "o"),
    ],
)
def test_the_checkpoint_follows_from_switches_and_paths_of_all_layers(project, keys, options, expected):
    path = project(f"{{arch: liptome_opt, model_type: pretrain_opt2.7b, {keys}}}")
    assert Config.load(path, options).model.checkpoint == expected


def test_a_path_beside_the_file_is_found(project, tmp_path, golden):
    (tmp_path / "w.pth").write_bytes(b"")
    (tmp_path / "opt").mkdir()
    path = project("{arch: liptome_opt, model_type: pretrain_opt2.7b, pretrained: w.pth, opt_model: opt}")
    model = Config.load(path).model
    assert (model.checkpoint, model.language.name) == (str(tmp_path / "w.pth"), str(tmp_path / "opt"))


def test_keys_that_mean_nothing_are_named_in_one_warning(project, caplog):
    rest = (
        "preprocess: {vis_processor: {}}\n"
        "datasets: {coco_caption: {type: eval, data_dir: /data}}\n"
        "run: {max_epoch: 1, save_freq: -1, num_ans_candidates: 128, val_freq: 2, lr_layer_decay: 1}\n"
    )
    path = project("{arch: liptome_opt, model_type: pretrain_opt2.7b, alpha: 0.1, beta: 0}", rest)

    config = Config.load(path, ["model.apply_lemmatizer=true"])
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [
        "preprocess, model.alpha, datasets.coco_caption.type, datasets.coco_caption.data_dir, "
        "run.save_freq: without effect here"
    ]
    assert config.run.valid_freq == 2
    assert config.run.num_ans_candidates == 128
    assert config.run.apply_lemmatizer, "LAVIS gives it to the model"


def test_the_lemmatizer_of_a_published_model_is_the_tasks_and_gives_way_to_run(project):
    names = "arch: liptome_opt, model_type: pretrain_opt2.7b, beta: 0"
    path = project(f"{{{names}, apply_lemmatizer: true}}", "run: {max_epoch: 1, apply_lemmatizer: false}\n")
    assert not Config.load(path).run.apply_lemmatizer
    assert load_model_file(path).arch == "evlgen_opt", "a model's file has no task"
    with pytest.raises(ConfigError, match=r"run.apply_lemmatizer \(.*\): "):
        Config.load(project(f"{{{names}, apply_lemmatizer: perhaps}}"))


@pytest.mark.parametrize(
    ("model", "run", "expected"),
    [
        ("tome_rr: 3", "", "model.tome_rr ({}): "),
        ("freeze_vitt: true", "", "model.freeze_vitt ({}): "),
        ("tome_r: abc", "", "model.connector.r ({}): "),
        ("load_finetuned: 5", "", "model.load_finetuned ({}): must be true or false, not 5."),
        ("vision: 5, image_size: 224", "", "model.vision ({}): "),
        ("pretrained: [1]", "", "model.checkpoint ({}): "),
        ("arch: {a: 1}", "", "model.arch ({}): "),
        ("tome_r: 3", "lr_layer_decay: 0.9, ", "run.lr_layer_decay ({}): all layers learn at one rate"),
        ("tome_r: 3", "save_frequency: 1, ", "run.save_frequency ({}): "),
    ],
)
def test_what_is_wrong_is_named_with_its_file(project, model, run, expected):
    arch = "" if model.startswith("arch") else "arch: liptome_opt, "
    path = project(f"{{{arch}model_type: pretrain_opt2.7b, {model}}}", f"run: {{{run}max_epoch: 1}}\n")
    with pytest.raises(ConfigError) as error:
        Config.load(path)
    assert expected.format(path) in str(error.value)


def test_an_unknown_key_comes_with_the_nearest_one(project):
    path = project("{arch: liptome_opt, model_type: pretrain_opt2.7b, max_text_len: 3}")
    with pytest.raises(ConfigError, match="Did you mean 'max_txt_len'"):
        Config.load(path)


def test_a_key_that_an_architecture_declares_is_its_own(project, tmp_path):
    (tmp_path / "flat_model.py").write_text(
        "import dataclasses\n"
        "from evlgen.common.registry import registry\n"
        "from evlgen.models.base_model import BaseModel\n"
        "@dataclasses.dataclass\n"
        "class Flat:\n"
        "    arch: str\n    model_type: str | None = None\n    image_size: int = 1\n"
        "    vision: dict = dataclasses.field(default_factory=dict)\n"
        "@registry.register_model('flat_for_test')\n"
        "class FlatModel(BaseModel):\n    CONFIG = Flat\n",
        encoding="utf-8",
    )
    path = project("{arch: flat_for_test, image_size: 9, freeze_vit: true}")
    model = Config.load(path, plugins=[str(tmp_path / "flat_model.py")]).model
    assert (model.image_size, model.vision) == (9, {"freeze": True})


@pytest.mark.parametrize(
    ("published", "own"),
    [
        (("liptome_opt", "pretrain_opt2.7b"), ("evlgen_opt", "pretrain_opt2.7b")),
        (("liptome_video_vicuna", "pretrain_vicuna7b"), ("evlgen_video_vicuna", "pretrain_vicuna7b")),
        (("blip2_t5", "pretrain_flant5xl_vitL"), ("blip2_t5", "pretrain_flant5xl")),
        (("blip2_vicuna", "vicuna13b"), ("blip2_vicuna", "pretrain_vicuna13b")),
        (("evlgen_opt", None), ("evlgen_opt", None)),
    ],
)
def test_names_of_architectures_and_types(published, own):
    assert own_names(*published) == own
    if published[1] is not None:
        model = load_model_config(*published)
        assert (model.arch, model.model_type) == own


# published names -> vision encoder, checkpoint, temporal form
STAND_FOR = {
    ("blip2_t5", "pretrain_flant5xl"): ("eva_clip_g", f"{LAVIS}blip2_pretrained_flant5xl.pth", None),
    ("blip2_t5", "pretrain_flant5xl_vitL"): ("clip_L", f"{LAVIS}blip2_pretrained_flant5xl_vitL.pth", None),
    ("blip2", "pretrain_vitL"): ("clip_L", f"{LAVIS}blip2_pretrained_vitL.pth", None),
    ("evlgen_video_opt", "pretrain_opt2.7b"): ("eva_clip_g", None, "average"),
    ("liptome_video_opt", "pretrain_opt2.7b"): ("eva_clip_g", None, "residual"),
    ("liptome_video_vicuna", "pretrain_vicuna13b"): ("eva_clip_g", None, "residual"),
}


def stands_for(cfg) -> tuple:
    return cfg.vision.name, cfg.get("checkpoint"), (cfg.vision.get("temporal") or {}).get("form")


@pytest.mark.parametrize(("names", "expected"), STAND_FOR.items(), ids=map("-".join, STAND_FOR))
def test_published_names_stand_for_the_same_in_python_as_in_a_file(names, expected, project, monkeypatch):
    assert stands_for(load_model_config(*names)) == expected
    file = project(f"{{arch: {names[0]}, model_type: {names[1]}}}")
    assert stands_for(OmegaConf.create(Config.load(file).model_plain())) == expected
    assert stands_for(load_model_file(file)) == expected

    built = []
    cls = registry.get_model_class(own_names(names[0], None)[0])
    monkeypatch.setattr(cls, "from_config", lambda cfg, device: built.append(cfg) or torch.nn.Module())
    load_model(*names)
    assert [stands_for(cfg) for cfg in built] == [expected]


def test_overrides_win_over_what_published_names_stand_for():
    overrides = {"checkpoint": "o.pth", "vision": {"name": "eva_clip_g"}}
    cfg = load_model_config("blip2_t5", "pretrain_flant5xl_vitL", overrides)
    assert stands_for(cfg) == ("eva_clip_g", "o.pth", None)
    cfg = load_model_config("liptome_video_opt", None, {"vision": {"temporal": {"form": "mean"}}})
    assert (cfg.model_type, cfg.vision.temporal.form) == ("shapes", "mean")


def test_a_published_video_model_loaded_by_name_is_built_with_its_own_form():
    forms = {
        name: {m.form for m in load_model(name, "shapes").modules() if isinstance(m, TemporalAttention)}
        for name in ("liptome_video_opt", "evlgen_video_opt")
    }
    assert forms == {"liptome_video_opt": {"residual"}, "evlgen_video_opt": {"average"}}


@pytest.mark.parametrize(
    ("arch", "model_type", "finetuned", "pretrained", "language"),
    [
        ("blip2_opt", "caption_coco_opt6.7b", "caption_opt6.7b", "pretrained_opt6.7b", "facebook/opt-6.7b"),
        ("blip2_t5", "caption_coco_flant5xl", "caption_flant5xl", "pretrained_flant5xl", "google/flan-t5-xl"),
        ("blip2_t5", "pretrain_flant5xxl", None, "pretrained_flant5xxl", "google/flan-t5-xxl"),
    ],
)  # fmt: skip
def test_types_of_lavis_are_read(project, arch, model_type, finetuned, pretrained, language):
    """Facts of lavis/configs/models/blip2/*.yaml."""
    file = project(f"{{arch: {arch}, model_type: {model_type}}}")
    model = Config.load(file).model
    assert model.checkpoint == f"{LAVIS}blip2_{finetuned or pretrained}.pth"
    assert (model.vision.name, model.language.name) == ("eva_clip_g", language)
    assert (model.vision.image_size, model.vision.freeze) == ((364, False) if finetuned else (224, True))
    assert model.prompt == ("a photo of" if finetuned else "")
    from_the_start = Config.load(file, ["model.load_finetuned=false"]).model
    assert from_the_start.checkpoint == f"{LAVIS}blip2_{pretrained}.pth"


# ---- what is not computed here


INSTRUCT = "arch: blip2_vicuna_instruct, model_type: vicuna7b"


def test_instruct_blip_is_what_it_is_in_lavis(project):
    folder = LAVIS.replace("BLIP2", "InstructBLIP")
    for flat in ("", ", qformer_text_input: true, load_pretrained: true, vit_model: eva_clip_g"):
        model = Config.load(project(f"{{{INSTRUCT}{flat}}}")).model_plain()
        assert (model["arch"], model["model_type"]) == ("blip2_vicuna_instruct", "vicuna7b")
        assert model["checkpoint"] == f"{folder}instruct_blip_vicuna7b_trimmed.pth"
        assert (model["max_txt_len"], model["max_output_txt_len"]) == (128, 256)


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        (f"{INSTRUCT}, qformer_text_input: null", [], "must be true, not null or false"),
        (
            "arch: blip2_vicuna, model_type: vicuna7b, qformer_text_input: true",
            [],
            "must be false, not true: InstructBLIP is model.arch: blip2_vicuna_instruct",
        ),
    ],
)
def test_whether_a_qformer_reads_the_instruction_is_the_architectures(project, keys, options, message):
    with pytest.raises(ConfigError) as error:
        Config.load(project(f"{{{keys}}}"), options)
    assert "model.qformer_text_input (" in str(error.value) and message in str(error.value)


def test_without_the_instruction_it_is_blip2(project, caplog):
    path = project(f"{{{INSTRUCT}, qformer_text_input: false}}")
    for model in (
        Config.load(path).model,
        Config.load(project(f"{{{INSTRUCT}}}"), ["model.qformer_text_input=false"]).model,
        load_model_config("blip2_vicuna_instruct", "vicuna7b", {"qformer_text_input": False}),
    ):
        assert (model.arch, model.model_type) == ("blip2_vicuna", "pretrain_vicuna7b")
    assert not caplog.records


def test_a_loss_that_there_is_not_is_refused(project, caplog):
    keys = "arch: liptome_opt, model_type: pretrain_opt2.7b"
    for beta, problem in (
        ("0.1", "0.1 would add a contrastive loss"),
        ("-1", "-1 would add a contrastive loss"),
        ("null", "is empty"),
        ("", "is empty"),
        ("true", "must be a number, not true"),
    ):
        path = project(f"{{{keys}, beta: {beta}}}")
        with pytest.raises(ConfigError) as error:
            Config.load(path)
        assert f"model.beta ({path}): {problem}" in str(error.value)
        assert str(error.value).endswith("Set it to 0 to train on the texts alone.")
    assert Config.load(path, ["model.beta=0"]).model.arch == "evlgen_opt"
    assert "beta" not in Config.load(project(f"{{{keys}, beta: 0.0}}")).model_plain()
    with pytest.raises(ConfigError, match=r"model\.beta \(--options\)"):
        Config.load(path, ["model.beta=0.2"])
    assert not caplog.records


@pytest.mark.parametrize("beta", ["0.1", ""])
def test_a_loss_that_there_is_not_has_no_effect_on_an_evaluation(project, caplog, beta):
    keys = f"{{arch: liptome_opt, model_type: pretrain_opt2.7b, beta: {beta}}}"
    path = project(keys, "run: {evaluate: true, test_splits: [test]}\n")
    assert Config.load(path).model.arch == load_model_file(path).arch == "evlgen_opt"
    assert [r.getMessage() for r in caplog.records] == ["model.beta: without effect here"] * 2


@pytest.mark.parametrize("arch", ["blip2", "blip2_opt"])
def test_the_frequency_of_cross_attention_is_the_connectors(project, arch, caplog):
    path = project(f"{{arch: {arch}, model_type: shapes, cross_attention_freq: 3}}")
    assert Config.load(path).model.connector["cross_attention_freq"] == 3
    assert not caplog.records
    Config.load(project("{arch: liptome_opt, model_type: shapes, cross_attention_freq: 3}"))
    assert [r.getMessage() for r in caplog.records] == ["model.cross_attention_freq: without effect here"]


# ---- checkpoints


def convert(*arguments) -> int:
    return main(["convert", *map(str, arguments)])


def same_weights(a: Path, b: Path) -> None:
    one, other = read_weights(a), read_weights(b)
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype
        assert torch.equal(one[key], other[key]), key


@pytest.fixture
def without_strays(golden, tmp_path):
    """A golden checkpoint without the weights of its frozen language model; returns (file, model.yaml)."""

    def write(arch: str) -> tuple[Path, Path]:
        content = read_pickle(golden / arch / "checkpoint_4.pth")
        kept = {k: v.clone() for k, v in content["model"].items() if not k.startswith("opt_model.")}
        assert len(kept) == len(content["model"]) - 1
        path = tmp_path / f"{arch}.pth"
        torch.save({**content, "model": kept}, path)
        return path, golden / arch / "model.yaml"

    return write


@pytest.mark.parametrize("arch", ["evlgen_opt", "evlgen_video_opt"])
def test_a_round_trip_gives_the_same_weights(arch, without_strays, tmp_path, capsys):
    published, cfg = without_strays(arch)
    assert convert("--to", "own", published, tmp_path / "own", "--cfg-path", cfg) == 0
    count = len(read_weights(tmp_path / "own"))
    assert f"own: {count} weights of {arch}, from {published}" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "own").iterdir()) == ["config.yaml", "model.safetensors"]

    assert convert("--to", "published", tmp_path / "own", tmp_path / "back.pth") == 0
    same_weights(published, tmp_path / "back.pth")
    assert convert("--to", "own", tmp_path / "back.pth", tmp_path / "again") == 0  # its own config
    same_weights(tmp_path / "own", tmp_path / "again")
    assert (tmp_path / "own/config.yaml").read_text() == (tmp_path / "again/config.yaml").read_text()


def test_temporal_weights_keep_their_names(golden):
    state = read_weights(golden / "evlgen_video_opt" / "checkpoint_4.pth")
    own = to_own_names(state)
    for name in ("alpha", "query.weight", "key.bias"):
        own_value = own[f"vision.trunk.blocks.1.temporal_merge.{name}"]
        assert own_value is state[f"visual_encoder.blocks.1.temporal_merge.{name}"]


def test_temporal_weights_of_the_form_average_have_no_published_layout(without_strays, tmp_path, capsys):
    published, cfg = without_strays("evlgen_video_opt")
    average = ("--options", "model.vision.temporal.form=average")
    assert convert("--to", "own", published, tmp_path / "no", "--cfg-path", cfg, *average) == 1
    assert "model.vision.temporal.form=residual" in capsys.readouterr().err
    assert convert("--to", "own", published, tmp_path / "own", "--cfg-path", cfg) == 0
    assert convert("--to", "published", tmp_path / "own", tmp_path / "no.pth", *average) == 1
    assert not (tmp_path / "no").exists() and not (tmp_path / "no.pth").exists()


@pytest.mark.parametrize("name", ["prompt_head.places", "connector.proj_residual.weight"])
def test_what_the_published_code_has_no_place_for_is_not_published(name, without_strays, tmp_path, capsys):
    published, cfg = without_strays("evlgen_opt")
    assert convert("--to", "own", published, tmp_path / "own", "--cfg-path", cfg) == 0
    state = {**load_file(tmp_path / "own" / "model.safetensors"), name: torch.zeros(2, 2)}
    save_file(state, tmp_path / "own" / "model.safetensors")
    assert convert("--to", "published", tmp_path / "own", tmp_path / "no.pth") == 1
    assert f"holds {name}, which the published code has no place for" in capsys.readouterr().err
    assert not (tmp_path / "no.pth").exists()


def test_settings_that_the_published_code_lacks_are_not_published(without_strays, tmp_path, capsys):
    published, cfg = without_strays("evlgen_opt")
    assert convert("--to", "own", published, tmp_path / "own", "--cfg-path", cfg) == 0
    for option in ("vision.tiles={max: 2}", "vision.tome_r=2", "language.tome={layer: 1, r: 2}"):
        options = ("--options", f"model.{option}")
        assert convert("--to", "published", tmp_path / "own", tmp_path / "no.pth", *options) == 1
        error = capsys.readouterr().err
        assert f"with model.{option.partition('=')[0]}, which the published code has no place for" in error
        assert "Train without" in error and not (tmp_path / "no.pth").exists()


def test_a_converted_folder_is_the_golden_model(golden, tmp_path):
    from safetensors.torch import load_file

    folder = golden / "evlgen_opt"
    convert("--to", "own", folder / "checkpoint_4.pth", tmp_path / "own", "--cfg-path", folder / "model.yaml")
    expected = load_file(folder / "expected.safetensors")
    model = registry.get_model_class("evlgen_opt").from_pretrained(tmp_path / "own")
    got = model.soft_prompts({"image": expected["image"]})
    assert torch.allclose(
        got, expected["soft_prompts"], atol=1e-5 * expected["soft_prompts"].abs().max().item()
    )


@pytest.fixture
def blip2(tmp_path):
    """A small random BLIP-2 between the bundled backbones, as an own folder."""
    torch.manual_seed(0)
    model = registry.get_model_class("blip2_opt").from_config(load_model_config("blip2_opt", "shapes"))
    return model.save_pretrained(tmp_path / "blip2")


def test_a_round_trip_of_blip2(blip2, tmp_path):
    assert convert("--to", "published", blip2, tmp_path / "blip2.pth") == 0
    published = read_weights(tmp_path / "blip2.pth")
    own = read_weights(blip2)
    assert torch.equal(published["query_tokens"], own["connector.query_tokens"])
    assert torch.equal(published["opt_proj.weight"], own["connector.proj_out.weight"])
    key, value = own["connector.layers.0.cross_key_value.weight"].chunk(2)
    prefix = "Qformer.bert.encoder.layer.0.crossattention.self."
    assert torch.equal(published[f"{prefix}key.weight"], key)
    assert torch.equal(published[f"{prefix}value.weight"], value)
    assert all(k.startswith(("Qformer.bert.", "query_tokens", "opt_proj.", "ln_vision.")) for k in published)

    assert convert("--to", "own", tmp_path / "blip2.pth", tmp_path / "again") == 0
    same_weights(blip2, tmp_path / "again")
    assert convert("--to", "published", tmp_path / "again", tmp_path / "again.pth") == 0
    same_weights(tmp_path / "blip2.pth", tmp_path / "again.pth")


def test_a_round_trip_of_blip2s_first_stage_and_its_start_of_the_second(tmp_path):
    torch.manual_seed(0)
    model = registry.get_model_class("blip2").from_config(load_model_config("blip2", "shapes"))
    model.save_pretrained(tmp_path / "first")
    assert convert("--to", "published", tmp_path / "first", tmp_path / "first.pth") == 0
    published = read_weights(tmp_path / "first.pth")
    assert {"temp", "itm_head.weight", "vision_proj.weight", "text_proj.bias"} <= published.keys()
    assert convert("--to", "own", tmp_path / "first.pth", tmp_path / "again") == 0
    same_weights(tmp_path / "first", tmp_path / "again")

    second = registry.get_model_class("blip2_opt").from_config(load_model_config("blip2_opt", "shapes"))
    report = second.load_checkpoint(tmp_path / "first.pth")
    assert report.missing == ["connector.proj_out.bias", "connector.proj_out.weight"]
    assert torch.equal(second.connector.query_tokens.cpu(), published["query_tokens"])


@pytest.mark.parametrize(
    ("arch", "projection"),
    [("evlgen_opt", "opt_proj"), ("evlgen_vicuna", "llm_proj"), ("blip2_t5", "t5_proj")],
)
def test_the_projections_name_follows_from_the_architecture(arch, projection, without_strays, tmp_path):
    published, cfg = without_strays("evlgen_opt")
    convert("--to", "own", published, tmp_path / "own", "--cfg-path", cfg, "--options", f"model.arch={arch}")
    assert load_model_file(tmp_path / "own" / "config.yaml").arch == arch
    assert convert("--to", "published", tmp_path / "own", tmp_path / "back.pth") == 0
    names = {k for k in read_weights(tmp_path / "back.pth") if k.endswith("_proj.weight")}
    assert names == {"VL_proj.weight", f"{projection}.weight"}


def test_the_config_in_the_file_itself_is_translated(without_strays, tmp_path):
    published, _ = without_strays("evlgen_opt")
    content = read_pickle(published)
    model = {"arch": "liptome_opt", "model_type": "pretrain_opt2.7b", "load_pretrained": True, "tome_r": 3}
    model.update(
        pretrained="/elsewhere/w.pth", finetuned="", num_layers=3, opt_model="a/b", vit_precision="fp16"
    )
    config = {"run": {"task": "captioning"}, "model": model, "preprocess": {}, "datasets": {}}
    torch.save({**content, "config": config}, tmp_path / "with_config.pth")
    assert convert("--to", "own", tmp_path / "with_config.pth", tmp_path / "own") == 0
    section = load_model_file(tmp_path / "own" / "config.yaml")
    assert (section.arch, section.checkpoint, section.vision.precision) == ("evlgen_opt", None, "fp16")
    assert (section.connector.num_layers, section.connector.r, section.language.name) == (3, 3, "a/b")


def test_weights_of_frozen_models_are_skipped_with_one_line(golden, caplog):
    caplog.set_level(logging.INFO)
    state = read_weights(golden / "evlgen_opt" / "checkpoint_4.pth")
    state |= {
        "opt_model.model.decoder.embed_tokens.weight": torch.zeros(2),
        "VLconnector.pooler.dense.weight": torch.zeros(2),
        "VLconnector.embeddings.position_ids": torch.zeros(2),
    }
    own = to_own_names(state)
    assert own.keys() == to_own_names(read_weights(golden / "evlgen_opt" / "checkpoint_4.pth")).keys()
    lines = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert len(lines) == 2
    assert lines[0].startswith(
        "4 weights left out, of frozen models or without a place in the connector: opt_"
    )


def test_a_published_file_loads_without_its_frozen_parts(golden, caplog):
    caplog.set_level(logging.INFO)
    model = registry.get_model_class("evlgen_opt").from_config(golden / "evlgen_opt" / "model.yaml")
    report = model.load_checkpoint(golden / "evlgen_opt" / "checkpoint_4.pth")
    assert report.missing == report.unexpected == []


# ---- what convert refuses


@pytest.fixture
def own(without_strays, tmp_path):
    published, cfg = without_strays("evlgen_opt")
    convert("--to", "own", published, tmp_path / "own", "--cfg-path", cfg)
    return tmp_path / "own"


def refusal(capsys, *arguments) -> str:
    capsys.readouterr()
    assert convert(*arguments) == 1
    return capsys.readouterr().err


def test_an_existing_target_is_replaced_by_force_only(own, tmp_path, capsys):
    target = tmp_path / "t.pth"
    target.write_text("mine")
    assert "exists. Name another place" in refusal(capsys, "--to", "published", own, target)
    assert target.read_text() == "mine"
    assert convert("--to", "published", own, target, "--force") == 0
    assert "exists. Name another" in refusal(capsys, "--to", "own", target, own)
    before = (own / "model.safetensors").stat().st_ino
    assert convert("--to", "own", target, own, "--force") == 0
    assert (own / "model.safetensors").stat().st_ino != before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []

    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_text("a")
    assert "does not replace it" in refusal(capsys, "--to", "own", target, folder, "--force")
    assert "does not replace it" in refusal(capsys, "--to", "published", own, folder, "--force")
    assert (folder / "a.jpg").exists()


def test_a_runs_checkpoint_is_a_source_too(own, tmp_path):
    (own / "training_state").mkdir()
    config = yaml.safe_load((own / "config.yaml").read_text())
    (own / "config.yaml").write_text(
        yaml.safe_dump({"plugins": [], "env": {}, "datasets": {}, "run": {"max_epoch": 1}, **config})
    )
    assert convert("--to", "published", own, tmp_path / "t.pth") == 0
    assert read_pickle(tmp_path / "t.pth")["config"].keys() == {"model"}


def test_what_is_in_the_layout_already_is_not_converted(own, golden, tmp_path, capsys):
    published = golden / "evlgen_opt" / "checkpoint_4.pth"
    assert "has own names already" in refusal(capsys, "--to", "own", own, tmp_path / "x")
    assert "has published names already" in refusal(capsys, "--to", "published", published, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_config_of_another_connector_is_refused(golden, tmp_path, capsys):
    published = golden / "evlgen_opt" / "checkpoint_4.pth"  # its config names the architecture alone
    assert "--cfg-path" in refusal(capsys, "--to", "own", published, tmp_path / "x")
    options = ["--cfg-path", golden / "evlgen_opt" / "model.yaml", "--options", "model.num_layers=4"]
    message = refusal(capsys, "--to", "own", published, tmp_path / "x", *options)
    assert "holds a connector of num_layers 3, and the config says 4" in message


def test_a_file_without_a_config_asks_for_one(golden, tmp_path, capsys):
    torch.save({"model": {"VL_proj.weight": torch.zeros(2, 2)}}, tmp_path / "bare.pth")
    assert "--cfg-path" in refusal(capsys, "--to", "own", tmp_path / "bare.pth", tmp_path / "x")


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    class Runs:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model": {"VL_proj.weight": torch.zeros(2)}, "config": Runs()}, tmp_path / "evil.pth")
    assert "is refused" in refusal(capsys, "--to", "own", tmp_path / "evil.pth", tmp_path / "x")
    assert not (tmp_path / "ran").exists()


def test_weights_without_a_published_place_are_named():
    state = {"ln_vision.weight": torch.zeros(2), "connector.proj_out.weight": torch.zeros(2, 2)}
    assert to_published_names(state, "llm_proj").keys() == {"ln_vision.weight", "llm_proj.weight"}
    for stray in ("connector.layers.0.latents.weight", "connector.gate", "language.lora.weight"):
        with pytest.raises(CheckpointError, match=r"no place in the published layouts|have no place"):
            to_published_names({**state, stray: torch.zeros(2)})


def test_a_config_in_the_file_is_held_to_what_files_are(golden, tmp_path, capsys):
    state = read_weights(golden / "evlgen_opt" / "checkpoint_4.pth")
    circular: dict = {"arch": "liptome_opt"}
    circular["vision"] = circular
    for model in (circular, {"arch": torch.zeros(2)}, {"arch": "liptome_opt", 1: 2}):
        torch.save({"model": state, "config": {"model": model}}, tmp_path / "new.pth")
        message = refusal(capsys, "--to", "own", tmp_path / "new.pth", tmp_path / "x")
        where = "objects that contain" if model is circular else f"the config in {tmp_path / 'new.pth'}"
        assert where in message
    model = {"arch": "liptome_opt", "model_type": "pretrain_opt2.7b", "opt_model": "${oc.env:HOME}"}
    torch.save({"model": state, "config": {"model": model}}, tmp_path / "new.pth")
    assert "oc.env" in refusal(capsys, "--to", "own", tmp_path / "new.pth", tmp_path / "x")
