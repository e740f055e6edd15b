"""Weight files of every layout, read memory-mapped and without running anything they contain."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from evlgen.common.errors import CheckpointError, EVLGenError
from evlgen.files.digests import check_digests
from evlgen.files.io import near_name
from evlgen.files.json_io import read_json
from evlgen.weights.checkpoints import WEIGHTS_FILE
from evlgen.weights.pickle_check import DamagedPickle, RefusedPickle, check_pickles, is_zip

_FOLDER_FILES = (
    WEIGHTS_FILE,
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# The names and shapes of 50,000 tensors take 5 MB.
_MAX_HEADER_BYTES = 32 << 20


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file or folder by name; on CPU, memory-mapped where the format allows.

    Reads ``.safetensors``, PyTorch files (``.pth``, ``.pt``, ``.bin``; a state dict, or one under ``model`` /
    ``state_dict`` / ``module``) and Hugging Face folders, sharded or not.

    Raises:
        CheckpointError: nothing there, a damaged file, one that differs from its digest, without tensors, or
            with numbers that are not finite, or a pickle that wants to run code.
    """
    path = Path(path)
    if os.path.isdir(path):
        return _read_folder(path)
    if not os.path.isfile(path):
        raise CheckpointError(f"there is no checkpoint at {path}.{near_name(path)}")
    if path.name == WEIGHTS_FILE:
        try:
            check_digests(path.parent, [WEIGHTS_FILE])
        except CheckpointError as error:
            raise CheckpointError(f"{path.parent} cannot be read: {error}.") from error
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _state_dict(read_pickle(path), path)
    check_finite(state, f"{path} is refused")
    return state


def check_finite(weights: Mapping[str, Tensor], what: str) -> None:
    """Raises `CheckpointError` where a number is NaN or infinite.

    Args:
        what: the beginning of the message: the file, and that it is refused.
    """
    if (name := first_not_finite(weights)) is not None:
        raise CheckpointError(
            f"{what}: its tensor {name[:200]} holds numbers that are not finite (NaN or infinite). It was "
            "damaged, or its training went wrong. Get it again, or take an older one."
        )


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with NaN or an infinite number, or None."""
    return next((name for name, value in tensors.items() if not _is_finite(value)), None)


def _is_finite(value: Tensor) -> bool:
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    if not value.is_floating_point() or value.numel() == 0 or value.is_meta:
        return True
    if value.element_size() == 1:
        if "float4" in str(value.dtype):  # every number of it is finite
            return True
        value = value.float()
    # reads every number once and needs no memory, and NaN goes through: 20 times faster than isfinite
    return all(bound.isfinite().item() for bound in torch.aminmax(value.detach()))


def read_pickle(path: str | Path) -> object:
    """A PyTorch file's content, tensors and plain values only.

    Its instructions are looked through first (`evlgen.weights.pickle_check`), then it is read with
    ``weights_only``.

    Raises:
        CheckpointError: the file is damaged, or its pickle wants to run code: refused.
    """
    try:
        check_pickles(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
    except RefusedPickle as error:
        raise CheckpointError(
            f"{path} is refused: {error}. Only tensors and plain values are read, since loading more could "
            "run code. Convert it to safetensors where you trust it."
        ) from error
    except Exception as error:  # damaged files make torch raise whatever Python has
        raise CheckpointError(_damaged(path, error)) from error


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Within the block every ``torch.load`` of other libraries is one with ``weights_only=True``, whatever it
    asks for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def check_weights_file(path: str | Path) -> None:
    """Raises `CheckpointError` for a file that `read_weights` would refuse unseen: for those that another
    library is going to read."""
    path = Path(path)
    if path.suffix == ".safetensors":
        _check_header(path)
        return
    try:
        check_pickles(path)
    except RefusedPickle as error:
        raise CheckpointError(f"{path} is refused: {error}.") from error
    except (DamagedPickle, OSError) as error:
        raise CheckpointError(_damaged(path, error)) from error


def shards_of(index: str | Path) -> list[Path]:
    """The weight files that a ``*.index.json`` names, all of them beside it.

    Raises:
        CheckpointError: the index is damaged, or names a file elsewhere or one that is not there.
    """
    index = Path(index)
    content = read_json(index, CheckpointError, "index of weights")
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index} has no weight_map. Get it again.")
    shards = set(names.values()) if all(isinstance(n, str) for n in names.values()) else {""}
    for name in sorted(shards):
        is_plain = name and name == os.path.basename(name) and "\\" not in name
        if not is_plain or not os.path.isfile(index.parent / name):
            raise CheckpointError(f"{index} names the file {name!r}, and there is none beside it.")
    return [index.parent / name for name in sorted(shards)]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    _check_header(path)
    with reading(path):
        return load_file(path)


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever another library raises while it reads a file, as a `CheckpointError` that names it.

    Libraries answer damaged files with errors of every kind, and those written in Rust with panics.
    """
    try:
        yield
    except EVLGenError:
        raise
    except Exception as error:
        raise CheckpointError(_damaged(path, error)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3's, which no module exports
            raise
        raise CheckpointError(_damaged(path, error)) from error


def _check_header(path: Path) -> None:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise CheckpointError(_damaged(path, error)) from error
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(_damaged(path, ValueError(f"it has no header of {length} bytes")))


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for name in _FOLDER_FILES:
        file = folder / name
        if not file.is_file():
            continue
        if not name.endswith(".index.json"):
            return read_weights(file)
        return {key: value for shard in shards_of(file) for key, value in read_weights(shard).items()}
    raise CheckpointError(f"the folder {folder} holds no weights; looked for {', '.join(_FOLDER_FILES)}.")


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    for key in ("model", "state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    items = content.items() if isinstance(content, dict) else ()
    state = {k: v for k, v in items if isinstance(v, Tensor) and isinstance(k, str)}
    if not state:
        raise CheckpointError(f"{path} holds no named tensors: it is no checkpoint of a model.")
    for name, value in state.items():
        if not _is_whole(value):
            raise CheckpointError(
                f"{path} is refused: its tensor {name[:200]} is no plain one, or claims more numbers than "
                "the file holds."
            )
    return state


def _is_whole(value: Tensor) -> bool:
    """Whether a tensor is a plain one of as many numbers as it has in memory."""
    if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _damaged(path: str | Path, error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    cause = lines[0][:200] if lines else type(error).__name__
    return f"{path} cannot be read: truncated or no checkpoint ({cause}). Get it again, or take an older one."
