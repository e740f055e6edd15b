"""One process at a time at a file or in a folder, also among machines that share a disk."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from evlgen.common.errors import TrainingError

try:
    import fcntl
except ImportError:  # Windows: two processes may then do the same work, as whole files land by renaming
    fcntl = None

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def alone_at(path: Path) -> Iterator[None]:
    """Waits until no other process (or thread) is at ``path``, and keeps others away meanwhile.

    A lock file stands beside it for as long; the system frees a process's locks however it ends, so that one
    left behind by a crash holds nobody up. Not to be taken twice by the same thread.

    Args:
        path: in a folder that is there. It need not be there itself.
    """
    lock = path.with_name(f".{path.name}.lock")
    file = _locked(lock, path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
        file.close()


_owned: set[Path] = set()  # by this process, whose own locks do not stop it


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keeps a folder to this process for as long as the block. Does not wait as `alone_at` does.

    The lock is one of the process (``fcntl.lockf``): the system frees it however the process ends, and
    children that outlive it, such as data-loading workers, do not have it. On systems without such locks
    (Windows, some network disks) only this process's own blocks are told apart.

    Raises:
        TrainingError: another process, or another block of this one, has the folder.
    """
    folder = folder.resolve()
    lock = folder / ".in_use"
    if folder in _owned:
        raise TrainingError(_in_use(folder, "this process"))
    with _lock_or_none(lock) as file:
        if file is None:
            raise TrainingError(_in_use(folder, _owner_named_in(lock)))
        with contextlib.suppress(OSError):  # a full disk; this is for the other's message only
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        _owned.add(folder)
        try:
            yield
        finally:
            _owned.discard(folder)
            with contextlib.suppress(OSError):
                lock.unlink()


@contextlib.contextmanager
def _lock_or_none(lock: Path) -> Iterator[io.FileIO | None]:
    """The open lock file, locked; None where another process has it."""
    while True:
        with open(lock, "ab", buffering=0) as file:
            try:
                if fcntl is not None:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                yield None
                return
            except OSError as error:
                logger.debug("%s takes no lock (%s)", lock.parent, error)
            if _is_at(file, lock):
                yield file
                return
        # the one before has removed it: what is locked is no longer what others would lock


def _owner_named_in(lock: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return lock.read_bytes()[:200].decode("utf-8") or "another process"
    return "another process"


def _in_use(folder: Path, owner: str) -> str:
    return (
        f"{folder} is in use: {owner} writes its run there. Wait until that has ended, or stop it; a second "
        "run starts in a folder of its own with run.resume=null."
    )


def try_lock(file: IO) -> bool:
    """Takes the lock of an open file, which ends with the process or when the file is closed; False where
    another process has it. True also where the system or the disk has no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.debug("%s takes no lock (%s)", file.name, error)  # some network disks have none
    return True


def _locked(lock: Path, path: Path) -> IO[bytes]:
    while True:
        file = open(lock, "ab")
        try:
            _wait_for(file, path)
            if fcntl is None or _is_at(file, lock):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # the one before has removed it: what is locked is no longer what others would lock


def _wait_for(file: IO[bytes], path: Path) -> None:
    if not try_lock(file):
        logger.info("another process is at work on %s: waiting for it", path)
        fcntl.flock(file, fcntl.LOCK_EX)


def _is_at(file: IO[bytes], path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False
