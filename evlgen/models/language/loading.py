"""Hugging Face language models from a folder or a GGUF file: configuration, tokenizer, weights, and errors
that say which key of the YAML named them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from evlgen.common.errors import CheckpointError, ConfigError
from evlgen.files.io import resolve
from evlgen.weights.hub import is_gguf, local_model_folder, missing_model, read_model_config
from evlgen.weights.model_sizes import check_counts, check_model, weights_held
from evlgen.weights.weights import check_finite, reading, weights_only


def find_model(name: str) -> Path:
    """The folder of a language model, or its GGUF file. Raises `CheckpointError` where there is none, or one
    that is refused."""
    try:
        if not is_gguf(name):
            return local_model_folder(name)
        if reason := missing_model(name):
            raise CheckpointError(f"'{name}': {reason}.")
        return Path(resolve(name))
    except CheckpointError as error:
        raise CheckpointError(f"model.language.name {error}") from error


@contextlib.contextmanager
def named_errors(name: str, path: Path) -> Iterator[None]:
    """Whatever transformers says of a damaged or incomplete folder or file, as a `CheckpointError`."""
    try:
        with reading(path), weights_only():
            yield
    except CheckpointError as error:
        raise CheckpointError(f"model.language.name '{name}': {error}") from error


def _source(path: Path) -> tuple[Path, dict[str, Any]]:
    """What ``from_pretrained`` takes to read a model: its folder, and of a GGUF file its name there."""
    return (path.parent, {"gguf_file": path.name}) if is_gguf(path.name) else (path, {})


def read_config(name: str, path: Path) -> PretrainedConfig:
    folder, options = _source(path)
    with named_errors(name, path):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
        if options:  # a folder's was looked through by `find_model`
            check_counts(path, config.to_dict(), weights_held(path))
    return config


def num_positions(config: PretrainedConfig) -> int | None:
    """How many tokens a model reads at most; None where it has no limit."""
    known = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return known if isinstance(known, int) and known > 0 else None


def config_content(name: str, path: Path) -> Mapping[str, Any]:
    """What the model's ``config.json`` holds, or would hold."""
    return read_config(name, path).to_dict() if is_gguf(path.name) else read_model_config(path)


def read_tokenizer(name: str, path: Path) -> PreTrainedTokenizerBase:
    folder, options = _source(path)
    with named_errors(name, path):
        return AutoTokenizer.from_pretrained(
            folder, clean_up_tokenization_spaces=False, trust_remote_code=False, **options
        )


def model_without_weights(auto_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A model whose weights have shapes and take no memory."""
    with torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=False)


def read_model(
    auto_class: Any,
    name: str,
    path: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    attention: str,
    **options: Any,
) -> PreTrainedModel:
    """The model with its weights, read memory-mapped; those of a GGUF file are dequantised.

    Args:
        auto_class: transformers' ``AutoModelFor...`` of its kind.
        attention: ``sdpa`` or ``eager``; a model that has no sdpa (Gemma 2, whose attention is capped) gets
            eager.
        options: more for ``from_pretrained``.

    Raises:
        CheckpointError: weights that are damaged or missing, not finite in this type, or far fewer than the
            configuration implies.
    """
    known = auto_class._model_mapping
    if type(config) in known and not getattr(known[type(config)], "_supports_sdpa", True):
        attention = "eager"
    folder, source = _source(path)
    if source:
        options |= _dequantised(name, options)
    with named_errors(name, path):
        check_model(path, model_without_weights(auto_class, config), weights_held(path))
        model, report = auto_class.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            output_loading_info=True,
            **source,
            **options,
        )
    if missing := sorted(report["missing_keys"]):  # transformers would draw them at random
        raise CheckpointError(
            f"model.language.name '{name}': {path} lacks {len(missing)} of its weights, such as "
            f"{missing[0]}. Get it again."
        )
    check_finite(model.state_dict(), f"model.language.name '{name}': {path}, read as {dtype}, is refused")
    if source:
        _forget_quantisation(model)
    return model


def _dequantised(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that make plain weights of a GGUF file's. Newer releases of transformers would keep them in
    blocks, and fetch code for them from the hub, unless they are told not to.

    Raises:
        ConfigError: another quantisation is asked for.
    """
    if "quantization_config" in options:
        raise ConfigError(
            f"model.language.quantization: '{name}' is a GGUF file, whose weights are dequantised. Set it to "
            "none, or name a folder or hub id."
        )
    if not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def _forget_quantisation(model: PreTrainedModel) -> None:
    """What tells transformers and peft that the weights are in blocks: they are plain ones now."""
    for key in ("hf_quantizer", "quantization_method"):
        if hasattr(model, key):
            delattr(model, key)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
