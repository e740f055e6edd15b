"""One process at a time at a file, also among machines that share a disk."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

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
