"""Bringing what the catalogue names to its place: fetched, checked, unpacked, and not twice."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

from evlgen.common.errors import DataError
from evlgen.config.catalogue import Item
from evlgen.files.archives import extract_into
from evlgen.files.downloads import as_size, fetch, file_md5
from evlgen.files.io import write_atomically
from evlgen.files.json_io import read_json
from evlgen.files.locks import file_lock
from evlgen.files.partial_file import PartialFile

logger = logging.getLogger(__name__)

HAS_FILES = "has files"
_AT_ONCE = 16  # images
_NAMES = 20  # of what was unpacked that are looked for again
_FAILURES = 20  # images that do not come before it is given up


def state_of(item: Item, root: Path) -> str:
    """What there is of an item: ``here``, ``begun``, ``missing``, or `HAS_FILES`: something else has put
    files into the folder, and it is not known which."""
    place = root / item.storage
    if item.kind == "shards":
        return "here" if _has_files(place.parent) else "missing"
    if item.kind == "annotations":
        return "here" if place.is_file() else "begun" if PartialFile(place).size else "missing"
    if item.is_archive:
        return _state_of_archive(item, place)
    if item.pictures:
        return _state_of_images(item, root)
    return "here" if _has_files(place) else "missing"


def bring(item: Item, root: Path, keep_archive: bool = False) -> None:
    """Fetches an item that has an address to its place below the data root, and unpacks it where it is an
    archive. What an earlier attempt has done is not done again.

    Args:
        keep_archive: leave the archive in the folder that it was unpacked into.

    Raises:
        DataError: see `fetch` and `extract_into`; or there is an archive of another sum in the folder, which
            is left alone; or the annotations that name an item's images are not there.
    """
    if item.pictures:
        _bring_images(item, root)
    elif item.is_archive:
        _bring_archive(item, root / item.storage, keep_archive)
    elif not (root / item.storage).is_file():
        fetch(item.address, root / item.storage, item.md5)


def is_as_published(item: Item, root: Path) -> bool:
    """False for an annotation that is there with another sum than the published one."""
    place = root / item.storage
    if item.is_archive or item.md5 is None or not place.is_file():
        return True
    return file_md5(place) == item.md5.strip().lower()


def check_room(items: Sequence[Item], root: Path, keep_archives: bool) -> None:
    """Raises `DataError` where the disk has no room for these items and for unpacking them.

    What images and videos take unpacked is counted as their archive's size: they hardly shrink.
    """
    archives = [item.size or 0 for item in items if item.is_archive]
    unpacked_beside = sum(archives) if keep_archives else max(archives, default=0)
    begun = sum(_size_here(item, root) for item in items)
    needed = sum(item.size or 0 for item in items) + unpacked_beside - begun
    free = shutil.disk_usage(_existing(root)).free
    if needed > free:
        raise DataError(
            f"{as_size(needed)} are needed, with room for unpacking, and {as_size(free)} are free at {root}: "
            "make room, choose another disk by --to, or fetch a part by --only.",
            "disk full",
        )


def _state_of_archive(item: Item, folder: Path) -> str:
    if _is_done(item, folder):
        return "here"
    archive = folder / item.file_name
    if archive.is_file() or PartialFile(archive).size:
        return "begun"
    return HAS_FILES if _has_files(folder) else "missing"


def _state_of_images(item: Item, root: Path) -> str:
    try:
        addresses = _addresses(item, root)
    except DataError:
        return HAS_FILES if _has_files(root / item.storage) else "missing"
    there = sum((root / item.storage / name).is_file() for name in addresses)
    return "here" if there == len(addresses) else "begun" if there else "missing"


def _bring_archive(item: Item, folder: Path, keep_archive: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / item.file_name
    with file_lock(folder / f"{item.file_name}.unpacked"):
        if _is_done(item, folder):
            return
        if not archive.is_file():
            fetch(item.address, archive, item.md5)
        elif item.md5 is not None and (found := file_md5(archive)) != item.md5.strip().lower():
            raise DataError(
                f"{archive} is there already, with the md5 {found} where {item.md5} was published: move it "
                f"away to fetch {item.url}."
            )
        logger.info("unpacking %s", archive)
        names = extract_into(archive, folder, item.strip)
        write_atomically(_mark(item, folder), json.dumps({"url": item.url, "names": names[:_NAMES]}))
        if not keep_archive:
            archive.unlink(missing_ok=True)


def _bring_images(item: Item, root: Path) -> None:
    from tqdm import tqdm

    folder = root / item.storage
    failures: list[DataError] = []

    def get(named: tuple[str, str]) -> None:
        name, url = named
        if len(failures) < _FAILURES and not (folder / name).is_file():
            try:
                fetch(url, folder / name)
            except DataError as error:
                failures.append(error)

    addresses = _addresses(item, root)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            list(tqdm(pool.map(get, addresses.items()), total=len(addresses), unit="image", disable=None))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        many = f"at least {_FAILURES}" if len(failures) >= _FAILURES else f"{len(failures)}"
        raise DataError(f"{many} of {len(addresses)} images did not come. {failures[0]}")


def _addresses(item: Item, root: Path) -> dict[str, str]:
    """Where each image comes from, by its file name. Raises `DataError` where the annotations that name
    them are not there, or name what has no address."""
    found = {}
    for path in (root / storage for storage in item.lists):
        if not path.is_file():
            raise DataError(f"{path}, which names the images, is not there: fetch the annotations first.")
        content = read_json(path, DataError, "annotation", max_bytes=None)
        for record in content if isinstance(content, list) else [content]:
            image = record.get("image") if isinstance(record, dict) else record
            folder, _, file = str(image).partition("/")
            if folder not in item.pictures or file in ("", ".", "..") or "/" in file:
                raise DataError(f"{path} names the image '{folder}/{file}', for which there is no address.")
            found[f"{folder}/{file}"] = item.pictures[folder] + quote(file)
    return found


def _mark(item: Item, folder: Path) -> Path:
    """The file that says that an archive was unpacked into the folder."""
    return folder / f".{item.file_name}.done"


def _is_done(item: Item, folder: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        done = json.loads(_mark(item, folder).read_text("utf-8"))
        return done["url"] == item.url and all((folder / name).exists() for name in done["names"])
    return False


def _size_here(item: Item, root: Path) -> int:
    """Bytes of the file or archive that have come already."""
    if not item.url:
        return 0
    place = root / item.storage / item.file_name if item.is_archive else root / item.storage
    return place.stat().st_size if place.is_file() else PartialFile(place).size


def _has_files(folder: Path) -> bool:
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        return any(not entry.name.startswith(".") for entry in found)
    return False


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
