"""Hugging Face language models from a folder: configuration, tokenizer, weights, and errors that say which
key of the YAML named them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from evlgen.common.errors import CheckpointError
from evlgen.common.hub import local_model_folder
from evlgen.common.weights import reading, weights_only


def find_folder(name: str) -> Path:
    """The folder of a language model. Raises `CheckpointError` where there is none, or one that is
    refused."""
    try:
        return local_model_folder(name)
    except CheckpointError as error:
        raise CheckpointError(f"model.language.name {error}") from error


@contextlib.contextmanager
def named_errors(name: str, folder: Path) -> Iterator[None]:
    """Whatever transformers says of a damaged or incomplete folder, as a `CheckpointError`."""
    try:
        with reading(folder), weights_only():
            yield
    except CheckpointError as error:
        raise CheckpointError(f"model.language.name '{name}': {error}") from error


def read_config(name: str, folder: Path) -> PretrainedConfig:
    with named_errors(name, folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def read_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    with named_errors(name, folder):
        return AutoTokenizer.from_pretrained(
            folder, clean_up_tokenization_spaces=False, trust_remote_code=False
        )


def model_without_weights(auto_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A model whose weights have shapes and take no memory."""
    with torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=False)


def read_model(
    auto_class: Any,
    name: str,
    folder: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    attention: str,
    **options: Any,
) -> PreTrainedModel:
    """The model with its weights, read memory-mapped.

    Args:
        auto_class: transformers' ``AutoModelFor...`` of its kind.
        attention: ``sdpa`` or ``eager``; a model that has no sdpa (Gemma 2, whose attention is capped) gets
            eager.
        options: more for ``from_pretrained``.

    Raises:
        CheckpointError: weights that are damaged or missing.
    """
    known = auto_class._model_mapping
    if type(config) in known and not getattr(known[type(config)], "_supports_sdpa", True):
        attention = "eager"
    with named_errors(name, folder):
        model, report = auto_class.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    if missing := sorted(report["missing_keys"]):  # transformers would draw them at random
        raise CheckpointError(
            f"model.language.name '{name}': {folder} lacks {len(missing)} of its weights, such as "
            f"{missing[0]}. Get it again."
        )
    return model
