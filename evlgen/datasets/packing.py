"""Writes a dataset of captioned files into webdataset shards, which `evlgen.datasets.shards` reads."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from evlgen.common.errors import DataError
from evlgen.datasets.base_dataset import BadRecord, BaseDataset, MediaDataset
from evlgen.datasets.media import Media
from evlgen.datasets.records import good
from evlgen.datasets.shards import SUFFIXES, stats_path
from evlgen.files.io import atomic_file, write_atomically
from evlgen.files.json_io import read_json
from evlgen.files.locks import file_lock
from evlgen.media.images import FORMATS

logger = logging.getLogger(__name__)

MANIFEST = "pack.json"
_OURS = re.compile(r"\.(pack\.json|[0-9]{5,}(\.tar|_stats\.json))\..+")  # what killed calls leave behind
_SHOWN = 5  # rows without a sample that are named
# others are called as their format; MPO is a JPEG with further ones behind it, as telephones write them
_SUFFIX_OF = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}


@dataclass(frozen=True)
class Packed:
    """What lies in a folder of shards.

    Attributes:
        storage: the shards, as YAML names them.
        samples: images or videos in them.
        left_out: those that could not be read.
        captions: of the samples.
        bad_rows: rows (or captions, images) of the dataset that make no sample.
    """

    storage: str
    samples: int
    left_out: int
    captions: int
    bad_rows: int = 0


@dataclass(frozen=True)
class _Sample:
    visual: str
    image_id: int | str
    captions: list[str]


def pack(dataset: BaseDataset, folder: Path, samples_per_shard: int = 1000) -> Packed:
    """Writes each image or video once, its file's own bytes beside ``{"caption", "image_id", "source"}``.

    ``caption`` is a text, or a list where there are several. Shards are there when they are whole, with their
    numbers in ``<shard>_stats.json``. Where a call was interrupted, the next one goes on, and removes what
    was half written. Files that cannot be read and rows that make no sample are left out, and the log says
    so; whether images can be decoded is not looked at.

    Args:
        folder: empty, not there, or one in which the same was begun.

    Raises:
        DataError: the dataset has no files with captions, none of them can be read, or the folder has other
            things in it.
    """
    captions = dataset.references()
    if not isinstance(dataset, MediaDataset) or not captions:
        raise DataError("this dataset cannot be packed: it takes images or videos in files, with captions.")
    samples, bad = _samples(dataset, captions)
    for record in bad[:_SHOWN]:
        logger.warning("left out: %s (%s)", record.id, record.reason)
    if len(bad) > _SHOWN:
        logger.warning("left out: %d more rows that make no sample", len(bad) - _SHOWN)
    _check_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder / MANIFEST):
        _claim(folder, samples, dataset.media.root, samples_per_shard)
        return replace(_packed(folder, samples, dataset.media, samples_per_shard), bad_rows=len(bad))


def _packed(folder: Path, samples: Sequence[_Sample], media: Media, samples_per_shard: int) -> Packed:
    shards = [
        samples[first : first + samples_per_shard] for first in range(0, len(samples), samples_per_shard)
    ]
    paths = [str(folder / f"{number:05d}.tar") for number in range(len(shards))]
    with tqdm(total=len(samples), desc="packing", unit="sample", disable=None) as bar:
        for number, (path, part) in enumerate(zip(paths, shards, strict=True)):
            if not (os.path.isfile(path) and os.path.isfile(stats_path(path))):
                _write_shard(path, part, number * samples_per_shard, media, bar)
            else:
                bar.update(len(part))
    return _summed(folder, paths)


def _samples(
    dataset: MediaDataset, captions: Mapping[int | str, list[str]]
) -> tuple[list[_Sample], list[BadRecord]]:
    """Each image or video with its captions, in the order of the records, and what makes none: those of its
    own records, or, where these have none, those of its ids. One that has several ids has the first."""
    ids: dict[str, dict[int | str, None]] = {}  # in their order, each once
    own: dict[str, list[str]] = {}
    for record in good(dataset.records):
        visual, caption = record["visual"], record.get("caption") or []
        ids.setdefault(visual, {})[record.get("image_id", visual)] = None
        own.setdefault(visual, []).extend([caption] if isinstance(caption, str) else caption)
    found = [
        _Sample(v, next(iter(of_it)), own[v] or [text for i in of_it for text in captions.get(i, ())])
        for v, of_it in ids.items()
    ]
    bad = [record for record in dataset.records if isinstance(record, BadRecord)]
    bad += [BadRecord(s.visual, "it has no caption.", "empty caption") for s in found if not s.captions]
    return [sample for sample in found if sample.captions], bad


def _check_empty(folder: Path) -> None:
    """Raises `DataError` for a folder with other things in it than shards that were begun."""
    if not folder.exists() or (folder / MANIFEST).is_file():
        return
    if not folder.is_dir() or not all(_OURS.fullmatch(path.name) for path in folder.iterdir()):
        raise DataError(f"{folder} is not empty. Name another folder for the shards.")


def _claim(folder: Path, samples: Sequence[_Sample], root: Path, samples_per_shard: int) -> None:
    """Notes in a folder what is packed there, from which ``root``, or makes sure that it is this, and removes
    what was half written. For one process at a time."""
    digest = hashlib.blake2b(os.fsencode(root.absolute()), digest_size=16)
    for sample in samples:
        digest.update(json.dumps([sample.visual, sample.image_id, sample.captions]).encode())
    content = {
        "samples": len(samples),
        "samples_per_shard": samples_per_shard,
        "digest": digest.hexdigest(),
    }
    manifest = folder / MANIFEST
    if manifest.is_file():
        if read_json(manifest, DataError, "manifest") != content:
            raise DataError(f"{folder} has shards of other data or of another size. Name another folder.")
    else:
        write_atomically(manifest, json.dumps(content))
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.suffix != ".lock":
            path.unlink()


def _write_shard(path: str, samples: Sequence[_Sample], first: int, media: Media, bar: tqdm) -> None:
    from webdataset import TarWriter

    written = captions = 0
    with atomic_file(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as shard:
        for number, sample in enumerate(samples, first):
            bar.update()
            try:
                content = media.read(sample.visual)
                suffix = _suffix(sample.visual, content, f"{media.what}s")
            except (DataError, OSError) as error:
                logger.warning("left out: %s (%s)", sample.visual, error)
                continue
            shard.write({"__key__": f"{number:09d}", suffix: content, "json": _json(sample)})
            written, captions = written + 1, captions + len(sample.captions)
    stats = {"count": len(samples), "successes": written, "captions": captions}
    write_atomically(stats_path(path), json.dumps(stats))


def _json(sample: _Sample) -> bytes:
    caption: Any = sample.captions if len(sample.captions) != 1 else sample.captions[0]
    record = {"caption": caption, "image_id": sample.image_id, "source": sample.visual}
    return json.dumps(record, ensure_ascii=False).encode()


def _suffix(name: str, content: bytes, data_type: str) -> str:
    """What a file is called in a shard: by its name, or by what it is."""
    if not content:
        raise DataError("the file is empty.", "empty file")
    suffix = os.path.splitext(name)[1].lower().removeprefix(".")
    if suffix in SUFFIXES[data_type]:
        return suffix
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            kind = image.format or ""
            return _SUFFIX_OF.get(kind, kind.lower())
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(
            f"neither its name nor its content is that of {data_type}.", "not an image"
        ) from error


def _summed(folder: Path, paths: Sequence[str]) -> Packed:
    stats = [read_json(stats_path(path), DataError, "shard's numbers") for path in paths]
    count, samples, captions = (sum(s[key] for s in stats) for key in ("count", "successes", "captions"))
    if not samples:
        raise DataError(f"none of the {count} files could be read: the shards in {folder} are empty.")
    last = f"{len(paths) - 1:05d}"
    storage = f"{folder}/{{00000..{last}}}.tar" if len(paths) > 1 else paths[0]
    return Packed(storage, samples, count - samples, captions)
