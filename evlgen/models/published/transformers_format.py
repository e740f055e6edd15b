"""Models in transformers' own format: BLIP-2, InstructBLIP and LLaVA, read as checkpoints of ours and written
from ours.

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
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from evlgen.common.errors import CheckpointError
from evlgen.config.yaml_io import dump_yaml
from evlgen.files.io import cache_root, make_readable, write_atomically
from evlgen.models.connectors.projection import MLPProjection
from evlgen.models.connectors.qformer import QFormer
from evlgen.models.connectors.qformer_text import QFormerText, QFormerTokenizer
from evlgen.models.instructblip import InstructBLIP
from evlgen.models.language.loading import read_tokenizer
from evlgen.models.published.checkpoints import to_own_names, to_published_names
from evlgen.models.vlm import VLM
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
_IMAGE_TOKEN = "<image>"
_EVA_EPS, _CLIP_EPS = 1e-6, 1e-5  # of the norms in timm's blocks
_OTHER_WAYS = (
    "As it is, it can be shared with `evlgen push CHECKPOINT user/name`, and used by other programs through "
    "`evlgen serve CHECKPOINT`."
)

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
_TRAINED = {
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
_INSTRUCTED = {
    **_TRAINED,
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
_EVA = {
    **_BLOCK,
    "embeddings.position_embedding": "pos_embed",
    "encoder.layers.{}.self_attn.qkv": "blocks.{}.attn.qkv",
    "encoder.layers.{}.self_attn.projection": "blocks.{}.attn.proj",
}
_CLIP = {
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
    _expect(source, "vision_config.layer_norm_eps", vision.layer_norm_eps, _EVA_EPS)
    _expect(source, "qformer_config.hidden_act", qformer.hidden_act, "gelu")
    if config.model_type == "blip-2":
        _expect(source, "qformer_config.use_qformer_text_input", qformer.use_qformer_text_input, False)
    state = model.state_dict()
    wanted = ("query_tokens", "qformer.", "language_projection.", "vision_model.post_layernorm.")
    names = _TRAINED if config.model_type == "blip-2" else _INSTRUCTED
    trained = {_renamed(key, names): value for key, value in state.items() if key.startswith(wanted)}
    eva = {}
    for name, value in model.vision_model.state_dict().items():
        if name.startswith("post_layernorm."):
            continue
        own = _renamed(name, _EVA)
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
    _expect(source, "vision_config.layer_norm_eps", vision.layer_norm_eps, _CLIP_EPS)
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
            own[_renamed(name, _CLIP)] = value
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


# ---- writing ----


def write_transformers(model: VLM, target: Path) -> str:
    """Writes a model in transformers' format: weights, configuration, and a processor of images and texts.

    Args:
        model: ours, built.
        target: an existing, empty folder.

    Returns:
        The name of transformers' class.

    Raises:
        CheckpointError: it has no equal there, or a part of it has not; says which, and what to do.
    """
    _check_equal(model)
    if isinstance(model.connector, QFormer):
        theirs, processor = _write_blip2(model)
    elif isinstance(model.connector, MLPProjection):
        theirs, processor = _write_llava(model)
    else:
        name = type(model.connector).__name__
        raise CheckpointError(
            f"transformers has no class with a {name}: its formats are those of BLIP-2 and "
            f"InstructBLIP (connector qformer) and LLaVA (connector mlp). {_OTHER_WAYS}"
        )
    theirs.to(model.language.dtype)
    theirs.generation_config = _generation_config(model)
    theirs.save_pretrained(target)
    processor.save_pretrained(target)
    return type(theirs).__name__


def _check_equal(model: VLM) -> None:
    """Raises `CheckpointError` for what none of the formats has a place for."""
    problems = {
        "model.soft_prompts": model.prompt_head is not None,
        "model.vision.temporal": model.temporal is not None,
        "model.vision.tome_r": bool(getattr(model.cfg.vision, "tome_r", 0)),
        "model.language.lora": bool(model.language.trained_modules()),
        "model.language.quantization": model.cfg.language.quantization != "none",
        "model.vision.precision: fp8": getattr(model.cfg.vision, "precision", None) == "fp8",
        "model.language.precision: fp8": model.cfg.language.precision == "fp8",
    }
    found = [key for key, is_set in problems.items() if is_set]
    if found:
        raise CheckpointError(f"transformers' format has no place for {', '.join(found)}. {_OTHER_WAYS}")


def _write_blip2(model: VLM) -> tuple[Any, Any]:
    """BLIP-2, or InstructBLIP."""
    import transformers

    reads_text = isinstance(model, InstructBLIP)
    part = {
        name: getattr(transformers, f"{'InstructBlip' if reads_text else 'Blip2'}{name}")
        for name in ("Config", "VisionConfig", "QFormerConfig", "ForConditionalGeneration", "Processor")
    }
    trunk, connector, sizes = model.vision.trunk, model.connector, model.connector.sizes
    if not isinstance(trunk, Eva):
        raise CheckpointError(
            f"transformers' BLIP-2 and InstructBLIP have the vision encoder eva_clip_g, and this model has "
            f"{model.cfg.vision.name}. {_OTHER_WAYS}"
        )
    if isinstance(model.ln_vision, nn.Identity):
        raise CheckpointError(
            "transformers' BLIP-2 has a LayerNorm after the vision encoder, which this model was trained "
            f"without (model.vision.norm_eps: null). {_OTHER_WAYS}"
        )
    if model.ln_vision.eps != _EVA_EPS:
        logger.warning(
            "the LayerNorm after the encoder has an epsilon of %g here and of %g in transformers: outputs "
            "differ where tokens are small",
            model.ln_vision.eps,
            _EVA_EPS,
        )
    block = trunk.blocks[0]
    vision = part["VisionConfig"](
        **_sizes_of(model, trunk, block), layer_norm_eps=_EVA_EPS, qkv_bias=block.attn.q_bias is not None
    )
    crossing = [index for index, layer in enumerate(connector.layers) if layer.has_cross_attention]
    qformer = part["QFormerConfig"](
        hidden_size=sizes.hidden_size,
        num_hidden_layers=len(connector.layers),
        num_attention_heads=sizes.num_attention_heads,
        intermediate_size=sizes.intermediate_size,
        hidden_dropout_prob=sizes.hidden_dropout_prob,
        attention_probs_dropout_prob=sizes.attention_probs_dropout_prob,
        layer_norm_eps=sizes.layer_norm_eps,
        cross_attention_frequency=crossing[1] - crossing[0] if len(crossing) > 1 else len(connector.layers),
        encoder_hidden_size=model.vision.embed_dim,
        **(_text_sizes(model.text) if reads_text else {}),
    )
    tokenizer, token = _tokenizer_with_image(model)
    config = part["Config"](
        vision_config=vision,
        qformer_config=qformer,
        text_config=model.language.model.config,
        num_query_tokens=connector.num_query_token,
        image_token_index=token,
    )
    theirs = _empty(part["ForConditionalGeneration"], config)
    theirs.language_model = model.language.model
    theirs.vision_model.load_state_dict(_eva_to_transformers(trunk), strict=False, assign=True)
    own = {f"connector.{key}": value for key, value in connector.state_dict().items()}
    own |= {f"ln_vision.{key}": value for key, value in model.ln_vision.state_dict().items()}
    if reads_text:
        own |= {f"text.{key}": value for key, value in model.text.state_dict().items()}
    names = _inverse(_INSTRUCTED if reads_text else _TRAINED)
    named = {_renamed(key, names): value for key, value in to_published_names(own).items()}
    unexpected = theirs.load_state_dict(named, strict=False, assign=True).unexpected_keys
    _check_filled(theirs, unexpected)
    tokenizers = [tokenizer, _with_ends(model.text_tokenizer)] if reads_text else [tokenizer]
    count = connector.num_query_token
    return theirs, part["Processor"](_image_processor(model), *tokenizers, num_query_tokens=count)


def _with_ends(text: QFormerTokenizer) -> Any:
    """The tokenizer, which adds by itself what stands around a text: any but a BERT's adds something else."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = text.tokenizer
    start, end = tokenizer.cls_token, tokenizer.sep_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, text.start), (end, text.end)]
    )
    return tokenizer


def _text_sizes(text: QFormerText) -> dict[str, int]:
    positions = text.positions.num_embeddings
    return {"vocab_size": text.words.num_embeddings, "max_position_embeddings": positions}


def _write_llava(model: VLM) -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    trunk, proj = model.vision.trunk, model.connector.proj
    if not isinstance(model.ln_vision, nn.Identity):
        raise CheckpointError(
            "transformers' LLaVA has no LayerNorm between the vision encoder and the connector, which this "
            f"model was trained with. Train with model.vision.norm_eps: null for that format. {_OTHER_WAYS}"
        )
    linears = [layer for layer in proj if isinstance(layer, nn.Linear)]
    if len(linears) != 2 or linears[0].out_features != linears[1].out_features:
        raise CheckpointError(
            "transformers' LLaVA has two linear layers, as wide as the language model. Train with "
            f"model.connector.num_layers: 2 and hidden_size: null for that format. {_OTHER_WAYS}"
        )
    _check_clip(model, trunk)
    language = model.language.model
    base = getattr(language, language.base_model_prefix)
    if not hasattr(base, "embed_tokens"):
        raise CheckpointError(
            f"transformers' LLaVA has no place for the language model {language.config.model_type}. "
            f"{_OTHER_WAYS}"
        )
    prefix = trunk.num_prefix_tokens
    keeps = model.connector.num_dropped == 0
    vision = CLIPVisionConfig(
        **_sizes_of(model, trunk, trunk.blocks[0]), layer_norm_eps=_CLIP_EPS, hidden_act="quick_gelu"
    )
    tokenizer, token = _tokenizer_with_image(model)
    count = model.vision.num_tokens - (0 if keeps else prefix)
    config = LlavaConfig(
        vision_config=vision,
        text_config=model.language.model.config,
        image_token_index=token,
        image_seq_length=count,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full" if keeps else "default",
    )
    theirs = _empty(LlavaForConditionalGeneration, config)
    theirs.model.language_model = base
    theirs.set_output_embeddings(language.get_output_embeddings())
    theirs.lm_head = language.get_output_embeddings()
    theirs.model.vision_tower.load_state_dict(_timm_to_clip(trunk), assign=True)
    named = {
        f"{name}.{kind}": getattr(linear, kind)
        for name, linear in zip(("linear_1", "linear_2"), linears, strict=True)
        for kind in ("weight", "bias")
    }
    theirs.model.multi_modal_projector.load_state_dict(named, assign=True)
    _check_filled(theirs, [])
    processor = LlavaProcessor(
        _image_processor(model),
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=_IMAGE_TOKEN,
        num_additional_image_tokens=prefix,
        chat_template=getattr(tokenizer, "chat_template", None),
    )
    return theirs, processor


def _check_clip(model: VLM, trunk: nn.Module) -> None:
    """Raises `CheckpointError` for another vision encoder than CLIP's without its last norm."""
    is_clip = (
        isinstance(trunk, VisionTransformer)
        and isinstance(trunk.norm_pre, nn.LayerNorm)
        and isinstance(trunk.norm, nn.Identity)
        and type(trunk.blocks[0].mlp.act).__name__ == "QuickGELU"
        and trunk.blocks[0].norm1.eps == _CLIP_EPS
        and trunk.num_prefix_tokens == 1
        and set(map(_kind_of_weight, trunk.state_dict())) <= _CLIP_WEIGHTS
    )
    if not is_clip:
        raise CheckpointError(
            "transformers' LLaVA is written with OpenAI's CLIP as its vision encoder (clip_L), and this "
            f"model has {model.cfg.vision.name}. {_OTHER_WAYS}"
        )


_CLIP_WEIGHTS = {
    *("cls_token", "pos_embed", "patch_embed.proj.weight", "norm_pre.weight", "norm_pre.bias"),
    *(
        f"{part}.{kind}"
        for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ),
}


def _kind_of_weight(name: str) -> str:
    return re.sub(r"^blocks\.\d+\.", "", name)


def _sizes_of(model: VLM, trunk: Any, block: Any) -> dict[str, Any]:
    return {
        "hidden_size": model.vision.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": model.vision.image_size,
        "patch_size": trunk.patch_embed.patch_size[0],
    }


def _eva_to_transformers(trunk: nn.Module) -> dict[str, Tensor]:
    out, names = {}, _inverse(_EVA)
    state = trunk.state_dict()
    for name, value in state.items():
        if name.endswith(".attn.q_bias"):
            layer = name.removesuffix("q_bias")
            bias = torch.cat([value, torch.zeros_like(value), state[f"{layer}v_bias"]])
            out[_renamed(f"{layer}qkv.bias", names)] = bias
        elif not name.endswith((".attn.k_bias", ".attn.v_bias")):
            out[_renamed(name, names)] = value
    return out


def _timm_to_clip(trunk: nn.Module) -> dict[str, Tensor]:
    out, names = {}, _inverse(_CLIP)
    for name, value in trunk.state_dict().items():
        found = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)
        if found:
            for letter, piece in zip("qkv", value.chunk(3), strict=True):
                out[f"encoder.layers.{found[1]}.self_attn.{letter}_proj.{found[2]}"] = piece
        else:
            out[_renamed(name, names)] = value
    out["embeddings.class_embedding"] = out["embeddings.class_embedding"].flatten()
    out["embeddings.position_embedding.weight"] = out["embeddings.position_embedding.weight"][0]
    width = len(out["embeddings.class_embedding"])  # nothing reads what comes after the last norm
    out |= {"post_layernorm.weight": torch.ones(width), "post_layernorm.bias": torch.zeros(width)}
    return out


def _tokenizer_with_image(model: VLM) -> tuple[Any, int]:
    """The tokenizer with a token that stands for an image, and its number. It takes a row of the word
    embeddings that no token has; where there is none, one is added, a copy of the filler's."""
    from transformers import AddedToken

    tokenizer, language = model.language.tokenizer, model.language.model
    tokenizer.add_tokens([AddedToken(_IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    number = tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN)
    rows = len(language.get_input_embeddings().weight)
    if number >= rows:
        language.resize_token_embeddings(number + 1, mean_resizing=False)
        for layer in (language.get_input_embeddings(), language.get_output_embeddings()):
            layer.weight.data[rows:] = layer.weight.data[model.language.pad_token_id]
    return tokenizer, number


def _image_processor(model: VLM) -> Any:
    from transformers import BlipImageProcessor

    vision = model.vision
    return BlipImageProcessor(
        size={"height": vision.image_size, "width": vision.image_size},
        image_mean=list(vision.image_mean),
        image_std=list(vision.image_std),
    )


def _generation_config(model: VLM) -> Any:
    config = model.language.model.generation_config
    if ends := model.language.end_token_ids:
        config.eos_token_id = list(ends) if len(ends) > 1 else ends[0]
    config.pad_token_id = model.language.pad_token_id
    return config


def _empty(cls: Any, config: Any) -> Any:
    with torch.device("meta"):
        return cls(config).eval()


def _check_filled(theirs: nn.Module, unexpected: list[str]) -> None:
    left = [name for name, value in theirs.named_parameters() if value.is_meta]
    if left or unexpected:
        raise CheckpointError(
            f"the model does not fit transformers' {type(theirs).__name__}: {(left or unexpected)[0]} and "
            f"{len(left) + len(unexpected) - 1} more weights have no counterpart. {_OTHER_WAYS}"
        )


# ---- names ----


def _renamed(name: str, table: Mapping[str, str]) -> str:
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


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}


def _save(state: Mapping[str, Tensor], path: Path) -> None:
    save_file({k: v.detach().contiguous().clone() for k, v in state.items()}, path, metadata={"format": "pt"})
    make_readable(path)
