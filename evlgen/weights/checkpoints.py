"""Checkpoint folders: written beside and renamed, so that a crash never leaves a half one.

A checkpoint is a folder with ``model.safetensors`` (what is trained), ``config.yaml`` and, from a training
run, ``training_state/`` and the digests of all these files (`evlgen.files.digests`). In a run's
``checkpoints/`` folder ``latest`` and ``best`` point at such folders.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from evlgen.common.errors import CheckpointError
from evlgen.files.digests import DIGESTS_FILE
from evlgen.files.json_io import read_json

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.yaml"
STATE_FOLDER = "training_state"
PROGRESS_FILE = "progress.json"  # in it: the counters
_REPLACED = ".replaced"


def write_folder(target: Path, write: Callable[[Path], object]) -> Path:
    """Lets ``write`` fill a temporary folder beside ``target``, flushes it to disk and puts it at ``target``.

    A folder that is there already is replaced in one step where the system can exchange two folders (Linux on
    most disks). Elsewhere it is ``<name>.replaced`` for an instant, and `clear_unfinished` puts it back.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        os.chmod(temporary, 0o755)
        write(temporary)
        _flush(temporary)
        if not target.exists():
            os.replace(temporary, target)
        elif exchange(temporary, target):
            _flush_entry(target.parent)
            _remove(temporary)
        else:
            _replace_in_two_steps(temporary, target)
        _flush_entry(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _replace_in_two_steps(temporary: Path, target: Path) -> None:
    aside = target.with_name(f"{target.name}{_REPLACED}")
    if os.path.lexists(aside):
        _remove(aside)
    os.replace(target, aside)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(aside, target)
        raise
    _flush_entry(target.parent)
    _remove(aside)


def _remove(folder: Path) -> None:
    """Removes a folder that may look like a checkpoint. Under a hidden name first, so that a crash leaves no
    part of it under its own."""
    if not folder.name.startswith("."):
        hidden = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        os.replace(folder, hidden / folder.name)
        folder = hidden
    if folder.is_symlink():
        os.unlink(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)  # clear_unfinished tries again


def update_symlink(link: Path, target: Path) -> None:
    """Makes ``link`` (``latest``, ``best``) point at a folder beside it, in one step. A folder of that
    name, as copying with links followed leaves, is renamed to ``<name>.copied``."""
    if link.is_dir() and not link.is_symlink():
        if link.name == target.name:
            return  # such a copy is what goes on
        _put_aside(link)
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(target.name, temporary, target_is_directory=True)
    os.replace(temporary, link)
    _flush_entry(link.parent)


def remove_symlink(link: Path) -> None:
    """Removes a link that `update_symlink` made; a folder of that name is renamed as there."""
    if link.is_symlink():
        os.unlink(link)
    else:
        _put_aside(link)


def _put_aside(copy: Path) -> None:
    names = (f"{copy.name}.copied{number or ''}" for number in itertools.count())
    os.rename(copy, next(p for p in map(copy.with_name, names) if not os.path.lexists(p)))


def is_checkpoint(folder: Path) -> bool:
    """True for a whole checkpoint folder."""
    return (folder / WEIGHTS_FILE).is_file() and (folder / CONFIG_FILE).is_file()


def found_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run's ``checkpoints`` folder, the newest first: see `place_of`."""
    found = [p for p in folder.glob("step_*") if is_checkpoint(p)] if folder.is_dir() else []
    # of two with one place, the one that is named as it was saved
    return sorted(found, key=lambda p: (*place_of(p), -len(p.name), p.name), reverse=True)


def place_of(checkpoint: Path) -> tuple[int, int]:
    """Where a checkpoint stands among those of its run: how often the run went back to an earlier one, then
    the iteration. Both are read from the state in it: times of files change when they are copied, and clocks
    are put back. A state that cannot be read counts by the folder's name."""
    try:
        values = read_json(checkpoint / STATE_FOLDER / PROGRESS_FILE, CheckpointError, "state")
        place = values["rewinds"] if "rewinds" in values else 0, values["iteration"]
        if all(type(number) is int and number >= 0 for number in place):
            return place
    except (CheckpointError, KeyError, TypeError):
        pass
    number = re.match(r"step_0*([0-9]{1,18})", checkpoint.name)
    return 0, int(number[1]) if number else -1


def remove_old(folder: Path, keep_last: int) -> None:
    """Removes all checkpoints but the newest ``keep_last`` and those that ``latest`` and ``best`` point
    at."""
    pointed = {(folder / name).resolve() for name in ("latest", "best") if (folder / name).exists()}
    for old in found_checkpoints(folder)[keep_last:]:
        if old.resolve() not in pointed:
            _remove(old)


def clear_unfinished(folder: Path) -> None:
    """Removes what a killed process left of files and checkpoints it was writing, and puts back a checkpoint
    that it was about to replace."""
    if not folder.is_dir():
        return
    for aside in folder.glob(f"step_*{_REPLACED}"):
        target = aside.with_name(aside.name.removesuffix(_REPLACED))
        if target.exists():
            _remove(aside)
        else:
            os.replace(aside, target)
    temporary = (f".{DIGESTS_FILE}.*", f"{STATE_FOLDER}/.{PROGRESS_FILE}.*")
    for pattern in (".step_*", ".latest.*", ".best.*", *(f"step_*/{name}" for name in temporary)):
        for left in folder.glob(pattern):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two files or folders in one step; false where the system or the disk cannot."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # of a C library that does not have it
        return False
    here, exchanging = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchanging) == 0


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush_entry(path)


def _flush_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
