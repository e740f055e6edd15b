"""Checkpoint folders: written beside and renamed, so that a crash never leaves a half one.

A checkpoint is a folder with ``model.safetensors`` (what is trained), ``config.yaml`` and, from a training
run,
``training_state/``. In a run's ``checkpoints/`` folder ``latest`` and ``best`` point at such folders.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.yaml"
STATE_FOLDER = "training_state"


def write_folder(target: Path, write: Callable[[Path], None]) -> Path:
    """Lets ``write`` fill a temporary folder beside ``target``, flushes it to disk and renames it to
    ``target``."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        os.chmod(temporary, 0o755)
        write(temporary)
        _flush(temporary)
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
            os.replace(target, old / target.name)
            os.replace(temporary, target)
            shutil.rmtree(old)
        else:
            os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def point(link: Path, target: Path) -> None:
    """Makes ``link`` (``latest``, ``best``) point at a folder beside it, in one step."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(target.name, target_is_directory=True)
    os.replace(temporary, link)


def is_checkpoint(folder: Path) -> bool:
    """True for a whole checkpoint folder."""
    return (folder / WEIGHTS_FILE).is_file() and (folder / CONFIG_FILE).is_file()


def remove_old(folder: Path, keep_last: int) -> None:
    """Removes all checkpoints but the newest ``keep_last`` and those that ``latest`` and ``best`` point
    at."""
    pointed = {(folder / name).resolve() for name in ("latest", "best") if (folder / name).exists()}
    found = sorted(
        p for p in folder.iterdir() if p.is_dir() and not p.is_symlink() and p.name.startswith("step_")
    )
    for old in found[: max(0, len(found) - keep_last)]:
        if old.resolve() not in pointed:
            shutil.rmtree(old)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
