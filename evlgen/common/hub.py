"""Hugging Face models by folder, ``evlgen://`` address or hub id."""

from __future__ import annotations

import os
from pathlib import Path

from evlgen.common.errors import CheckpointError
from evlgen.common.io import PACKAGE_PREFIX, resolve

_TEXT_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


def looks_like_path(name: str) -> bool:
    """True for what can only be a path: absolute, relative with a dot, in the home folder, or an address."""
    return name.startswith((".", "/", "~", PACKAGE_PREFIX)) or "://" in name or name.count("/") > 1


def missing_model(name: str) -> str | None:
    """Why a model is not on this machine, with the remedy; None when it is."""
    path = Path(resolve(name)) if looks_like_path(name) else Path(name)
    if path.is_dir():
        return None if (path / "config.json").is_file() else f"the folder {path} holds no config.json"
    if looks_like_path(name):
        return f"there is no folder {path}"
    if _cached_folder(name) is not None:
        return None
    return (
        "it is neither a folder here nor in the Hugging Face cache. "
        f"Get it with `hf download {name}` where there is a connection, or name a local folder"
    )


def local_model_folder(name: str) -> Path:
    """The folder of a model: as given, from the Hugging Face cache, or downloaded into it.

    Raises:
        CheckpointError: it is nowhere and cannot be downloaded; says how to get it.
    """
    reason = missing_model(name)
    if reason is None:
        path = Path(resolve(name)) if looks_like_path(name) else Path(name)
        return path if path.is_dir() else _cached_folder(name)
    if looks_like_path(name):
        raise CheckpointError(f"'{name}': {reason}.")
    return _download(name, reason)


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


def _download(name: str, reason: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        files = HfApi().list_repo_files(name)
        weights = "*.safetensors" if any(f.endswith(".safetensors") for f in files) else "*.bin"
        return Path(snapshot_download(name, allow_patterns=[*_TEXT_FILES, weights]))
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"'{name}': {reason}. Downloading it now failed: {str(error).splitlines()[0]}"
        ) from error
