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
        _flush_entry(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def point(link: Path, target: Path) -> None:
    """Makes ``link`` (``latest``, ``best``) point at a folder beside it, in one step. A folder of that
    name, as copying with links followed leaves, is renamed to ``<name>.copied``."""
    if link.is_dir() and not link.is_symlink():
        link.rename(link.with_name(f"{link.name}.copied"))
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(target.name, target_is_directory=True)
    os.replace(temporary, link)
    _flush_entry(link.parent)


def is_checkpoint(folder: Path) -> bool:
    """True for a whole checkpoint folder."""
    return (folder / WEIGHTS_FILE).is_file() and (folder / CONFIG_FILE).is_file()


def found_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run's ``checkpoints`` folder, the newest written first."""
    found = [p for p in folder.glob("step_*") if is_checkpoint(p)] if folder.is_dir() else []
    return sorted(found, key=lambda p: ((p / WEIGHTS_FILE).stat().st_mtime_ns, p.name), reverse=True)


def remove_old(folder: Path, keep_last: int) -> None:
    """Removes all checkpoints but the newest ``keep_last`` and those that ``latest`` and ``best`` point
    at."""
    pointed = {(folder / name).resolve() for name in ("latest", "best") if (folder / name).exists()}
    for old in found_checkpoints(folder)[keep_last:]:
        if old.resolve() not in pointed:
            shutil.rmtree(old)


def clear_unfinished(folder: Path) -> None:
    """Removes what a killed process left of checkpoints it was writing."""
    for left in folder.glob(".step_*") if folder.is_dir() else ():
        shutil.rmtree(left, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush_entry(path)


def _flush_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
