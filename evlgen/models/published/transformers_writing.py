"""Checkpoints written in transformers' format; see `transformers_format`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from evlgen.common.errors import CheckpointError
from evlgen.models.connectors.projection import MLPProjection
from evlgen.models.connectors.qformer import QFormer
from evlgen.models.connectors.qformer_text import QFormerText, QFormerTokenizer
from evlgen.models.instructblip import InstructBLIP
from evlgen.models.published.checkpoints import to_published_names
from evlgen.models.published.transformers_format import (
    CLIP,
    CLIP_EPS,
    EVA,
    EVA_EPS,
    INSTRUCTED,
    TRAINED,
    renamed,
)
from evlgen.models.vlm import VLM

logger = logging.getLogger(__name__)

_IMAGE_TOKEN = "<image>"
_OTHER_WAYS = (
    "As it is, it can be shared with `evlgen push CHECKPOINT user/name`, and used by other programs through "
    "`evlgen serve CHECKPOINT`."
)


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
        "model.vision.tiles": model.tiling is not None,
        "model.vision.tome_r": bool(getattr(model.cfg.vision, "tome_r", 0)),
        "model.language.lora": bool(model.language.trained_modules()),
        "model.language.tome": model.cfg.language.tome is not None,
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
    if model.ln_vision.eps != EVA_EPS:
        logger.warning(
            "the LayerNorm after the encoder has an epsilon of %g here and of %g in transformers: outputs "
            "differ where tokens are small",
            model.ln_vision.eps,
            EVA_EPS,
        )
    block = trunk.blocks[0]
    vision = part["VisionConfig"](
        **_sizes_of(model, trunk, block), layer_norm_eps=EVA_EPS, qkv_bias=block.attn.q_bias is not None
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
    names = _inverse(INSTRUCTED if reads_text else TRAINED)
    named = {renamed(key, names): value for key, value in to_published_names(own).items()}
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
        **_sizes_of(model, trunk, trunk.blocks[0]), layer_norm_eps=CLIP_EPS, hidden_act="quick_gelu"
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
        and trunk.blocks[0].norm1.eps == CLIP_EPS
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
    out, names = {}, _inverse(EVA)
    state = trunk.state_dict()
    for name, value in state.items():
        if name.endswith(".attn.q_bias"):
            layer = name.removesuffix("q_bias")
            bias = torch.cat([value, torch.zeros_like(value), state[f"{layer}v_bias"]])
            out[renamed(f"{layer}qkv.bias", names)] = bias
        elif not name.endswith((".attn.k_bias", ".attn.v_bias")):
            out[renamed(name, names)] = value
    return out


def _timm_to_clip(trunk: nn.Module) -> dict[str, Tensor]:
    out, names = {}, _inverse(CLIP)
    for name, value in trunk.state_dict().items():
        found = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)
        if found:
            for letter, piece in zip("qkv", value.chunk(3), strict=True):
                out[f"encoder.layers.{found[1]}.self_attn.{letter}_proj.{found[2]}"] = piece
        else:
            out[renamed(name, names)] = value
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


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}
