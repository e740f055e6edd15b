"""Models in transformers' own format: BLIP-2, InstructBLIP and LLaVA, read as checkpoints of ours;
`transformers_writing` writes them from ours.

Both directions go through transformers' classes, which know the names of every layout they have published:
``Blip2ForConditionalGeneration`` is EVA-CLIP-g, LayerNorm, Q-Former and a language model, the Q-Former of
``InstructBlipForConditionalGeneration`` also reads the question, and ``LlavaForConditionalGeneration`` is
CLIP's image tower, two linear layers and a language model. Whatever has no equal there is refused with a
message, in both directions: outputs are the same, or nothing is written.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from evlgen.common.errors import CheckpointError
from evlgen.config.yaml_io import dump_yaml
from evlgen.files.io import cache_root, make_readable, write_atomically
from evlgen.models.language.loading import read_tokenizer
from evlgen.models.published.checkpoints import to_own_names
from evlgen.weights.checkpoints import CONFIG_FILE, WEIGHTS_FILE, is_checkpoint, write_folder
from evlgen.weights.hub import check_model_folder, read_model_config
from evlgen.weights.hub_checkpoints import PARTS_FOLDER
from evlgen.weights.model_sizes import check_model, weights_held
from evlgen.weights.weights import check_finite, reading, weights_only

logger = logging.getLogger(__name__)

#: ``model_type`` of a ``config.json`` -> transformers' class.
CLASSES = {
    "blip-2": "Blip2ForConditionalGeneration",
    "instructblip": "InstructBlipForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
}
_QFORMER_TOKENIZER = "qformer_tokenizer"  # InstructBLIP's, a folder
EVA_EPS, CLIP_EPS = 1e-6, 1e-5  # of the norms in timm's blocks

# Names in transformers' BLIP-2 and in LAVIS's, which `to_own_names` knows. {} is the number of a layer.
_QFORMER_LAYER = {
    **{f"attention.attention.{part}": f"attention.self.{part}" for part in ("query", "key", "value")},
    **{
        f"crossattention.attention.{part}": f"crossattention.self.{part}"
        for part in ("query", "key", "value")
    },
    **{
        name: name
        for block in ("attention.output", "crossattention.output", "output_query")
        for name in (f"{block}.dense", f"{block}.LayerNorm")
    },
    "intermediate_query.dense": "intermediate_query.dense",
}
TRAINED = {
    "query_tokens": "query_tokens",
    "qformer.layernorm": "Qformer.bert.embeddings.LayerNorm",
    "language_projection": "opt_proj",
    "vision_model.post_layernorm": "ln_vision",
    **{
        f"qformer.encoder.layer.{{}}.{theirs}": f"Qformer.bert.encoder.layer.{{}}.{lavis}"
        for theirs, lavis in _QFORMER_LAYER.items()
    },
}
# What InstructBLIP has besides: the Q-Former's way of text.
INSTRUCTED = {
    **TRAINED,
    "qformer.embeddings.layernorm": "Qformer.bert.embeddings.LayerNorm",
    **{
        f"qformer.embeddings.{name}": f"Qformer.bert.embeddings.{name}"
        for name in ("word_embeddings", "position_embeddings")
    },
    **{
        f"qformer.encoder.layer.{{}}.{name}": f"Qformer.bert.encoder.layer.{{}}.{name}"
        for name in ("intermediate.dense", "output.dense", "output.LayerNorm")
    },
}
# Names in transformers' image towers and in timm's, but for queries, keys and values.
_BLOCK = {
    "encoder.layers.{}.layer_norm1": "blocks.{}.norm1",
    "encoder.layers.{}.layer_norm2": "blocks.{}.norm2",
    "encoder.layers.{}.mlp.fc1": "blocks.{}.mlp.fc1",
    "encoder.layers.{}.mlp.fc2": "blocks.{}.mlp.fc2",
    "embeddings.patch_embedding": "patch_embed.proj",
    "embeddings.class_embedding": "cls_token",
}
EVA = {
    **_BLOCK,
    "embeddings.position_embedding": "pos_embed",
    "encoder.layers.{}.self_attn.qkv": "blocks.{}.attn.qkv",
    "encoder.layers.{}.self_attn.projection": "blocks.{}.attn.proj",
}
CLIP = {
    **_BLOCK,
    "embeddings.position_embedding.weight": "pos_embed",
    "pre_layrnorm": "norm_pre",
    "encoder.layers.{}.self_attn.out_proj": "blocks.{}.attn.proj",
}


def transformers_type(folder: Path) -> str | None:
    """The ``model_type`` of a folder in transformers' format that `read_transformers` may read, or a relative
    of these; None for any other folder."""
    if (folder / CONFIG_FILE).exists() or not (folder / "config.json").is_file():
        return None
    kind = str(read_model_config(folder).get("model_type"))
    return kind if kind in CLASSES or kind.startswith(("llava", "instructblip", "blip")) else None


# ---- reading ----


def own_folder(folder: Path) -> Path:
    """A folder of ours for one that may be in transformers' format: the same, or what `read_transformers`
    made of it, once, below the data root."""
    if transformers_type(folder) is None:
        return folder
    stats = [
        (p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.iterdir()) if p.is_file()
    ]
    digest = hashlib.sha256(repr((str(folder.resolve()), stats)).encode()).hexdigest()[:16]
    target = cache_root() / "converted" / f"{folder.resolve().name[:60]}-{digest}"
    if not is_checkpoint(target):
        logger.info("%s is in transformers' format: converting it, once, to %s", folder, target)
        write_folder(target, lambda into: read_transformers(folder, into))
    return target


def read_transformers(source: Path, target: Path) -> dict[str, Any]:
    """Writes a checkpoint of ours from a folder in transformers' format: the trained part, the configuration,
    and the frozen parts in ``parts/``.

    Args:
        source: with ``config.json``, weights and tokenizer.
        target: an existing, empty folder.

    Returns:
        The ``model`` section.

    Raises:
        CheckpointError: the folder is damaged or refused (see `check_model_folder`), of another kind, or has
            settings without an equal here.
    """
    kind = str(read_model_config(source).get("model_type"))
    if kind not in CLASSES:
        raise CheckpointError(
            f"{source}: a {kind} model. Read from transformers' format are {', '.join(CLASSES)} "
            f"({', '.join(CLASSES.values())})."
        )
    check_model_folder(source)
    model = _load(source, kind)
    (target / PARTS_FOLDER).mkdir()
    with torch.no_grad(), reading(source):
        convert = _read_llava if kind == "llava" else _read_blip2
        section, state, vision = convert(source, model)
        if kind == "instructblip":
            section = _with_text(source, target, section, model.config)
        _save(state, target / WEIGHTS_FILE)
        _save(vision, target / PARTS_FOLDER / "vision.safetensors")
        language = target / PARTS_FOLDER / "language"
        _language_of(model).save_pretrained(language)
        read_tokenizer(str(source), source).save_pretrained(language)
    section["vision"]["pretrained"] = f"./{PARTS_FOLDER}/vision.safetensors"
    section["language"]["name"] = f"./{PARTS_FOLDER}/language"
    write_atomically(target / CONFIG_FILE, dump_yaml({"model": section}))
    return section


def _load(source: Path, kind: str) -> nn.Module:
    import transformers

    cls = getattr(transformers, CLASSES[kind])
    with reading(source), weights_only():
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            check_model(source, cls(config), weights_held(source))
        model, report = cls.from_pretrained(
            source, config=config, dtype="auto", trust_remote_code=False, output_loading_info=True
        )
    if missing := sorted(report["missing_keys"]):  # transformers would draw them at random
        raise CheckpointError(f"{source} lacks {len(missing)} weights, such as {missing[0]}. Get it again.")
    check_finite(model.state_dict(), f"{source} is refused")
    return model.eval()


def _read_blip2(source: Path, model: Any) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    config, vision, qformer = model.config, model.config.vision_config, model.config.qformer_config
    _expect(source, "vision_config.hidden_act", vision.hidden_act, "gelu")
    _expect(source, "vision_config.layer_norm_eps", vision.layer_norm_eps, EVA_EPS)
    _expect(source, "qformer_config.hidden_act", qformer.hidden_act, "gelu")
    if config.model_type == "blip-2":
        _expect(source, "qformer_config.use_qformer_text_input", qformer.use_qformer_text_input, False)
    state = model.state_dict()
    wanted = ("query_tokens", "qformer.", "language_projection.", "vision_model.post_layernorm.")
    names = TRAINED if config.model_type == "blip-2" else INSTRUCTED
    trained = {renamed(key, names): value for key, value in state.items() if key.startswith(wanted)}
    eva = {}
    for name, value in model.vision_model.state_dict().items():
        if name.startswith("post_layernorm."):
            continue
        own = renamed(name, EVA)
        if own.endswith("attn.qkv.bias"):
            query, _, values = value.chunk(3)  # keys have a bias that softmax takes out again
            eva[own.replace("qkv.bias", "q_bias")], eva[own.replace("qkv.bias", "v_bias")] = query, values
        else:
            eva[own] = value
    kind = config.text_config.model_type
    section = {
        "arch": {"opt": "blip2_opt", "t5": "blip2_t5"}.get(kind, "blip2_opt"),
        "vision": {
            "name": "eva_clip_g",
            "image_size": vision.image_size,
            "norm_eps": vision.layer_norm_eps,
            "kwargs": {**_vit_sizes(vision), **({} if vision.qkv_bias else {"qkv_bias": False})},
        },
        "connector": {
            "name": "qformer",
            "init": None,
            "num_query_token": config.num_query_tokens,
            "num_layers": qformer.num_hidden_layers,
            "cross_attention_freq": qformer.cross_attention_frequency,
            **{
                key: getattr(qformer, key)
                for key in (
                    *("hidden_size", "num_attention_heads", "intermediate_size", "hidden_dropout_prob"),
                    *("attention_probs_dropout_prob", "layer_norm_eps"),
                )
            },
        },
        "language": {"name": None, **({} if kind in ("opt", "t5") else {"kind": "causal"})},
    }
    return section, to_own_names(trained), eva


def _with_text(source: Path, target: Path, section: dict[str, Any], config: Any) -> dict[str, Any]:
    """The section of InstructBLIP, whose Q-Former has a tokenizer, which is copied."""
    folder, kind = source / _QFORMER_TOKENIZER, config.text_config.model_type
    if not folder.is_dir():
        raise CheckpointError(f"{source} lacks {_QFORMER_TOKENIZER}/, the Q-Former's. Get it again.")
    own = target / PARTS_FOLDER / _QFORMER_TOKENIZER
    read_tokenizer(str(folder), folder).save_pretrained(own)
    write_atomically(own / "config.json", '{"model_type": "bert"}')  # by which a folder is known as a model's
    positions = config.qformer_config.max_position_embeddings
    text = {"tokenizer": f"./{PARTS_FOLDER}/{_QFORMER_TOKENIZER}", "max_position_embeddings": positions}
    language = {"name": None, **({} if kind in ("t5", "llama") else {"kind": "causal"})}
    arch = "blip2_t5_instruct" if kind == "t5" else "blip2_vicuna_instruct"
    lengths = {"max_txt_len": min(128, positions)}  # as published
    return {**section, "arch": arch, "language": language, "text": text, **lengths}


def _read_llava(source: Path, model: Any) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    config, vision = model.config, model.config.vision_config
    _expect(source, "vision_config.model_type", vision.model_type, "clip_vision_model")
    _expect(source, "vision_config.hidden_act", vision.hidden_act, "quick_gelu")
    _expect(source, "vision_config.layer_norm_eps", vision.layer_norm_eps, CLIP_EPS)
    _expect(source, "projector_hidden_act", config.projector_hidden_act, "gelu")
    _expect(source, "multimodal_projector_bias", config.multimodal_projector_bias, True)
    layer, layers = config.vision_feature_layer, vision.num_hidden_layers
    if not isinstance(layer, int):
        raise CheckpointError(
            f"{source} reads several layers of its vision encoder, {layer}, and one is read here."
        )
    depth = layer if layer >= 0 else layers + 1 + layer
    theirs = model.model.vision_tower.state_dict()
    clip = _clip_to_timm(theirs, depth)
    projector = model.model.multi_modal_projector
    state = {
        f"connector.proj.{place}.{kind}": getattr(linear, kind)
        for place, linear in ((0, projector.linear_1), (2, projector.linear_2))
        for kind in ("weight", "bias")
    }
    section = {
        "arch": "evlgen_causal",
        "vision": {
            "name": "clip_L",
            "image_size": vision.image_size,
            "norm_eps": None,
            "kwargs": {**_vit_sizes(vision), "depth": depth},
        },
        "connector": {"name": "mlp", "keep_prefix": config.vision_feature_select_strategy == "full"},
        "language": {"name": None, "kind": "causal"},
    }
    return section, {name: value.detach() for name, value in state.items()}, clip


def _clip_to_timm(theirs: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The first layers of CLIP's image tower under timm's names."""
    theirs = {key.removeprefix("vision_model."): value for key, value in theirs.items()}
    own: dict[str, Tensor] = {}
    for name, value in theirs.items():
        found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
        is_left_out = name.startswith("post_layernorm.") or name.endswith("position_ids")
        if is_left_out or (found and int(found[1]) >= depth):
            continue
        part = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", found[2]) if found else None
        if found is None or part is None:
            own[renamed(name, CLIP)] = value
        elif part[1] == "q":
            keys = (f"encoder.layers.{found[1]}.self_attn.{letter}_proj.{part[2]}" for letter in "qkv")
            own[f"blocks.{found[1]}.attn.qkv.{part[2]}"] = torch.cat([theirs[key] for key in keys])
    own["cls_token"] = own["cls_token"].view(1, 1, -1)
    own["pos_embed"] = own["pos_embed"].unsqueeze(0)
    return own


def _vit_sizes(vision: Any) -> dict[str, Any]:
    width, inner = vision.hidden_size, vision.intermediate_size
    ratio = inner / width
    if int(width * ratio) != inner:
        ratio = (inner + 0.5) / width
    return {
        "patch_size": vision.patch_size,
        "embed_dim": width,
        "depth": vision.num_hidden_layers,
        "num_heads": vision.num_attention_heads,
        "mlp_ratio": ratio,
    }


def _language_of(model: Any) -> Any:
    """The language model with its output layer, as a model of its own."""
    if not hasattr(model, "model"):
        return model.language_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(model.config.text_config, trust_remote_code=False)
    setattr(language, language.base_model_prefix, model.model.language_model)
    language.set_output_embeddings(model.lm_head)
    language.generation_config = model.generation_config
    return language


def _expect(source: Path, key: str, value: Any, wanted: Any) -> None:
    if value != wanted:
        raise CheckpointError(
            f"{source} cannot be read as one of ours: its {key} is {value!r:.60}, and only {wanted!r} has an "
            "equal here."
        )


def renamed(name: str, table: Mapping[str, str]) -> str:
    """A weight's name by a table of names without ``.weight`` and ``.bias``, and with {} for a number."""
    found = re.search(r"\.(\d+)\.", name)
    number = found[1] if found else ""
    general = name if found is None else f"{name[: found.start()]}.{{}}.{name[found.end() :]}"
    stem, _, kind = general.rpartition(".")
    if general in table:
        return table[general].format(number)
    if stem not in table or kind not in ("weight", "bias"):
        raise CheckpointError(f"the weight {name[:200]} has no equal in the other format.")
    return f"{table[stem].format(number)}.{kind}"


def _save(state: Mapping[str, Tensor], path: Path) -> None:
    save_file({k: v.detach().contiguous().clone() for k, v in state.items()}, path, metadata={"format": "pt"})
    make_readable(path)
