"""Hugging Face models by folder, GGUF file, ``evlgen://`` address or hub id."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from evlgen.common.errors import CheckpointError
from evlgen.files.io import PACKAGE_PREFIX, near_name, resolve
from evlgen.files.json_io import read_json
from evlgen.weights.model_sizes import UNKNOWN, check_counts, weights_held

logger = logging.getLogger(__name__)

# Keys of a config.json through which transformers loads attention kernels, or weights under another name.
_REFUSED_KEYS = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "transformers_weights",
)
HUB_SECONDS = 10  # in which the hub must answer
_SETTINGS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "vocab.json",
)
_TEXT_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


def looks_like_path(name: str) -> bool:
    """True for what can only be a path: absolute, relative with a dot, in the home folder, an address, or a
    GGUF file."""
    starts = name.startswith((".", "/", "~", PACKAGE_PREFIX))
    return starts or "://" in name or name.count("/") > 1 or is_gguf(name)


def is_gguf(name: str) -> bool:
    """Whether this names a model in one file in llama.cpp's format."""
    return name.lower().endswith(".gguf")


def missing_model(name: str) -> str | None:
    """Why a model is not on this machine, with the remedy; None when it is."""
    if name.startswith(("http://", "https://")):
        return "it is an address, and a model is a folder here or a hub id"
    if is_gguf(name):
        return _missing_gguf(Path(resolve(name)))
    path = Path(resolve(name)) if looks_like_path(name) else Path(name)
    if os.path.isdir(path):
        return None if os.path.isfile(path / "config.json") else f"the folder {path} holds no config.json"
    if looks_like_path(name):
        return f"there is no folder {path}{near_name(path, after='.')}"
    if _cached_folder(name) is not None:
        return None
    return (
        "it is neither a folder here nor in the Hugging Face cache. "
        f"Get it with `hf download {name}` where there is a connection, or name a local folder"
    )


def _missing_gguf(path: Path) -> str | None:
    if not os.path.isfile(path):
        return f"there is no file {path}"
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name.lower()):
        return "it is one part of several. Join them to one file with llama.cpp's gguf-split --merge"
    if importlib.util.find_spec("gguf") is None:
        return 'GGUF files are read with the package gguf. Install it with `pip install "evlgen[gguf]"`'
    return None


def local_model_folder(name: str) -> Path:
    """The folder of a model: as given, from the Hugging Face cache, or downloaded into it.

    Raises:
        CheckpointError: it is nowhere and cannot be downloaded (says how to get it), or is refused by
            `check_model_folder`.
    """
    if is_gguf(name):
        raise CheckpointError(f"'{name}' is a GGUF file, and a Hugging Face folder or hub id is read here.")
    reason = missing_model(name)
    if reason is None:
        path = Path(resolve(name)) if looks_like_path(name) else Path(name)
        folder = path if os.path.isdir(path) else _cached_folder(name) or path
    elif looks_like_path(name):
        raise CheckpointError(f"'{name}': {reason}.")
    else:
        folder = _download(name, reason)
    try:
        check_model_folder(folder)
    except CheckpointError as error:
        raise CheckpointError(f"'{name}': {error}") from error
    return folder


def read_model_config(folder: Path) -> dict[str, Any]:
    """The content of a model folder's ``config.json``. Raises `CheckpointError` where it is damaged."""
    config = read_json(folder / "config.json", CheckpointError, "model configuration")
    if not isinstance(config, dict):
        raise CheckpointError(f"model configuration {folder / 'config.json'} is no mapping. Get it again.")
    return config


def check_model_folder(folder: Path) -> None:
    """Looks through a model folder before transformers reads it.

    Raises:
        CheckpointError: its weights are damaged, or their pickle wants to run code; its settings are no JSON,
            ask for code or for files from elsewhere, or describe a model larger than its weights.
    """
    from evlgen.weights.weights import check_weights_file, shards_of

    config = read_model_config(folder)
    for key, value in _settings(config):
        if key in _REFUSED_KEYS and value not in (None, "eager", "sdpa"):
            raise CheckpointError(
                f"{folder} is refused: its config.json sets {key}, which could load code or files from "
                "elsewhere. Delete the key where you trust the folder."
            )
        if ("dropout" in key or key == "layerdrop") and value is not None and not _is_share(value):
            raise CheckpointError(
                f"{folder} cannot be read: its config.json gives {key} as {value!r:.60}, and a rate is "
                "between 0 and 1. Get it again."
            )
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} is refused: it holds an adapter (adapter_config.json), which names its model by "
            "itself. Name a folder with the whole model."
        )
    for name in _SETTINGS:
        if (folder / name).exists():
            read_json(folder / name, CheckpointError, "model setting")
    for index in sorted(folder.glob("*.index.json")):
        shards_of(index)
    weights = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".bin") and p.is_file()]
    for file in weights:
        if file.suffix == ".safetensors" or file.name.startswith("pytorch_model"):
            check_weights_file(file)
    check_counts(folder, config, weights_held(folder) if weights else UNKNOWN)


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys and values of a ``config.json``, and of the models in it (``text_config``)."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from _settings(value)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def hub_reachable() -> bool:
    """False when told to stay offline or when the hub does not answer within three seconds."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    import socket
    from urllib.parse import urlparse

    address = urlparse(constants.ENDPOINT)
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=3).close()
    except OSError:
        return False
    return True


def _cached_folder(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=_TEXT_FILES))
    except (LocalEntryNotFoundError, HFValidationError, FileNotFoundError):
        return None
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    return folder if (folder / "config.json").is_file() and has_weights else None


def files_on_hub(name: str) -> list[str]:
    """The names of a model's files on the hub, which is asked once.

    Raises:
        CheckpointError: it does not answer within `HUB_SECONDS`, or has no such model for this user.
    """
    from huggingface_hub import HfApi

    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(HfApi().model_info(name, timeout=HUB_SECONDS))
        except Exception as error:  # of huggingface_hub, and of whichever client it asks with
            found.append(error)

    # in a thread: no setting of the client limits the time that a name server takes
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS + 1)
    (answer,) = found or [TimeoutError(f"no answer within {HUB_SECONDS} s")]
    if isinstance(answer, Exception):
        cause = (str(answer).strip().splitlines() or [type(answer).__name__])[0]
        raise CheckpointError(f"the Hugging Face hub cannot give it ({cause})") from answer
    return [file.rfilename for file in answer.siblings or []]


def model_files(names: Iterable[str]) -> list[str]:
    """What is fetched of a model in transformers' format, of whose files these are the names."""
    weights = "*.safetensors" if any(name.endswith(".safetensors") for name in names) else "*.bin"
    return [*_TEXT_FILES, weights]


def with_settings(name: str) -> str | None:
    """A name under which a model's configuration and tokenizer can be read: its own where it is on this
    machine; of a hub id, a folder of these files alone, fetched now; None where they cannot be had."""
    if missing_model(name) is None:
        return name
    if looks_like_path(name):
        return None
    from huggingface_hub import snapshot_download

    try:
        files_on_hub(name)  # which limits the time
        folder = Path(snapshot_download(name, allow_patterns=_TEXT_FILES))
    except Exception as error:  # see `files_on_hub`
        logger.debug("the settings of %s cannot be had: %s", name, error)
        return None
    return str(folder) if (folder / "config.json").is_file() else None


def _download(name: str, reason: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    logger.info("%s is not here: fetching it from %s", name, constants.ENDPOINT)
    try:
        return Path(snapshot_download(name, allow_patterns=model_files(files_on_hub(name))))
    except Exception as error:  # see `files_on_hub`; a connection that breaks off
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"'{name}': {reason}. Downloading it now failed: {cause}") from error
