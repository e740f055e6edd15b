"""Project files in the layout of LAVIS (salesforce/LAVIS) and EVLGen (yiren-jian/EVLGen), in this project's
words.

Their ``model`` section is flat, their architectures and types have other names, and which checkpoint is
loaded follows from two switches and two paths. Each layer is translated by itself, so that the order of
layers stays what it is; where a layer gives a setting in both ways, this project's key wins.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urljoin

from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.config.layers import OPTIONS, Layer, builder_name
from evlgen.config.model_config import ModelConfig
from evlgen.config.run_config import ANSWER_LEN, CAPTION_LEN, RunConfig
from evlgen.config.schema import parameters_of, show

logger = logging.getLogger(__name__)

# lavis/models/__init__.py and the models' registrations in both repositories
ARCHITECTURES = {
    "liptome_opt": "evlgen_opt",
    "liptome_vicuna": "evlgen_vicuna",
    "liptome_video_opt": "evlgen_video_opt",
    "liptome_video_vicuna": "evlgen_video_vicuna",
    "blip2_feature_extractor": "blip2",
}
_LIPTOME = tuple(published for published in ARCHITECTURES if published.startswith("liptome_"))
_VIDEO = ("liptome_video_opt", "liptome_video_vicuna")
_TOMEFORMERS = tuple(ARCHITECTURES[published] for published in _LIPTOME)
# InstructBLIP, and what it is with ``qformer_text_input: false``
_INSTRUCT = {"blip2_vicuna_instruct": "blip2_vicuna", "blip2_t5_instruct": "blip2_t5"}

# (own architecture, published type) -> own type, and the flat keys it stands for
_TYPES: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("blip2_vicuna", "vicuna7b"): ("pretrain_vicuna7b", {}),
    ("blip2_vicuna", "vicuna13b"): ("pretrain_vicuna13b", {}),
    ("blip2_t5", "flant5xl"): ("pretrain_flant5xl", {}),
    ("blip2_t5", "flant5xxl"): ("pretrain_flant5xxl", {}),
    ("blip2_t5", "pretrain_flant5xl_vitL"): ("pretrain_flant5xl", {"vit_model": "clip_L"}),
    ("blip2", "pretrain_vitL"): ("pretrain", {"vit_model": "clip_L"}),
    ("blip2", "coco"): (
        "pretrain",
        {"image_size": 364, "vit_precision": "fp32", "freeze_vit": False, "use_grad_checkpoint": True},
    ),
}

# flat key of the model section -> section and key
_MODEL_KEYS = {
    "vit_model": ("vision", "name"),
    "image_size": ("vision", "image_size"),
    "vit_precision": ("vision", "precision"),
    "freeze_vit": ("vision", "freeze"),
    "use_grad_checkpoint": ("vision", "grad_checkpoint"),
    "drop_path_rate": ("vision", "drop_path_rate"),
    "num_layers": ("connector", "num_layers"),
    "tome_r": ("connector", "r"),
    "num_query_token": ("connector", "num_query_token"),
    "cross_attention_freq": ("connector", "cross_attention_freq"),
    "opt_model": ("language", "name"),
    "llm_model": ("language", "name"),
    "t5_model": ("language", "name"),
}
_SWITCHES = ("load_finetuned", "load_pretrained")
_PATHS = ("finetuned", "pretrained")
# EVLGen reads `alpha` nowhere, and `embed_dim` only for the loss that `beta` weighs, which evaluates nothing.
_MODEL_IGNORED = ("alpha", "embed_dim", "beta", "qformer_text_input")
_LEMMATIZER = "apply_lemmatizer"

_WEIGHTS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"
# What the finetuned and the pretrained path are where a type's own YAML in LAVIS names them
# (lavis/configs/models/blip2/): file names below _WEIGHTS.
_TYPE_FILES: dict[tuple[str, str], tuple[str, str]] = {
    ("blip2", "pretrain"): ("", "blip2_pretrained.pth"),
    ("blip2", "pretrain_vitL"): ("", "blip2_pretrained_vitL.pth"),
    ("blip2", "coco"): ("blip2_finetune_coco.pth", "blip2_pretrained.pth"),
    ("blip2_opt", "pretrain_opt2.7b"): ("", "blip2_pretrained_opt2.7b.pth"),
    ("blip2_opt", "pretrain_opt6.7b"): ("", "blip2_pretrained_opt6.7b.pth"),
    ("blip2_opt", "caption_coco_opt2.7b"): ("blip2_caption_opt2.7b.pth", "blip2_pretrained_opt2.7b.pth"),
    ("blip2_opt", "caption_coco_opt6.7b"): ("blip2_caption_opt6.7b.pth", "blip2_pretrained_opt6.7b.pth"),
    ("blip2_t5", "pretrain_flant5xl"): ("", "blip2_pretrained_flant5xl.pth"),
    ("blip2_t5", "pretrain_flant5xl_vitL"): ("", "blip2_pretrained_flant5xl_vitL.pth"),
    ("blip2_t5", "pretrain_flant5xxl"): ("", "blip2_pretrained_flant5xxl.pth"),
    **{
        (arch, kind): ("", f"../InstructBLIP/instruct_blip_{name}_trimmed.pth")
        for arch, kind, name in (
            ("blip2_vicuna_instruct", "vicuna7b", "vicuna7b"),
            ("blip2_vicuna_instruct", "vicuna13b", "vicuna13b"),
            ("blip2_t5_instruct", "flant5xl", "flanxl"),
            ("blip2_t5_instruct", "flant5xxl", "flanxxl"),
        )
    },
    ("blip2_t5", "caption_coco_flant5xl"): ("blip2_caption_flant5xl.pth", "blip2_pretrained_flant5xl.pth"),
}
_tables: tuple[dict[tuple[str, str], Any], ...] = (_TYPES, _TYPE_FILES)
for _table in _tables:  # the first stage, used for matching alone
    _first_stage = {kind: entry for (arch, kind), entry in _table.items() if arch == "blip2"}
    _table.update({("blip2_image_text_matching", kind): entry for kind, entry in _first_stage.items()})

_RUN_NAMES = {"resume_ckpt_path": "resume", "warmup_start_lr": "warmup_lr", "val_freq": "valid_freq"}
# Of the device and the processes, which the launcher decides here; of files and records, which the dataset
# knows; and of ways to evaluate and save that there are not.
_RUN_IGNORED = (
    *("device", "distributed", "dist_url", "dist_backend", "world_size", "gpu", "rank"),
    *("use_dist_eval_sampler", "find_unused_parameters"),
    *("annotation_file", "img_ids", "sample_id_key", "caption_key", "load_gt_from_file", "split"),
    *("ques_files", "anno_files", "top_p", "temperature", "save_freq", "save_last", "milestone", "prefix"),
)
_CAPTION_TASKS = ("captioning", "video_captioning")
_ANSWER_TASKS = ("vqa", "gqa", "aok_vqa", "video_qa")
_GQA_TESTDEV = "balanced_testdev"
_DATASET_IGNORED = ("type", "data_dir")
_UNREAD = "instance_id_key"  # of `build_info`: nothing in LAVIS reads it
# The same questions; the builders differ in what their samples call an answer (lavis/datasets/builders).
_DATASETS = {"msrvtt_qa_instruct": "msrvtt_qa", "msvd_qa_instruct": "msvd_qa"}
# Of ALPRO's processors: `full_video: false` cuts at times that these datasets do not have, and in evaluation
# no part is cut out (lavis/processors/alpro_processors.py).
_VIDEO_IGNORED = {"train": ("full_video",), "eval": ("full_video", "min_scale", "max_scale")}
IGNORED_SECTIONS = ("preprocess",)  # in the YAML of LAVIS's model types: what load_preprocess gives
_RUN_FIELDS = {field.name: field.default for field in dataclasses.fields(RunConfig)}
_RUN_INTS = {field.name for field in dataclasses.fields(RunConfig) if "int" in str(field.type).lower()}
_RUN_INTS |= {theirs for theirs, ours in _RUN_NAMES.items() if ours in _RUN_INTS}
# Tasks that train and score nothing.
_ONLY_TRAIN = ("image_text_pretrain", "video_text_pretrain")
_DEFAULTS = "LAVIS's defaults"  # what messages call what a published file leaves out


def own_names(arch: str, model_type: str | None) -> tuple[str, str | None]:
    """A published architecture's and type's name -> this project's; others stay."""
    arch = ARCHITECTURES.get(arch, arch) if isinstance(arch, str) else arch
    own_type, _ = _type_of(arch, model_type)
    return arch, own_type


def from_published(layers: Sequence[Layer], is_project: bool = True) -> tuple[list[Layer], list[str]]:
    """Layers of a project (the weakest first) with the published keys of ``model`` in this project's words.

    To be called once plugins are loaded: a key that the architecture itself declares is its own.

    A file in their words (`has_published_file`) also means their defaults where it says nothing: they are the
    first of the layers returned.

    Args:
        layers: the weakest first.
        is_project: false for the section of a model alone, which trains nothing.

    Returns:
        The layers, and the paths of keys that mean nothing here and were left out.

    Raises:
        ConfigError: ``load_finetuned`` or ``load_pretrained`` is neither true nor false; or what is described
            is computed in another way than here: a contrastive loss (``beta``).
    """
    arch, model_type = (_strongest(layers, key)[0] for key in ("arch", "model_type"))
    task, _ = _strongest(layers, "task", "run")
    own_arch = own_names(arch, None)[0]
    reads_alone = _strongest(layers, "qformer_text_input")[0] is False
    if reads_alone and isinstance(own_arch, str) and own_arch in _INSTRUCT:
        own_arch = _INSTRUCT[own_arch]
    own_keys = _own_keys(own_arch)
    met = [*_check_beta(layers, own_keys, is_project), *_check_instruction(layers, own_arch, own_keys)]
    translation = _Translation(own_arch, own_keys, _Weights(own_arch, model_type), met, _of_videos(layers))
    published = has_published_file(layers, own_keys)
    defaults = _defaults(layers, arch) if published else {}
    out = [Layer(_DEFAULTS, defaults)] if defaults else []
    for layer in layers:
        content = {key: value for key, value in layer.content.items() if key not in IGNORED_SECTIONS}
        translation.ignored += [key for key in layer.content if key in IGNORED_SECTIONS]
        if isinstance(content.get("model"), Mapping):
            content = _lemmatizer_to_run(content, own_keys)
            content["model"] = translation.section(content["model"], layer.source)
        if published and isinstance(content.get("run"), Mapping):
            content["run"] = _whole_numbers(content["run"])
            if _is_published(layer, own_keys):
                content["run"], ignored = _run_of_a_file(content["run"], layers)
                translation.ignored += ignored
                content["run"] = _with_new_tokens(content["run"], own_arch, task, layer.source)
        out.append(dataclasses.replace(layer, content=content))
    return out, list(dict.fromkeys(translation.ignored))


def has_published_file(layers: Sequence[Layer], own_keys: Collection[str] = ()) -> bool:
    """Whether a file among the layers says anything in the published words: an architecture's name, a flat
    key of ``model``, or a key of ``run`` that this project does not have. One that names an architecture
    which is only here is not published.

    Args:
        own_keys: flat keys that the architecture itself declares.
    """
    return any(_is_published(layer, own_keys) for layer in layers)


def _is_published(layer: Layer, own_keys: Collection[str]) -> bool:
    sections = (layer.content.get(name) for name in ("model", "run"))
    model, run = (section if isinstance(section, Mapping) else {} for section in sections)
    arch = str(model.get("arch"))
    if layer.source == OPTIONS or arch.startswith("evlgen_") or arch == "blip2_vicuna":
        return False
    flat = {*_MODEL_KEYS, *_SWITCHES, *_PATHS, *_MODEL_IGNORED, _LEMMATIZER} - set(own_keys)
    words = {*_RUN_IGNORED, *_RUN_NAMES, "amp"} - set(_RUN_FIELDS)
    return bool(flat & set(model) or words & set(run)) or arch in ARCHITECTURES


def _whole_numbers(section: Mapping[str, Any]) -> dict[str, Any]:
    """``max_iters: 2e4`` is 20,000: LAVIS's runners make an int of what they are given."""
    return {
        key: int(value) if key in _RUN_INTS and isinstance(value, float) and value.is_integer() else value
        for key, value in section.items()
    }


def _run_of_a_file(section: Mapping[str, Any], layers: Sequence[Layer]) -> tuple[dict[str, Any], list[str]]:
    """A published file's ``run`` section as its runner reads it, and the paths of keys it does not read.

    An empty key is one that is left out. Of ``max_iters`` and ``max_epoch`` in one file the runner counts
    one: ``runner_iter`` the former, ``runner_base``, which is the default, the latter. To evaluate means on
    ``valid_splits`` too (lavis/runners/runner_base.py).
    """
    out = {
        key: value
        for key, value in section.items()
        if value is not None or (key != "amp" and _RUN_FIELDS.get(_RUN_NAMES.get(key, key)) is None)
    }
    ignored = []
    if _strongest(layers, "task", "run")[0] in _CAPTION_TASKS and out.pop("prompt", None) is not None:
        ignored.append("run.prompt")  # captions are asked for by the model's own (lavis/tasks/captioning.py)
    if out.get("max_iters") is not None and out.get("max_epoch") is not None:
        by_iterations = _strongest(layers, "runner", "run")[0] == "runner_iter"
        unread = ("max_epoch",) if by_iterations else ("max_iters", "iters_per_inner_epoch")
        ignored = [f"run.{key}" for key in unread if out.pop(key, None) is not None]
    valid, test = (out.get(key) for key in ("valid_splits", "test_splits"))
    if _strongest(layers, "evaluate", "run")[0] is True and isinstance(valid, list):
        if isinstance(test, list | None):
            out["test_splits"] = list(dict.fromkeys([*valid, *(test or [])]))
    return out, ignored


def _defaults(layers: Sequence[Layer], arch: Any) -> dict[str, Any]:
    """What published code takes where a file leaves a key out and that is not this project's own default.

    LAVIS's captions: repetition penalty 1.15, length penalty 0, which EVLGen's task does not set
    (lavis/tasks/captioning.py of both); three beams for answers (lavis/tasks/vqa.py); no validation; training
    without mixed precision; a warm-up that starts at ``init_lr`` (lavis/common/optims.py); retrieval that is
    only evaluated reads 35 tokens of a text.
    """

    def given(*keys: str) -> bool:
        return any(_strongest(layers, key, "run")[0] is not None for key in keys)

    model = {}
    if arch in _LIPTOME and arch.endswith("_vicuna"):
        model = {"max_txt_len": 128, "max_output_txt_len": 256}  # lavis/models/blip2_models/liptome_vicuna.py
    if not any(layer.content.get("run") for layer in layers):
        return {"model": model} if model else {}
    run: dict[str, Any] = {"valid_splits": []}
    task = _strongest(layers, "task", "run")[0]
    if task == "captioning" and arch not in _LIPTOME:
        run.update(repetition_penalty=1.15, length_penalty=0.0)
    elif task in ("vqa", "gqa", "aok_vqa"):
        run["num_beams"] = 3
    elif task == "retrieval" and _strongest(layers, "evaluate", "run")[0] is True:
        model["max_txt_len"] = 35  # lavis/models/blip2_models/blip2.py, compute_sim_matrix
    if _strongest(layers, "evaluate", "run")[0] is not True and not given("amp", "precision"):
        run["precision"] = "fp32"
    if given("init_lr") and not given("warmup_lr", "warmup_start_lr"):
        run["warmup_lr"] = "${run.init_lr}"
    return {"run": run, **({"model": model} if model else {})}


def run_from_lavis(section: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A ``run`` section with LAVIS's own keys in this project's words, and those that mean nothing here.

    ``amp: true`` is ``precision: auto`` and ``amp: false`` is ``fp32``, unless ``precision`` is given too.
    Of a task that only trains, no ``valid_splits`` means none.
    """
    ignored = [key for key in section if key in _RUN_IGNORED and key not in _RUN_FIELDS]
    out = {key: value for key, value in section.items() if key not in ignored}
    if isinstance(out.get("amp"), bool):
        precision = "auto" if out.pop("amp") else "fp32"
        out.setdefault("precision", precision)
    for theirs, ours in _RUN_NAMES.items():
        if theirs in out and theirs not in _RUN_FIELDS:
            value = out.pop(theirs)
            out.setdefault(ours, value)
    if out.get("lr_layer_decay") == 1:  # of 1 there is none, as in every published project
        del out["lr_layer_decay"]
    if out.get("task") in _ONLY_TRAIN:
        out.setdefault("valid_splits", [])
    return out, ignored


def datasets_from_lavis(section: Any, arch: Any = None) -> tuple[Any, list[str]]:
    """A ``datasets`` section without LAVIS's keys that mean nothing to its builders, and their paths.

    Args:
        section: the section.
        arch: the architecture as the project names it: EVLGen's processors of video do not augment.
    """
    if not isinstance(section, Mapping):
        return section, []
    out, ignored = dict(section), list[str]()
    for name, dataset in section.items():
        builder = builder_name(name, dataset)
        if builder in _DATASETS and builder not in registry.list_datasets() and isinstance(dataset, Mapping):
            builder = _DATASETS[builder]
            dataset = out[name] = {**dataset, "builder": builder}
        if builder not in registry.list_datasets() or not isinstance(dataset, Mapping):
            continue
        if builder == "gqa" and dataset.get("type") == _GQA_TESTDEV:
            dataset = _with_testdev_as_val(dataset)
        if arch in _LIPTOME:
            dataset = out[name] = _without_augmentation(dataset)
        out[name], without_effect = _without_unread_keys(dataset)
        dataset, ignored = out[name], [*ignored, *(f"datasets.{name}.{key}" for key in without_effect)]
        parameters = parameters_of(registry.get_builder_class(builder))
        left_out = [key for key in _DATASET_IGNORED if key in dataset and key not in parameters]
        if left_out and not parameters.any_key:
            out[name] = {key: value for key, value in dataset.items() if key not in left_out}
            ignored += [f"datasets.{name}.{key}" for key in left_out]
    return out, ignored


def _with_testdev_as_val(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """GQA's section of a type whose ``val`` is the testdev set (lavis/configs/datasets/gqa)."""
    info = dataset.get("build_info") or {}
    annotations = info.get("annotations") or {}
    if "testdev" not in annotations:
        return dict(dataset)
    annotations = {**annotations, "val": annotations["testdev"]}
    return {**dataset, "build_info": {**info, "annotations": annotations}}


def _without_augmentation(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """A dataset's section as EVLGen's lavis/processors/alpro_processors.py reads it."""
    visual: Any = dataset.get("vis_processor")
    train = visual.get("train") if isinstance(visual, Mapping) else None
    if not isinstance(train, Mapping) or train.get("name") != "alpro_video_train":
        return dict(dataset)
    return {**dataset, "vis_processor": {**visual, "train": {"augment": "none", **train}}}


def _without_unread_keys(dataset: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A dataset's section without keys inside it that LAVIS's code does not read, and their paths in it."""
    dataset, ignored = dict(dataset), []
    info = dataset.get("build_info")
    if isinstance(info, Mapping) and _UNREAD in info:
        dataset["build_info"] = {key: value for key, value in info.items() if key != _UNREAD}
        ignored.append(f"build_info.{_UNREAD}")
    visual = dataset.get("vis_processor")
    if not isinstance(visual, Mapping):
        return dataset, ignored
    out = dict(visual)
    for role, keys in _VIDEO_IGNORED.items():
        section = visual.get(role)
        if isinstance(section, Mapping) and section.get("name") == f"alpro_video_{role}":
            out[role] = {key: value for key, value in section.items() if key not in keys}
            ignored += [f"vis_processor.{role}.{key}" for key in keys if key in section]
    return {**dataset, "vis_processor": out}, ignored


@dataclasses.dataclass
class _Translation:
    """Of the ``model`` sections of a project's layers, in their order."""

    arch: Any
    own_keys: Collection[str]
    weights: _Weights
    met: Collection[str]  # keys that say what is so here anyway
    of_videos: bool
    ignored: list[str] = dataclasses.field(default_factory=list)

    def section(self, section: Mapping[str, Any], source: str) -> dict[str, Any]:
        """One layer's section."""
        out, implied = self._names(section)
        for key in self.met:
            out.pop(key, None)
        # EVLGen's models do not read the last one; a TomeFormer has no cross-attention
        without_effect = (*_MODEL_IGNORED, *(["cross_attention_freq"] if self.arch in _TOMEFORMERS else []))
        for key in without_effect:
            if key in out and key not in self.own_keys:
                del out[key]
                self.ignored.append(f"model.{key}")
        self._checkpoint(out, implied, source)
        for key, path in _MODEL_KEYS.items():
            if key in out and key not in self.own_keys:
                implied[key] = out.pop(key)
            if key in implied:
                _put(out, path, implied[key])
        return out

    def _names(self, section: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The section with this project's ``arch`` and ``model_type``, and flat keys the published ones stand
        for."""
        out = dict(section)
        implied: dict[str, Any] = {}
        if section.get("arch") in _VIDEO:
            _put(out, ("vision", "temporal", "form"), "residual")  # what the published code computes
        if self.of_videos and str(section.get("arch")) in _INSTRUCT:
            _put(out, ("vision", "temporal", "form"), "each")  # likewise
        if "arch" in out:
            own = own_names(out["arch"], None)[0]
            out["arch"] = self.arch if isinstance(own, str) and own in _INSTRUCT else own
        if "model_type" in out:
            out["model_type"], implied = _type_of(self.arch, out["model_type"])
        return out, dict(implied)

    def _checkpoint(self, out: dict[str, Any], implied: Mapping[str, Any], source: str) -> None:
        given = {
            key: out.pop(key) for key in (*_SWITCHES, *_PATHS) if key in out and key not in self.own_keys
        }
        for key in _SWITCHES:
            if not isinstance(given.get(key, True), bool):
                raise ConfigError(f"model.{key} ({source}): must be true or false, not {show(given[key])}.")
        self.weights.update(given)
        if given or implied:
            out.setdefault("checkpoint", self.weights.chosen())


class _Weights:
    """Which checkpoint a published config loads: the finetuned one, else the pretrained one
    (lavis/models/base_model.py, load_checkpoint_from_config), from the switches and paths of all layers so
    far."""

    def __init__(self, arch: Any, model_type: Any) -> None:
        are_names = isinstance(arch, str) and isinstance(model_type, str)
        names = _TYPE_FILES.get((arch, model_type), ("", "")) if are_names else ("", "")
        urls = [urljoin(_WEIGHTS, name) if name else None for name in names]
        self._values = {**dict.fromkeys(_SWITCHES, True), **dict(zip(_PATHS, urls, strict=True))}

    def update(self, given: Mapping[str, Any]) -> None:
        self._values.update(given)

    def chosen(self) -> Any:
        """A path or address; None where nothing is loaded."""
        for switch, path in zip(_SWITCHES, _PATHS, strict=True):
            if self._values[switch] and self._values[path] not in (None, ""):
                return self._values[path]
        return None


def _type_of(arch: Any, model_type: Any) -> tuple[Any, dict[str, Any]]:
    """A type's name here, and the flat keys it stands for. A type that the architecture has is its own."""
    if not isinstance(arch, str) or not isinstance(model_type, str):
        return model_type, {}
    own_type, implied = _TYPES.get((arch, model_type), (model_type, {}))
    if own_type != model_type and arch in registry.list_models():
        if model_type in registry.get_model_class(arch).MODEL_TYPES:
            return model_type, {}
    return own_type, implied


def _check_beta(layers: Sequence[Layer], own_keys: Collection[str], is_project: bool) -> list[str]:
    """Raises `ConfigError` where training with ``beta`` adds EVLGen's contrastive loss (lavis/models/
    blip2_models/liptome_opt.py), 0 in its published projects. Returns the key where it says what is so
    here anyway."""
    beta, source = _strongest(layers, "beta")
    if "beta" in own_keys or source is None:
        return []
    is_number = isinstance(beta, int | float) and not isinstance(beta, bool)
    if is_number and beta == 0:
        return ["beta"]
    if is_project and not _strongest(layers, "evaluate", "run")[0]:
        if is_number:
            what = f"{show(beta)} would add a contrastive loss, which is not implemented here"
        else:
            what = "is empty" if beta is None else f"must be a number, not {show(beta)}"
        raise ConfigError(f"model.beta ({source}): {what}. Set it to 0 to train on the texts alone.")
    return []


def left_out_beta(layers: Sequence[Layer]) -> str | None:
    """What is wrong where a project trains one of EVLGen's models and leaves out ``beta``: the published code
    then takes 0.1 (lavis/models/blip2_models/liptome_opt.py)."""
    arch = _strongest(layers, "arch")[0]
    evaluates = _strongest(layers, "evaluate", "run")[0]
    if arch not in _LIPTOME or evaluates or not any(layer.content.get("run") for layer in layers):
        return None
    if _strongest(layers, "beta")[1] is not None:
        return None
    return (
        f"is left out, which means 0.1 in {arch}: a contrastive loss that is not implemented here. Set it to "
        f"0 to train on the texts alone, as EVLGen's project files do, or name '{ARCHITECTURES[arch]}'"
    )


def _check_instruction(layers: Sequence[Layer], own_arch: Any, own_keys: Collection[str]) -> list[str]:
    """Raises `ConfigError` where ``qformer_text_input``, whether the Q-Former reads the instruction, is not
    what the architecture does: true of InstructBLIP's, as in LAVIS, and false of BLIP-2's. Returns the key,
    to be left out."""
    known = {**dict.fromkeys(_INSTRUCT, True), **dict.fromkeys(_INSTRUCT.values(), False)}
    if not isinstance(own_arch, str) or own_arch not in known or "qformer_text_input" in own_keys:
        return []
    reads, source = _strongest(layers, "qformer_text_input")
    if source is not None and reads is not known[own_arch]:
        other = next((i for i, plain in _INSTRUCT.items() if plain == own_arch), None)
        remedy = f": InstructBLIP is model.arch: {other}" if other else " or false"
        raise ConfigError(
            f"model.qformer_text_input ({source}): must be {str(known[own_arch]).lower()}, not {show(reads)}"
            f"{remedy}."
        )
    return ["qformer_text_input"]


def _lemmatizer_to_run(content: dict[str, Any], own_keys: Collection[str]) -> dict[str, Any]:
    """A layer with ``apply_lemmatizer``, in LAVIS the model's, in ``run``: here the task applies it."""
    model, run = content["model"], content.get("run", {})
    if _LEMMATIZER not in model or _LEMMATIZER in own_keys or not isinstance(run, Mapping):
        return content
    rest = {key: value for key, value in model.items() if key != _LEMMATIZER}
    return {**content, "model": rest, "run": {_LEMMATIZER: model[_LEMMATIZER], **run}}


def _with_new_tokens(run: Mapping[str, Any], arch: Any, task: Any, source: str) -> dict[str, Any]:
    """A published ``run`` section with its lengths in new tokens, also those it leaves out.

    There they count the token that generation starts with: the end is allowed after ``min_len - 1`` tokens,
    and comes after ``max_len - 1`` at the latest; but for captions of T5, and for answers of all but Vicuna,
    ``max_len`` is the number of new tokens (lavis/models/blip2_models: blip2_opt.py, blip2_t5.py,
    blip2_vicuna_instruct.py; the defaults: lavis/tasks).
    """
    if task not in (*_CAPTION_TASKS, *_ANSWER_TASKS):
        return dict(run)
    is_known = isinstance(arch, str) and arch in registry.list_models()
    language = getattr(registry.get_model_class(arch), "LANGUAGE_MODEL", None) if is_known else None
    counts_start = language != "seq2seq" if task in _CAPTION_TASKS else language == "vicuna"
    longest = CAPTION_LEN if task in _CAPTION_TASKS else ANSWER_LEN
    found = {}
    for key, value, start, least in (
        ("max_len", run.get("max_len", longest), int(counts_start), 1),
        ("min_len", run.get("min_len", 1), 1, 0),
    ):
        if type(value) is int and value >= least:  # the rest is left to the checks
            found[key] = max(least, value - start)
    changed = [f"{key} {run[key]} is {new}" for key, new in found.items() if run.get(key, new) != new]
    if changed:
        logger.info("run (%s) counts the start token; in new tokens %s", source, ", ".join(changed))
    return {**run, **found}


def _own_keys(arch: Any) -> Collection[str]:
    """Keys that the architecture's ``model`` section has in this project."""
    is_known = isinstance(arch, str) and arch in registry.list_models()
    return parameters_of(registry.get_model_class(arch).CONFIG if is_known else ModelConfig)


def _of_videos(layers: Sequence[Layer]) -> bool:
    """Whether a dataset of a project names a processor of videos."""
    sections = [layer.content.get("datasets") for layer in layers]
    datasets = [dataset for of in sections if isinstance(of, Mapping) for dataset in of.values()]
    visual = [d.get("vis_processor") for d in datasets if isinstance(d, Mapping)]
    processors = [p for section in visual if isinstance(section, Mapping) for p in section.values()]
    return any(str(p.get("name")).startswith("alpro_video") for p in processors if isinstance(p, Mapping))


def _strongest(layers: Iterable[Layer], key: str, name: str = "model") -> tuple[Any, str | None]:
    """The value of a key of a section in the strongest layer that has it, and that layer's source; None where
    no layer has it."""
    found: tuple[Any, str | None] = (None, None)
    for layer in layers:
        section = layer.content.get(name)
        if isinstance(section, Mapping) and key in section:
            found = (section[key], layer.source)
    return found


def _put(section: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Sets a nested key that is not there; what is there, or is no mapping, stays for the checks."""
    for key in path[:-1]:
        inner = section.get(key)
        if inner is not None and not isinstance(inner, Mapping):
            return
        section[key] = dict(inner or {})
        section = section[key]
    section.setdefault(path[-1], value)
