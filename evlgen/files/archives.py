"""Unpacking downloaded archives: nothing is written outside the folder, which appears only when it is whole.

Zip and tar files (plain, gzip, bzip2, xz). Every member is judged before the first byte is written: absolute
paths, ``..``, links that lead out, devices, names that no file can have, two members of one name, and sizes
beyond the limits are refused with the archive, not passed over.
"""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import filecmp
import glob
import gzip
import lzma
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from evlgen.common.errors import DataError
from evlgen.files.io import download, download_target
from evlgen.files.tar_headers import BLOCK, TarMember, read_members

_CHUNK = 1 << 20
_LONGEST_NAME = 4096
_PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
# What zipfile and decompressors raise on damaged archives besides OSError; they have no common base class.
DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,
    LookupError,
    NotImplementedError,
    RuntimeError,  # a password
    OverflowError,
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an archive may hold. The defaults have room for COCO's train2014 (83,000 images, 13 GB) several
    times over.

    Attributes:
        files: members at most.
        bytes: unpacked size of all members at most.
        ratio: unpacked bytes for each byte of the archive at most, beyond the first megabyte. Images and
            videos hardly shrink, text shrinks by ten; a bomb is made of thousands.
    """

    files: int = 500_000
    bytes: int = 1 << 40
    ratio: int = 200


@dataclasses.dataclass(frozen=True)
class _Member:
    name: str
    path: PurePosixPath
    is_folder: bool
    size: int
    content: zipfile.ZipInfo | TarMember


def extract(archive: str | os.PathLike, folder: str | os.PathLike, limits: Limits | None = None) -> Path:
    """Unpacks an archive into a folder that is not there yet, or is empty.

    Returns:
        The folder.

    Raises:
        DataError: no such archive, a damaged one, or one with a member that is refused (see the top of the
            file); the folder is there and has files. Then nothing was written.
    """
    archive, folder = Path(archive), Path(os.path.expanduser(folder)).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is there already: move it away to unpack {archive} again.")
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name[:100]}."))
        os.chmod(temporary, 0o755)
        with _opened(archive) as opened:
            members = _judged(opened, archive, limits or Limits())
            _write(opened, members, temporary)
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    except DAMAGED as error:
        raise DataError(
            f"{archive} cannot be unpacked: {_cause(error)}. Remove it and download it again."
        ) from error
    except OSError as error:
        raise DataError(f"{archive} cannot be unpacked into {folder}: {_cause(error)}.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def extract_into(
    archive: str | os.PathLike, folder: str | os.PathLike, strip: str | None = None
) -> list[str]:
    """Unpacks an archive into a folder that may have files, of other archives or of an earlier attempt.

    It is unpacked beside them first. What is there already stays, and must be the same. For one process at a
    time.

    Args:
        strip: a folder of the archive, such as ``images``: what is in it goes into ``folder``, and the rest
            of the archive nowhere.

    Returns:
        The names of what has come into the folder.

    Raises:
        DataError: as `extract`; the archive has no such folder; a file is there already with other content
            (then nothing has changed).
    """
    archive, folder = Path(archive), Path(os.path.expanduser(folder)).absolute()
    staged = folder / f".{archive.name}.unpacked"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".{glob.escape(staged.name)}.*"):  # by an attempt that was killed
            shutil.rmtree(left)
        if staged.is_dir() and staged.stat().st_mtime < archive.stat().st_mtime:
            shutil.rmtree(staged)  # of an archive that was here before
        if not staged.is_dir():  # else an earlier attempt came so far
            extract(archive, staged)
        source = _inner(staged, archive, strip)
        names = sorted(path.name for path in source.iterdir())
        _move_in(source, folder, archive)
        shutil.rmtree(staged)
        return names
    except OSError as error:
        raise DataError(f"{archive} cannot be unpacked into {folder}: {_cause(error)}.") from error


def fetch_archive(url: str, md5: str | None = None) -> Path:
    """The folder with what the archive at an address holds: downloaded and unpacked into the cache once.

    Raises:
        DataError: see `evlgen.files.downloads.fetch` and `extract`.
    """
    target = download_target(url)
    folder = target.with_name(f"{target.name}.unpacked")
    if not folder.is_dir():
        try:
            extract(download(url, md5), folder)
        except DataError:
            if not folder.is_dir():  # else another process of the run was the first
                raise
        target.unlink(missing_ok=True)  # its content is there now
    return folder


def is_archive(path: str | os.PathLike) -> bool:
    """Whether a file's name says that it is an archive `extract` reads."""
    return str(path).lower().endswith((".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"))


def _inner(staged: Path, archive: Path, strip: str | None) -> Path:
    source = staged / (strip or "")
    if not source.is_dir():
        found = ", ".join(sorted(path.name for path in staged.iterdir())[:5])
        shutil.rmtree(staged)
        raise DataError(f"{archive} has no folder '{strip}'; it has {found}.")
    return source


def _move_in(source: Path, folder: Path, archive: Path) -> None:
    """Moves what is in a folder into another one, once it is clear that all of it can go there."""
    moves = list(_moves(source, folder))
    for path, target in moves:
        if os.path.lexists(target) and not _are_same_files(path, target):
            raise DataError(
                f"{archive} cannot be unpacked into {folder}: {target} is there already, with other content. "
                "Move it away and try again."
            )
    for path, target in moves:
        os.replace(path, target)


def _moves(source: Path, folder: Path) -> Iterator[tuple[Path, Path]]:
    """What to move where: whole folders as long as there is none of that name."""
    for path in sorted(source.iterdir()):
        target = folder / path.name
        if path.is_dir() and target.is_dir():
            yield from _moves(path, target)
        else:
            yield path, target


def _are_same_files(path: Path, target: Path) -> bool:
    return path.is_file() and target.is_file() and filecmp.cmp(path, target, shallow=False)


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile | IO[bytes]]:
    if not os.path.isfile(archive):
        raise DataError(f"there is no archive at {archive}.")
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            yield opened
    else:
        with open(archive, "rb") as file:
            start = file.read(6)
        unpack: Any = next((unpack for magic, unpack in _PACKED.items() if start.startswith(magic)), open)
        with unpack(archive, "rb") as opened:
            yield opened


def _judged(opened: zipfile.ZipFile | IO[bytes], archive: Path, limits: Limits) -> list[_Member]:
    """The members, all of them harmless. Raises `DataError` for the first that is not."""
    room = min(limits.bytes, _CHUNK + limits.ratio * archive.stat().st_size)
    members: list[_Member] = []
    files: set[PurePosixPath] = set()
    folders: set[PurePosixPath] = set()
    for member in _members(opened):
        if (reason := _objection(member, files, folders)) is not None:
            raise DataError(f"{archive} is refused: its member '{member.name[:200]}' {reason}.")
        room -= member.size + BLOCK
        if room < 0:
            raise DataError(
                f"{archive} is refused: it claims to hold more than {limits.bytes} bytes, or more than "
                f"{limits.ratio} times its own size."
            )
        if len(members) >= limits.files:
            raise DataError(f"{archive} is refused: it has more than {limits.files} members.")
        folders.update(member.path.parents)
        (folders if member.is_folder else files).add(member.path)
        members.append(member)
    return members


def _members(opened: zipfile.ZipFile | IO[bytes]) -> Iterator[_Member]:
    if isinstance(opened, zipfile.ZipFile):
        for info in opened.infolist():
            yield _Member(info.filename, PurePosixPath(info.filename), info.is_dir(), info.file_size, info)
        return
    for member in read_members(opened, needs_end=True):
        yield _Member(member.name, PurePosixPath(member.name), member.kind == "folder", member.size, member)


def _objection(member: _Member, files: set[PurePosixPath], folders: set[PurePosixPath]) -> str | None:
    """Why a member is refused; None where it is harmless."""
    windows = PureWindowsPath(member.name)
    if member.path.is_absolute() or windows.drive or windows.root:
        return "has an absolute path"
    if ".." in windows.parts or ".." in member.path.parts:
        return "leads out of the folder"
    if len(member.name) > _LONGEST_NAME or any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in member.name):
        return "has a name that no file should have"
    if (kind := _kind(member.content)) is not None:
        return f"is {kind}"
    if not member.path.parts and not member.is_folder:
        return "has no name"
    if member.path in files or (not member.is_folder and member.path in folders):
        return "is there twice"
    if any(parent in files for parent in member.path.parents):
        return "lies inside another file"
    return None


def _kind(content: zipfile.ZipInfo | TarMember) -> str | None:
    """What a member is, where it is neither a file nor a folder. Links are refused whatever they lead to: no
    data set needs them."""
    if isinstance(content, TarMember):
        return {"file": None, "folder": None, "link": "a link", "other": "no plain file"}[content.kind]
    kind = stat.S_IFMT(content.external_attr >> 16)
    if content.flag_bits & 1:
        return "encrypted"
    if stat.S_ISLNK(kind):
        return "a link"
    return None if kind in (0, stat.S_IFREG, stat.S_IFDIR) else "no plain file"


def _write(opened: zipfile.ZipFile | IO[bytes], members: list[_Member], folder: Path) -> None:
    for member in members:
        path = folder / member.path
        if member.is_folder:
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if isinstance(opened, zipfile.ZipFile):
                assert isinstance(member.content, zipfile.ZipInfo)
                source = stack.enter_context(opened.open(member.content))
            else:
                assert isinstance(member.content, TarMember)
                source = opened
                source.seek(member.content.offset)
            _copy(source, stack.enter_context(open(path, "xb")), member)


def _copy(source: IO[bytes], file: IO[bytes], member: _Member) -> None:
    """Copies what the member said it holds, and not a byte more."""
    left = member.size
    while left and (chunk := source.read(min(_CHUNK, left))):
        left -= len(chunk)
        file.write(chunk)
    if left:
        raise ValueError(f"'{member.name}' is cut off")
    if isinstance(source, zipfile.ZipExtFile) and source.read(1):
        raise ValueError(f"'{member.name}' holds more than the {member.size} bytes it names")


def _cause(error: Exception) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__
