"""Paths and files: everything that names a file may be local, http(s), ``evlgen://`` (inside this package) or
any handler registered with iopath."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from evlgen.common.errors import DataError

if TYPE_CHECKING:
    from iopath.common.file_io import PathManager

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
PACKAGE_PREFIX = "evlgen://"

logger = logging.getLogger(__name__)


def cache_root(configured: str | os.PathLike | None = None) -> Path:
    """Where data and downloads lie: ``EVLGEN_CACHE``, else what the config says (env.cache_root), else
    ~/.cache/evlgen."""
    return Path(os.environ.get("EVLGEN_CACHE") or configured or "~/.cache/evlgen").expanduser().resolve()


@functools.cache
def path_manager() -> PathManager:
    """The iopath manager of this package. Register a handler here to read from a store of your own."""
    from iopath.common.file_io import PathHandler, PathManager

    class PackagePathHandler(PathHandler):
        def _get_supported_prefixes(self) -> list[str]:
            return [PACKAGE_PREFIX]

        def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
            return str(PACKAGE_ROOT / path[len(PACKAGE_PREFIX) :])

    manager = PathManager()
    manager.register_handler(PackagePathHandler())
    return manager


def resolve(path: str | os.PathLike) -> str:
    """A local path for anything iopath knows; http(s) files are fetched once into the cache.

    Raises:
        DataError: the download failed; names the address and where the file may be put by hand.
    """
    text = str(path)
    if text.startswith(("http://", "https://")):
        return str(download(text))
    return path_manager().get_local_path(os.path.expanduser(text))


def download_target(url: str) -> Path:
    """Where `download` keeps the file of an address."""
    from urllib.parse import unquote, urlparse

    parsed = urlparse(url)
    name = unquote(parsed.path).strip("/").replace("/", "_").replace("..", "_") or "index"
    return cache_root() / "downloads" / parsed.netloc.replace(":", "_") / name


def download(url: str) -> Path:
    """Fetches a file into the cache once, with a progress bar; it lands there only when whole."""
    target = download_target(url)
    if target.is_file():
        return target
    import torch

    target.parent.mkdir(parents=True, exist_ok=True)
    logger.info("downloading %s to %s", url, target)
    try:
        torch.hub.download_url_to_file(url, str(target))
    except OSError as error:
        raise DataError(
            f"{url} could not be downloaded ({error}). Fetch it on a machine with a connection and put it "
            f"at {target}."
        ) from error
    return target


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """A file that appears at ``path`` only when it is complete and flushed to disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        make_readable(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def make_readable(path: str | os.PathLike) -> None:
    """Gives a file the permissions the user's umask gives new files; some libraries write for the owner
    only."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def write_atomically(path: str | os.PathLike, data: str | bytes) -> None:
    """Writes a whole file, or leaves what was there."""
    with atomic_file(path, "wb" if isinstance(data, bytes) else "w") as file:
        file.write(data)
