"""SHA-256 digests of a folder's files, in a file that ``sha256sum --check`` reads too."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from evlgen.common.errors import CheckpointError
from evlgen.common.launcher import is_first
from evlgen.files.io import read_bytes, write_atomically

DIGESTS_FILE = "checkpoint.sha256"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_MAX_BYTES = 1 << 20
_BLOCK = 1 << 20  # bytes read at once


def write_digests(folder: Path) -> None:
    """Writes the digests of all files of a folder into it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS_FILE)
    _write(folder, {path.relative_to(folder).as_posix(): [_read_digest(path)] for path in files})


def check_digests(folder: Path, names: Iterable[str] | None = None) -> None:
    """Compares files with their digests. Does nothing for a folder without digests, as older versions wrote
    them, and on all processes but the first: one that reads everything is enough.

    Args:
        names: of the files to compare, relative to the folder; None: all that have a digest.

    Raises:
        CheckpointError: a file is missing or differs; the digests are damaged.
    """
    if not is_first() or not (folder / DIGESTS_FILE).is_file():
        return
    known = _read(folder)
    for name in known if names is None else names:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"its {path.name} is missing, which its {DIGESTS_FILE} lists")
        try:
            found = os.stat(path)
            # the time of the last change of any kind, which nobody can set
            digest = _digest_of(path, (found.st_ino, found.st_size, found.st_ctime_ns))
        except OSError as error:
            raise CheckpointError(f"its {path.name} cannot be read: {error.strerror or error}") from error
        if digest not in known.get(name, ()):
            raise CheckpointError(
                f"its {path.name} does not match its digest in {folder / DIGESTS_FILE}: it was damaged or "
                "changed after it was saved. If the change was intended, delete that file"
            )


def replace_file(folder: Path, name: str, content: str) -> None:
    """Replaces a text file and its digest. Whenever the process is killed, the two match: meanwhile both the
    old and the new digest are listed."""
    if not (folder / DIGESTS_FILE).is_file():
        write_atomically(folder / name, content)
        return
    known = _read(folder)
    digest = hashlib.sha256(content.encode("utf-8")).hexdigest()
    _write(folder, {**known, name: [*known.get(name, ()), digest]})
    write_atomically(folder / name, content)
    _write(folder, {**known, name: [digest]})


def _write(folder: Path, digests: Mapping[str, Iterable[str]]) -> None:
    lines = [f"{digest}  {name}\n" for name, several in digests.items() for digest in several]
    write_atomically(folder / DIGESTS_FILE, "".join(lines))


def _read(folder: Path) -> dict[str, list[str]]:
    known: dict[str, list[str]] = {}
    try:
        lines = read_bytes(folder / DIGESTS_FILE, _MAX_BYTES).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"its {DIGESTS_FILE} cannot be read ({error})") from error
    for line in lines:
        found = _LINE.fullmatch(line)
        path = PurePosixPath(found[2]) if found else PurePosixPath("..")
        if found is None or path.is_absolute() or ".." in path.parts:
            raise CheckpointError(f"its {DIGESTS_FILE} is damaged. Without that file it is read unchecked")
        known.setdefault(found[2], []).append(found[1])
    if not known:
        raise CheckpointError(f"its {DIGESTS_FILE} is empty. Without that file it is read unchecked")
    return known


@functools.lru_cache(maxsize=256)
def _digest_of(path: Path, state: tuple[int, ...]) -> str:
    """The digest of a file in this state: resuming looks at a checkpoint twice and reads it once."""
    return _read_digest(path)


def _read_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
