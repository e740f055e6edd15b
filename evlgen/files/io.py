"""Paths and files: everything that names a file may be local, http(s), ``evlgen://`` (inside this package),
``cache://`` (inside the data root) or any handler registered with iopath."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
import re
import stat
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from evlgen.common.errors import DataError, did_you_mean
from evlgen.files.atomic import atomic_file as atomic_file
from evlgen.files.atomic import make_readable as make_readable
from evlgen.files.atomic import write_atomically as write_atomically

if TYPE_CHECKING:
    from iopath.common.file_io import PathManager

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
PACKAGE_PREFIX, CACHE_PREFIX = "evlgen://", "cache://"
_MOST_NAMES = 10_000  # of a folder that are compared with one that is not there
_LONGEST_STEM = 100  # of a downloaded file's name, in bytes; the name of its temporary file is longer
_SUFFIX = re.compile(r"((?<=.)(\.tar)?\.\w{1,12})?$")  # of a file's name; may be empty
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def cache_root(configured: str | os.PathLike | None = None) -> Path:
    """Where data and downloads lie: ``EVLGEN_CACHE``, else what the config says (env.cache_root), else
    ~/.cache/evlgen."""
    root = os.environ.get("EVLGEN_CACHE") or configured or "~/.cache/evlgen"
    return Path(os.path.expanduser(root)).resolve()


@functools.cache
def path_manager() -> PathManager:
    """The iopath manager of this package. Register a handler here to read from a store of your own."""
    from iopath.common.file_io import PathHandler, PathManager

    class FolderPathHandler(PathHandler):
        """Paths below a folder, which is looked up each time."""

        def __init__(self, prefix: str, folder: Callable[[], Path], what: str) -> None:
            super().__init__()
            self.prefix, self.folder, self.what = prefix, folder, what

        def _get_supported_prefixes(self) -> list[str]:
            return [self.prefix]

        def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
            root = self.folder()
            local = os.path.normpath(root / path[len(self.prefix) :])
            if not Path(local).is_relative_to(root):
                raise DataError(f"{path} leads out of {self.what}.")
            return local

    manager = PathManager()
    manager.register_handler(FolderPathHandler(PACKAGE_PREFIX, lambda: PACKAGE_ROOT, "the package"))
    manager.register_handler(FolderPathHandler(CACHE_PREFIX, cache_root, "the data root"))
    return manager


def scheme_of(name: str) -> str | None:
    """``s3`` of ``s3://bucket/file``; None for a path of this machine."""
    found = _SCHEME.match(name)
    return found and found.group(1).lower()


def near_name(path: str | os.PathLike, after: str = "") -> str:
    """`` Did you mean 'train.csv'?`` of a path that is not there: what its folder has of a like name, or the
    first folder of it that is there; empty where nothing is. ``after`` ends the sentence before."""
    place = Path(path)
    with contextlib.suppress(OSError, ValueError):  # no folder, or one that is not to be looked into
        while not place.parent.is_dir() and place != place.parent:
            place = place.parent
        with os.scandir(place.parent) as entries:
            names = sorted({entry.name for entry in islice(entries, _MOST_NAMES)} - {place.name})
        hint = did_you_mean(place.name, names, at_least=0.85)
        return after + hint if hint else ""
    return ""


def resolve(path: str | os.PathLike, md5: str | None = None) -> str:
    """A local path for anything iopath knows, and ``file://``; http(s) files are fetched once into the cache.
    ``cache://parts/model`` is below the data root, see `cache_root`.

    Args:
        md5: the published sum of what is downloaded.

    Raises:
        DataError: the download failed; names the address and where the file may be put by hand. Or nothing
            here knows such addresses.
    """
    text = str(path)
    scheme = scheme_of(text)
    if scheme in ("http", "https"):
        return str(download(text, md5))
    if scheme == "file":
        return _path_in(text)
    local = path_manager().get_local_path(os.path.expanduser(text))
    if scheme is not None and local == text:  # iopath takes what no handler knows for a path
        raise DataError(
            f"{text}: nothing here reads {scheme}:// addresses. Register an iopath handler for them with "
            "evlgen.files.io.path_manager() in a plugin, or name a file."
        )
    return local


def _path_in(address: str) -> str:
    """The path in ``file:///folder/a%20b.png``."""
    from urllib.parse import unquote, urlparse

    parsed = urlparse(address)
    if parsed.netloc not in ("", "localhost"):
        raise DataError(
            f"{address} is on another machine, {parsed.netloc}. Of this one: file:///folder/file."
        )
    return unquote(parsed.path)


def download_target(url: str) -> Path:
    """Where `download` keeps the file of an address: ``<host>/<file name>-<digest of the address>.<suffix>``
    in the cache. Two addresses never share a file, whatever their folders, letters' case and queries are.

    Raises:
        DataError: this is no address.
    """
    from urllib.parse import unquote, urlparse

    try:
        parsed = urlparse(url)
        host, port = parsed.hostname or "", parsed.port
    except ValueError as error:
        raise DataError(f"{url} is no address ({error}).") from error
    if not host.strip("."):
        raise DataError(f"{url} is no address: it names no host.")
    folder = re.sub(r"[^A-Za-z0-9.-]", "_", host) + (f"_{port}" if port else "")
    last = unquote(parsed.path.rstrip("/").rpartition("/")[2])
    name = re.sub(r"[\x00-\x1f\x7f/\\\ud800-\udfff]|\.\.", "_", last) or "index"
    found = _SUFFIX.search(name)
    suffix = found.group() if found else ""  # stays at the end: readers go by it
    stem = name.removesuffix(suffix).encode()[:_LONGEST_STEM].decode(errors="ignore")
    # without who asks for it: the file is the same, and credentials stay out of file names
    whole = parsed._replace(netloc=f"{host}:{port}", fragment="").geturl()
    digest = hashlib.sha256(whole.encode(errors="surrogatepass")).hexdigest()[:16]
    return cache_root() / "downloads" / folder / f"{stem}-{digest}{suffix}"


def download(url: str, md5: str | None = None) -> Path:
    """Fetches a file into the cache once, with a progress bar; it lands there only when whole.

    Args:
        url: an http(s) address.
        md5: the published sum, which a new download must have.

    Raises:
        DataError: see `evlgen.files.downloads.fetch`.
    """
    target = download_target(url)
    if os.path.isfile(target):
        return target
    from evlgen.files.downloads import fetch

    return fetch(url, target, md5)


def read_bytes(path: str | os.PathLike, max_bytes: int | None = None) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: not there, not readable, not a regular file (reading a pipe or a device may never end), or
            larger than ``max_bytes``; ``strerror`` says which.
    """
    try:
        found = os.stat(path)
    except ValueError as error:  # a null byte or half a surrogate pair: no file has such a name
        raise OSError(errno.EINVAL, f"no file can have this name ({error})", str(path)) from error
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    if max_bytes is not None and found.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"its {found.st_size} bytes are more than {max_bytes}", str(path))
    with open(path, "rb") as file:
        return file.read()


class NamedBytes(io.BytesIO):
    """Bytes that are read as a file, with a name for messages."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name
