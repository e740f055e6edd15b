"""Weight files of every layout, read memory-mapped and without running anything they contain."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from evlgen.common.errors import CheckpointError

_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file or folder by name; on CPU, memory-mapped where the format allows.

    Reads ``.safetensors``, PyTorch files (``.pth``, ``.pt``, ``.bin``; a state dict, or one under ``model`` /
    ``state_dict`` / ``module``) and Hugging Face folders, sharded or not.

    Raises:
        CheckpointError: nothing there, a damaged file, one without tensors, or a pickle that wants to run
            code.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _state_dict(read_pickle(path), path)


def read_pickle(path: str | Path) -> object:
    """A PyTorch file's content, tensors and plain values only (``weights_only``).

    Raises:
        CheckpointError: the file is damaged, or its pickle wants to run code: refused.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            raise CheckpointError(
                f"{path} is refused: its pickle asks for more than tensors and plain values, and loading it "
                "could run "
                "code. Convert it to safetensors where you trust it."
            ) from error
        raise CheckpointError(_damaged(path, error)) from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        TypeError,
    ) as error:
        raise CheckpointError(_damaged(path, error)) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(_damaged(path, error)) from error


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for name in _FOLDER_FILES:
        file = folder / name
        if not file.is_file():
            continue
        if not name.endswith(".index.json"):
            return read_weights(file)
        shards = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
        return {key: value for shard in shards for key, value in read_weights(folder / shard).items()}
    raise CheckpointError(f"the folder {folder} holds no weights; looked for {', '.join(_FOLDER_FILES)}.")


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    for key in ("model", "state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not state:
        raise CheckpointError(f"{path} holds no named tensors: it is no checkpoint of a model.")
    return state


def _damaged(path: str | Path, error: Exception) -> str:
    cause = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{path} cannot be read: truncated or no checkpoint ({cause}). Get it again, or take an older one."
