"""One process at a time at a file or in a folder, also among machines that share a disk."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout, lock_descriptor

from evlgen.common.errors import TrainingError

logger = logging.getLogger(__name__)

# what locking fails with on disks that have no locks, such as some network disks: all are let in there
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Waits until no other process (or thread) is at ``path``, and blocks others while this process holds the
    lock.

    A lock file stands beside it for as long; the system frees a process's locks however it ends, so that one
    left behind by a crash holds nobody up. Not to be taken twice by the same thread.

    Args:
        path: in a folder that is there. It need not be there itself.
    """
    lock = lock_at(path.with_name(f".{path.name}.lock"))
    if not try_lock(lock):
        logger.info("another process is at work on %s: waiting for it", path)
        lock.acquire()
    try:
        yield
    finally:
        _remove(lock)


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keeps a folder to this process for as long as the block. Does not wait as `file_lock` does.

    The system frees the lock however the process ends. Children that outlive it, such as data-loading
    workers, do not have it.

    Raises:
        TrainingError: another process, or another block of this one, has the folder.
    """
    own = f"process {os.getpid()} on {socket.gethostname()}"
    path = folder.resolve() / ".in_use"
    lock = lock_at(path)
    if not try_lock(lock):
        owner = "this process" if (named := _owner_named_in(path)) == own else named
        raise TrainingError(
            f"{path.parent} is in use: {owner} writes its run there. Wait until that has ended, or stop it; "
            "a second run starts in a folder of its own with run.resume=null."
        )
    with contextlib.suppress(OSError):  # a full disk; this is for the other's message only
        path.write_text(own, encoding="utf-8")
    try:
        yield
    finally:
        _remove(lock)


def lock_at(path: Path) -> FileLock:
    """A lock that is held through the file ``path``, not taken yet. Forked children do not hold it."""
    return FileLock(path, fallback_to_soft=False)


def try_lock(lock: FileLock) -> bool:
    """Takes a lock, which ends with the process or its ``release``; false where another process has it. True
    also where the disk has no locks."""
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    except OSError as error:
        _allow_without_lock(error, lock.lock_file)
    return True


def try_lock_file(file: IO) -> bool:
    """As `try_lock`, but the lock is that of an open file: who inherits the file holds it too."""
    try:
        return lock_descriptor(file.fileno(), blocking=False)
    except OSError as error:
        _allow_without_lock(error, file.name)
    return True


def _allow_without_lock(error: OSError, path: str) -> None:
    if error.errno not in _NO_LOCKS:
        raise error
    logger.debug("%s takes no lock (%s)", path, error)


def _remove(lock: FileLock) -> None:
    """Releases a lock and removes its file; those who wait for it start over with a new one."""
    with contextlib.suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()


def _owner_named_in(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_bytes()[:200].decode("utf-8") or "another process"
    return "another process"
