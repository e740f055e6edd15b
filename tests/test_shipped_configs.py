"""Every model type and project file that is shipped holds what this version reads."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from evlgen.common.registry import registry
from evlgen.config.config import Config, load_model_config, load_stages
from evlgen.files.io import PACKAGE_ROOT

TYPES = [(arch, t) for arch in registry.list_models() for t in registry.get_model_class(arch).MODEL_TYPES]
PROJECTS = sorted(p.relative_to(PACKAGE_ROOT).as_posix() for p in PACKAGE_ROOT.glob("projects/**/*.yaml"))


# ---- what is published: yiren-jian/EVLGen (pretraining and MSR-VTT) and salesforce/LAVIS (everything else)


def schedule(warmup_lr: float, init_lr: float, min_lr: float, warmup_steps: int, **length) -> dict[str, Any]:
    return {
        **{"run.lr_sched": "linear_warmup_cosine_lr", "run.weight_decay": 0.05, "run.seed": 42},
        **{"run.warmup_lr": warmup_lr, "run.init_lr": init_lr, "run.min_lr": min_lr},
        **{"run.warmup_steps": warmup_steps, **{f"run.{key}": value for key, value in length.items()}},
    }


def batches(train: int | None, evaluation: int) -> dict[str, Any]:
    trained = {"run.batch_size_train": train} if train else {"run.evaluate": True}
    return {**trained, "run.batch_size_eval": evaluation}


def decoding(min_len: int, max_len: int) -> dict[str, Any]:
    """Of published lengths, which count the start token; OPT's answers are given in new tokens."""
    is_answer = max_len == 10
    longest = max_len if is_answer else max_len - 1
    return {"run.num_beams": 5, "run.min_len": min_len - 1, "run.max_len": longest}


def model(arch: str, size: int, frozen: bool = True, prompt: str = "") -> dict[str, Any]:
    tokens = {"evlgen": {"model.connector.r": 19}, "blip2_": {"model.connector.num_query_token": 32}}
    return {
        **{"model.arch": arch, "model.prompt": prompt, "model.max_txt_len": 32},
        **{"model.vision.name": "eva_clip_g", "model.vision.image_size": size, "model.vision.freeze": frozen},
        **{"model.connector.init": "bert-base-uncased", "model.connector.num_layers": 12, **tokens[arch[:6]]},
    }


def processors(dataset: str, **names: str) -> dict[str, Any]:
    return {f"datasets.{dataset}.vis_processor.{role}.name": name for role, name in names.items()}


def frames(dataset: str, *roles: str) -> dict[str, Any]:
    names = {role: f"alpro_video_{role}" for role in roles}
    counts = {f"datasets.{dataset}.vis_processor.{role}.n_frms": 4 for role in roles}
    return {**processors(dataset, **names), **counts, "model.vision.precision": "fp32"}


def new_tokens(least: int, most: int) -> dict[str, Any]:
    """What published lengths are without the start token that they count."""
    return {"run.num_beams": 5, "run.min_len": least, "run.max_len": most}


EVLGEN_OPT, VIDEO_OPT = model("evlgen_opt", 224), model("evlgen_video_opt", 224)
IMAGES = processors("coco_caption", train="blip2_image_train", eval="blip_image_eval")
OPT_PRETRAINING = {
    **{**EVLGEN_OPT, **IMAGES, **batches(200, 100), **decoding(8, 30)},
    **processors("laion115M", train="blip2_image_train"),
    "run.train_dataset_ratios": {"laion115M": 15, "ccs14M": 4, "coco_caption": 1},
    **schedule(1e-6, 1e-4, 1e-5, 5000, max_iters=250_000, iters_per_inner_epoch=5000),
}
CLIP_FINE_TUNING = {
    **{**VIDEO_OPT, **batches(4, 4), **decoding(5, 20), "run.task": "video_captioning"},
    **schedule(1e-8, 1e-5, 1e-6, 1000, max_iters=50_000, iters_per_inner_epoch=1000),
}
COCO_FINE_TUNING = {
    **{**IMAGES, **batches(16, 8), **decoding(8, 30)},
    **schedule(1e-8, 1e-5, 0, 1000, max_epoch=5),
}
BLIP2_COCO = {
    **model("blip2_opt", 364, frozen=False, prompt="a photo of"),
    "model.vision.grad_checkpoint": True,
}
ZERO_SHOT = {
    **{**EVLGEN_OPT, **batches(None, 64), **decoding(1, 10)},
    **{"run.prompt": "Question: {} Short answer:", "run.inference_method": "generate"},
    "run.length_penalty": None,
}
# ---- the paper's experiments (Jian et al., ACL 2024; BLIP-2's: Li et al., 2023, section 3.4)
ALL_PAIRS = {"laion115M": 15, "ccs14M": 4, "coco_caption": 1}
A_TENTH = {"ccs14M": 45, "coco_caption": 5}
PAPER_RUN = {
    **{**IMAGES, **batches(200, 100), **new_tokens(7, 29)},
    **schedule(1e-6, 1e-4, 1e-5, 5000, max_iters=150_000, iters_per_inner_epoch=5000),
}
OPT_PAPER = {**EVLGEN_OPT, **PAPER_RUN}
VICUNA = {
    **{**IMAGES, **batches(20, 20), **new_tokens(7, 29), "run.train_dataset_ratios": A_TENTH},
    **schedule(1e-6, 1e-4, 1e-5, 2000, max_iters=60_000, iters_per_inner_epoch=5000),
    **{"model.language.name": "lmsys/vicuna-7b-v1.3", "model.max_output_txt_len": 32},
}
VICUNA_ANSWERS = {
    **{**model("evlgen_vicuna", 224), **batches(None, 16), **new_tokens(0, 9)},
    **{"run.prompt": "Question: {} Short answer:", "run.inference_method": "generate"},
}
BLIP2_STAGE1 = (
    "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/blip2_pretrained.pth"
)
ZERO_SHOT_CAPTIONS = {**EVLGEN_OPT, **batches(None, 16), "run.task": "captioning"}
PAPER = {
    "evlgen/pretrain_104m": {**OPT_PAPER, "run.train_dataset_ratios": ALL_PAIRS},
    "evlgen/pretrain_11m": {**OPT_PAPER, "run.train_dataset_ratios": A_TENTH},
    "evlgen/pretrain_vicuna7b_clip_L": {
        **{**model("evlgen_vicuna", 224), **VICUNA, "model.vision.name": "clip_L"},
    },
    "evlgen/flickr30k_zeroshot_eval": {
        **{**ZERO_SHOT_CAPTIONS, **new_tokens(7, 29), "run.test_splits": ["test"]},
        **processors("flickr30k", eval="blip_image_eval"),
    },
    "evlgen/nocaps_zeroshot_eval": {**ZERO_SHOT_CAPTIONS, **new_tokens(9, 79), "run.test_splits": ["val"]},
    "evlgen/vqav2_zeroshot_vicuna7b_eval": {**VICUNA_ANSWERS, "run.task": "vqa", "run.test_splits": ["val"]},
    "evlgen/okvqa_zeroshot_vicuna7b_eval": {
        **{**VICUNA_ANSWERS, "run.task": "vqa", "run.test_splits": ["test"], "run.apply_lemmatizer": True},
    },
    "evlgen/gqa_zeroshot_vicuna7b_eval": {
        **{**VICUNA_ANSWERS, "run.task": "gqa", "run.test_splits": ["testdev"]},
    },
    "blip2/pretrain_vicuna7b": {
        **{**model("blip2_vicuna", 224), **VICUNA, "model.checkpoint": BLIP2_STAGE1},
    },
    "blip2/reproduce_stage1": {
        **{**batches(210, 100), "run.train_dataset_ratios": ALL_PAIRS, "run.beta2": 0.98},
        **schedule(1e-6, 1e-4, 1e-5, 2000, max_iters=250_000, iters_per_inner_epoch=5000),
        **{"model.arch": "blip2", "model.checkpoint": None},
    },
    "blip2/reproduce_stage2": {
        **{**model("blip2_opt", 224), **batches(240, 100), "run.train_dataset_ratios": ALL_PAIRS},
        **schedule(1e-6, 1e-4, 5e-5, 2000, max_iters=80_000, iters_per_inner_epoch=5000),
        **{"model.checkpoint": "output/blip2_reproduce_stage1/latest/checkpoints/latest", "run.beta2": 0.98},
    },
    "blip2/reproduce_without_stage1": {
        **{**PAPER_RUN, **model("blip2_opt", 224), "run.train_dataset_ratios": ALL_PAIRS},
        "model.checkpoint": None,
    },
    "evlgen_video/pretrain_webvid2m": {
        **{**VIDEO_OPT, **frames("webvid_2m", "train"), "run.batch_size_train": 4},
        **schedule(1e-8, 1e-5, 1e-6, 1000, max_iters=50_000, iters_per_inner_epoch=1000),
        **{"run.task": "video_text_pretrain", "run.valid_splits": []},
    },
    "evlgen_video/msrvtt_scst": {
        **{**VIDEO_OPT, **frames("msrvtt_caption", "train", "eval"), **batches(4, 4), **new_tokens(4, 19)},
        "run.task": "captioning_scst",
    },
}

LLAVA = {
    **{"model.vision.name": "vit_large_patch14_clip_quickgelu_336.openai", "model.vision.image_size": 336},
    **{"model.connector.name": "mlp", "model.language.name": "lmsys/vicuna-7b-v1.5"},
    **{"model.language.chat_template": "vicuna_v1", "model.max_sequence_len": 2048},
    **{"run.max_epoch": 1, "run.weight_decay": 0, "run.min_lr": 0},
}

EVLGEN_COCO = model("evlgen_opt", 224, prompt="a photo of")
PUBLISHED = {
    ("chat/llava15", "pretrain"): {
        **{**LLAVA, "run.init_lr": 1e-3, "run.batch_size_train": 256 // 8, "model.language.freeze": True},
    },
    ("chat/llava15", "finetune"): {
        **{**LLAVA, "run.init_lr": 2e-5, "run.batch_size_train": 128 // 8, "model.language.freeze": False},
        "run.group_by_length": True,
    },
    "evlgen/pretrain_opt2.7b": {**OPT_PRETRAINING, "model.language.name": "facebook/opt-2.7b"},
    "evlgen/pretrain_opt6.7b": {**OPT_PRETRAINING, "model.language.name": "facebook/opt-6.7b"},
    "evlgen/pretrain_vicuna7b": {
        **{**model("evlgen_vicuna", 224), **IMAGES, **batches(20, 20), **decoding(8, 30)},
        **{"model.language.name": "lmsys/vicuna-7b-v1.3", "model.max_output_txt_len": 32},
        "run.train_dataset_ratios": {"ccs14M": 45, "coco_caption": 5},
        **schedule(1e-6, 1e-4, 1e-5, 2000, max_iters=60_000, iters_per_inner_epoch=5000),
    },
    "evlgen_video/msrvtt_ft": {**CLIP_FINE_TUNING, **frames("msrvtt_caption", "train", "eval")},
    "evlgen_video/msvd_ft": {**CLIP_FINE_TUNING, **frames("msvd_caption", "train", "eval")},
    "evlgen_video/vatex_ft": {**CLIP_FINE_TUNING, **frames("vatex_caption", "train", "eval")},
    "evlgen_video/msrvtt_eval": {
        **{**VIDEO_OPT, **batches(None, 4), **decoding(5, 20), **frames("msrvtt_caption", "eval")},
        "run.test_splits": ["test"],
    },
    "evlgen_video/msrvtt_qa_eval": {
        **{**VIDEO_OPT, **batches(None, 4), **decoding(1, 10), **frames("msrvtt_qa", "eval")},
        **{"run.task": "video_qa", "run.test_splits": ["test"]},
    },
    "evlgen/coco_ft": {**EVLGEN_COCO, **COCO_FINE_TUNING},
    "evlgen/coco_eval": {**EVLGEN_COCO, **batches(None, 8), **decoding(8, 30), "run.test_splits": ["test"]},
    "evlgen/nocaps_eval": {
        **EVLGEN_COCO,
        **batches(None, 16),
        **decoding(10, 80),
        "run.test_splits": ["val"],
    },
    "evlgen/vqav2_zeroshot_eval": {**ZERO_SHOT, "run.task": "vqa", "run.test_splits": ["val"]},
    "evlgen/okvqa_zeroshot_eval": {
        **{**ZERO_SHOT, "run.task": "vqa", "run.test_splits": ["test"]},
        "run.apply_lemmatizer": True,
    },
    "evlgen/gqa_zeroshot_eval": {**ZERO_SHOT, "run.task": "gqa", "run.test_splits": ["testdev"]},
    "blip2/caption_coco_ft": {**BLIP2_COCO, **COCO_FINE_TUNING},
    "blip2/caption_coco_eval": {**BLIP2_COCO, **batches(None, 16), **decoding(8, 30)},
    "blip2/pretrain_stage1": {
        **{**IMAGES, **batches(100, 64), "model.vision.image_size": 224},
        **schedule(1e-6, 1e-4, 1e-5, 5000, max_epoch=10),
    },
    "blip2/pretrain_stage2": {
        **{**model("blip2_opt", 224), **IMAGES, **batches(64, 64)},
        **schedule(1e-6, 1e-4, 1e-5, 2000, max_epoch=10),
    },
}


PUBLISHED.update(PAPER)


@pytest.mark.parametrize("project", PUBLISHED)
def test_a_project_has_the_published_settings(project):
    name, stage = project if isinstance(project, tuple) else (project, None)
    cfg = Config.load(f"projects/{name}.yaml", stage=stage)
    found = OmegaConf.create(cfg.to_dict())
    wanted = PUBLISHED[project]
    assert {key: plain(OmegaConf.select(found, key)) for key in wanted} == wanted


def plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def test_every_project_of_a_published_setting_is_in_the_table():
    own = {"evlgen/own_images", "chat/flickr8k_daquar_lite"}
    own |= {"chat/tomeformer"}  # our connector in a published recipe
    named = {p.removeprefix("projects/").removesuffix(".yaml") for p in PROJECTS}
    published = {project[0] if isinstance(project, tuple) else project for project in PUBLISHED}
    assert {name for name in named if "shapes" not in name and "photos" not in name} == published | own


@pytest.mark.parametrize(("arch", "model_type"), TYPES)
def test_a_model_type_names_itself_and_its_parts(arch, model_type):
    cfg = load_model_config(arch, model_type)
    assert (cfg.arch, cfg.model_type) == (arch, model_type)
    assert cfg.vision.name and cfg.connector.name


def test_every_file_of_model_types_belongs_to_an_architecture():
    files = {p.relative_to(PACKAGE_ROOT).as_posix() for p in PACKAGE_ROOT.glob("configs/models/*/*.yaml")}
    listed = {path for arch, t in TYPES for path in [registry.get_model_class(arch).MODEL_TYPES[t]]}
    assert files == listed


@pytest.mark.parametrize("project", PROJECTS)
def test_a_project_file_is_read_without_a_complaint(project, caplog):
    assert all(cfg.datasets for cfg in load_stages(project))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("project", [p for p in PROJECTS if "evlgen_video/" in p and "eval" not in p])
def test_video_projects_of_evlgen_do_not_augment(project):
    for dataset in Config.load(project).datasets.values():
        assert dataset.vis_processor.train.augment == "none"
