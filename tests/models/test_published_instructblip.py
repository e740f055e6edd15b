"""The 50 evaluation files of InstructBLIP in salesforce/LAVIS, lavis/projects/instructblip: each is read, or
names the one reason why not. They are written out here from what they say, which differs little."""

from __future__ import annotations

import logging

import pytest
import yaml

from evlgen.common.errors import ConfigError
from evlgen.config.config import Config

WEIGHTS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/InstructBLIP/"
CHECKPOINTS = {
    "vicuna7b": "instruct_blip_vicuna7b_trimmed.pth",
    "vicuna13b": "instruct_blip_vicuna13b_trimmed.pth",
    "flant5xl": "instruct_blip_flanxl_trimmed.pth",
    "flant5xxl": "instruct_blip_flanxxl_trimmed.pth",
}
T5, VICUNA = ("flant5xl", "flant5xxl"), ("vicuna7b", "vicuna13b")
QUESTION = "Question: {} Short Answer:"
LAVIS_RUN = {"lr_sched": "linear_warmup_cosine_lr", "init_lr": 1e-5, "min_lr": 0, "warmup_lr": 1e-8}
LAVIS_RUN |= {"warmup_steps": 1000, "weight_decay": 0.05, "max_epoch": 1, "num_workers": 8, "seed": 42}
LAVIS_RUN |= {
    "batch_size_train": 16,
    "batch_size_eval": 1,
    "accum_grad_iters": 1,
    "num_beams": 5,
    "amp": True,
}
LAVIS_RUN |= {"resume_ckpt_path": None, "evaluate": True, "device": "cuda", "world_size": 1, "val_freq": 1}
LAVIS_RUN |= {"dist_url": "env://", "distributed": True, "save_freq": -1, "output_dir": "output/instructblip"}


def clip(**sizes):
    roles = {"train": "clip_image_train", "eval": "clip_image_eval"}
    return {role: {"name": name, **sizes} for role, name in roles.items()}


def alpro(**more):
    keys = {"n_frms": 4, "image_size": 224, "min_scale": 0.9, "max_scale": 1.0, **more}
    return {role: {"name": f"alpro_video_{role}", **keys} for role in ("train", "eval")}


def dataset(name, visual, splits, media="images", text="blip_caption", data_type=None, **info):
    roles = visual if len(visual) == 1 else ("train", "eval")
    section = {
        "vis_processor": visual,
        "build_info": {"annotations": {}, media: {"storage": f"/share/{name}"}},
    }
    section["text_processor"] = {r: {"name": text if r == "train" else "blip_caption"} for r in roles}
    for split in splits:
        where = {"url": f"https://data/{name}_{split}.json", "storage": f"{name}/{split}.json"}
        section["build_info"]["annotations"][split] = where
    section["build_info"] |= info
    return {name: section if data_type is None else {"data_type": data_type, **section}}


def videos(name, **more):
    return dataset(name, alpro(**more), ("train", "val", "test"), "videos", "blip_question")


def video_questions(name):
    splits = ("train", "val", "test", "ans2label")
    info = {"instance_id_key": "question_id"}
    return dataset(name, alpro(), splits, "videos", "blip_question", **info)


CAPTIONS = {"task": "captioning", "max_len": 80, "min_len": 10, "length_penalty": 1.0}
CAPTIONS |= {"inference_method": "generate"}
ANSWERS = {"max_len": 10, "min_len": 1, "length_penalty": -1.0, "inference_method": "generate"}
ASKED = {"prompt": "describe the video"}  # in `run`, which LAVIS does not read in captioning
FILES_OF_ANSWERS = {key: {"test": f"/gt/{key}.json"} for key in ("ques_files", "anno_files")}
ALL = ("train", "val", "test")
COCO = dataset("coco_caption", clip(image_size=224), ALL, data_type="images")
NOCAPS = dataset("nocaps", {"eval": {"name": "blip_image_eval", "image_size": 224}}, ("val", "test"))
MSRVTT = videos("msrvtt_caption", full_video=True)
OK_VQA = dataset("ok_vqa", clip(), ("train", "test"), text="blip_question")
GROUND_TRUTH = {"annotation_file": "/gt/annotations.json"}

# kind of file -> the model's prompt, datasets, and what its `run` says
KINDS = {
    "caption_coco_{}_eval_val": ("A short image caption.", COCO, {**CAPTIONS, "valid_splits": ["val"]}),
    "caption_coco_{}_eval_test": ("A short image caption.", COCO, {**CAPTIONS, "valid_splits": ["test"]}),
    "caption_nocaps_out_domain_{}_eval": (
        "A short image caption.",
        NOCAPS,
        {**CAPTIONS, **GROUND_TRUTH, "valid_splits": ["val"], "img_ids": [2, 4, 5]},
    ),
    "caption_msrvtt_{}_eval_val": (
        "a short description",
        MSRVTT,
        {**CAPTIONS, **GROUND_TRUTH, "valid_splits": ["val"]},
    ),
    "caption_msrvtt_{}_eval_test": (
        "a short description",
        MSRVTT,
        {**CAPTIONS, **GROUND_TRUTH, **ASKED, "valid_splits": ["test"]},
    ),
    "caption_msvd_{}_eval": (
        "a short description",
        videos("msvd_caption"),
        {**CAPTIONS, **GROUND_TRUTH, **ASKED, "valid_splits": ["test"], "img_ids": ["a_1_20.avi"]},
    ),
    "caption_vatex_{}_eval": (
        "a short description",
        videos("vatex_caption", full_video=True),
        {**CAPTIONS, **ASKED, "valid_splits": ["val"]},
    ),
    "qa_msrvtt_{}_eval_test": (
        QUESTION,
        video_questions("msrvtt_qa_instruct"),
        {**ANSWERS, "task": "gqa", "valid_splits": ["test"]},
    ),
    "qa_msvd_{}_eval": (
        QUESTION,
        video_questions("msvd_qa_instruct"),
        {
            **ANSWERS,
            **FILES_OF_ANSWERS,
            "task": "gqa",
            "max_len": 30,
            "prompt": QUESTION,
            "valid_splits": ["test"],
        },
    ),
    "qa_okvqa_{}_eval": (QUESTION, OK_VQA, {**ANSWERS, "task": "vqa", "valid_splits": ["test"]}),
}
SNLI = dataset("snli_ve_instruct", clip(image_size=224), ALL, data_type="images")
CLOUDS = dataset("modelnet40_cls", clip(image_size=224), ("train", "val"), data_type=["images", "pc"])
CLASSES = {"task": "multimodal_classification", "max_len": 30, "min_len": 1, "valid_splits": ["val"]}
REFUSED = {
    **dict.fromkeys(
        [
            *(f"classification_snlive_{name}" for name in (*T5, "vicuna13b", "vicuna13b_test")),
            *(f"classification_snlive_vicuna7b_{split}" for split in ("val", "test")),
        ],
        ("", SNLI, {**CLASSES, "length_penalty": -1.0}),
    ),
    **dict.fromkeys(
        [f"{kind}_modelnet40_{name}" for kind in ("classification", "completion") for name in VICUNA],
        ("describe the 3d model.", CLOUDS, CLASSES),
    ),
}


def written(folder, name, model_type, prompt, datasets, run):
    arch = "blip2_t5_instruct" if model_type in T5 else "blip2_vicuna_instruct"
    model = {"arch": arch, "model_type": model_type, "load_pretrained": True, "prompt": prompt}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"model": model, "datasets": datasets, "run": {**LAVIS_RUN, **run}}))
    return path


def test_there_are_fifty():
    assert len(KINDS) * len(CHECKPOINTS) + len(REFUSED) == 50


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_file_is_read_as_lavis_reads_it(kind, tmp_path, caplog):
    prompt, datasets, run = KINDS[kind]
    for model_type, checkpoint in CHECKPOINTS.items():
        config = Config.load(written(tmp_path, kind.format(model_type), model_type, prompt, datasets, run))
        model, is_t5 = config.model, model_type in T5
        assert model.arch == ("blip2_t5_instruct" if is_t5 else "blip2_vicuna_instruct")
        assert (model.checkpoint, model.prompt) == (f"{WEIGHTS}{checkpoint}", prompt)
        of_videos = "images" not in next(iter(datasets.values()))["build_info"]
        assert (model.vision.temporal and model.vision.temporal.form) == ("each" if of_videos else None)
        assert list(config.datasets) == list(datasets)
        if run["task"] == "captioning":
            lengths = (80 if is_t5 else 79, 9)
            assert config.run.prompt is None, "LAVIS asks for captions by the model's prompt"
        else:
            lengths = (run["max_len"] - (not is_t5), 0)
            assert config.run.prompt == run.get("prompt")
        assert (config.run.max_len, config.run.min_len) == lengths
        assert (config.run.task, config.run.num_beams) == (run["task"], 5)
        assert config.run.test_splits == run["valid_splits"] and config.run.evaluate
    if "qa_ms" in kind:
        (section,) = config.datasets.values()
        assert section.builder == kind[3:].partition("_")[0] + "_qa"
    assert all(record.levelno <= logging.WARNING for record in caplog.records)


def test_a_file_that_asks_for_what_is_not_here_names_the_one_reason(tmp_path):
    for name, (prompt, datasets, run) in REFUSED.items():
        model_type = next(model_type for model_type in CHECKPOINTS if f"_{model_type}" in name)
        with pytest.raises(ConfigError, match="multimodal_classification") as error:
            Config.load(written(tmp_path, name, model_type, prompt, datasets, run))
        assert "\n" not in str(error.value) and str(error.value).startswith("run.task")
