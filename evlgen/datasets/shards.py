"""Captioned images and videos in webdataset shards: tar files of ``key.jpg`` with ``key.json`` or ``.txt``.

Shards are read where they are: their headers say where each sample lies, and its bytes are read when its turn
comes. What is shuffled are these places, not the bytes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import random
import tempfile
import time
import urllib.error
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, Literal, NamedTuple

import torch
from PIL import Image

from evlgen.common.errors import DataError
from evlgen.datasets.annotations import describe, text_problem
from evlgen.datasets.archive_media import MAX_MEMBER_BYTES
from evlgen.datasets.base_dataset import BadRecord
from evlgen.datasets.stream import Partition, StreamDataset
from evlgen.files.io import NamedBytes, resolve
from evlgen.files.tar_headers import tar_members
from evlgen.media.images import IMAGE_SUFFIXES, open_image
from evlgen.media.video import VIDEO_SUFFIXES, Reader, Video
from evlgen.processors.base_processor import BaseProcessor

logger = logging.getLogger(__name__)

#: What follows a key, by what a dataset is of.
SUFFIXES = {
    "images": tuple(suffix[1:] for suffix in IMAGE_SUFFIXES),
    "videos": tuple(suffix[1:] for suffix in (*VIDEO_SUFFIXES, ".gif")),
}
_TEXTS = ("json", "txt")
_MOST_BYTES = {"caption": 1 << 20, "images": MAX_MEMBER_BYTES, "videos": 2 << 30}  # more may fill the memory
_EVEN = 8  # a partition has one piece more or less than another, of so many at least
_KEPT_INDICES = 8
PAUSES: tuple[float, ...] = (1, 4)  # seconds before each further try where a disk or the network has failed

Part = tuple[int, int]  # where bytes begin in a shard, and how many they are


class ShardSample(NamedTuple):
    """Where a sample lies."""

    shard: str
    key: str
    suffix: str
    visual: Part
    json: Part | None
    txt: Part | None


class ShardIndex(NamedTuple):
    """What a shard holds: its samples in the order in which their keys first come, and what keeps it from
    being read, or from being read to its end."""

    samples: list[ShardSample | BadRecord]
    damage: DataError | None


class ShardDataset(StreamDataset):
    """A stream of ``image`` float32 [3, H, W] or, of videos, [3, T, H, W], ``text_input``, ``image_id``,
    ``instance_id``. Where a sample has several captions, each reading draws one.

    Partitions have shards of their own, or, where there are few, slices of them.

    Args:
        shards: paths of tar files, or addresses, which are fetched into the cache when they are first read.
        vis_processor: of a Pillow image or a `Video`.
        text_processor: of the caption.
        data_type: ``images`` or ``videos``: which of a key's files is looked at.
        caption: the key of the caption, or list of captions, in ``key.json``. A sample without takes
            ``key.txt``.
        shuffle_buffer: a partition's next sample is drawn out of so many of its next ones.
        num_samples: how many there are in all shards, or what counts them when first asked; None where
            unknown.
        reader: of videos; see `Video`.
    """

    def __init__(
        self,
        shards: Sequence[str],
        vis_processor: BaseProcessor,
        text_processor: BaseProcessor,
        data_type: Literal["images", "videos"] = "images",
        caption: str = "caption",
        shuffle_buffer: int = 1000,
        num_samples: int | Callable[[], int | None] | None = None,
        reader: Reader = "auto",
    ) -> None:
        super().__init__(list(shards), vis_processor, text_processor)
        self.data_type, self.caption, self.shuffle_buffer = data_type, caption, shuffle_buffer
        self._num_samples, self.reader = num_samples, reader
        self._indices: dict[str, ShardIndex] = {}

    @property
    def num_samples(self) -> int | None:
        if callable(self._num_samples):
            self._num_samples = self._num_samples()
        return self._num_samples

    @num_samples.setter
    def num_samples(self, number: int | None) -> None:
        self._num_samples = number

    def places(self, partition: Partition | None, number: int = 0) -> Iterator[ShardSample | BadRecord]:
        if partition is None:
            return self._in_pieces([(shard, 0, 1) for shard in self.records])
        order = random.Random(f"{partition.seed} {partition.index} {number}")
        pieces = _permuted(partition_pieces(self.records, partition), order)
        return _shuffled(self._in_pieces(pieces), self.shuffle_buffer, order)

    def load_place(self, place: ShardSample) -> dict[str, Any]:
        name = self.place_id(place)
        with open(local_path(place.shard), "rb") as file:
            record, text = (part and read_part(file, part, "caption") for part in (place.json, place.txt))
            content = read_part(file, place.visual, self.data_type)
        described = {} if record is None else parse_json(record)
        caption = self._caption(described, text)
        with self._opened(content, _path(place)) as visual:
            pixels = self.vis_processor(visual)
        return {
            "image": pixels,
            "text_input": self.text_processor(caption),
            "image_id": _image_id(described, name),
            "instance_id": name,
        }

    def image_at(self, place: ShardSample) -> Image.Image:
        with open(local_path(place.shard), "rb") as file:
            content = read_part(file, place.visual, self.data_type)
        with self._opened(content, _path(place)) as visual:
            if isinstance(visual, Image.Image):
                return visual
            return Image.fromarray(visual.read([len(visual) // 2])[0])

    def place_id(self, place: ShardSample) -> str:
        return f"{shard_name(place.shard)}/{place.key}"

    def _in_pieces(self, pieces: Sequence[tuple[str, int, int]]) -> Iterator[ShardSample | BadRecord]:
        for shard, part, parts in pieces:
            samples, damage = self._index(shard)
            yield from samples[len(samples) * part // parts : len(samples) * (part + 1) // parts]
            if damage is not None:  # in each piece: whoever reads some of the pieces meets as many lost ones
                which = shard if parts == 1 else f"{shard}, part {part + 1} of {parts}"
                yield BadRecord(which, str(damage), damage.cause, 1 / (len(self.records) * parts))

    def _index(self, shard: str) -> ShardIndex:
        """`read_shard`, of which the last few are kept, as partitions may share a shard; but for damaged
        ones, which may be whole the next time."""
        if shard in self._indices:
            return self._indices[shard]
        index = _read_patiently(self._read_shard, shard)
        if index.damage is None:
            if len(self._indices) >= _KEPT_INDICES:
                del self._indices[next(iter(self._indices))]
            self._indices[shard] = index
        return index

    def _read_shard(self, shard: str) -> ShardIndex:
        return read_shard(shard, self.data_type)

    @contextlib.contextmanager
    def _opened(
        self, content: bytes, name: str, data_type: str | None = None
    ) -> Iterator[Image.Image | Video]:
        """What a processor takes, of a file's bytes."""
        if (data_type or self.data_type) == "images":
            yield open_image(NamedBytes(content, name), getattr(self.vis_processor, "draft_size", None))
            return
        with tempfile.NamedTemporaryFile(suffix=os.path.splitext(name)[1]) as file:  # readers want a path
            file.write(content)
            file.flush()
            try:
                yield Video(file.name, self.reader)
            except DataError as error:
                raise DataError(str(error).replace(file.name, name), error.cause) from error

    def _caption(self, record: dict[str, Any], text: bytes | None) -> str:
        value = record.get(self.caption)
        if value is None and text is not None:
            value = _decoded(text)
        if value is None:
            raise DataError(
                f"it has no caption: neither '{self.caption}' in its json, nor a txt.", "no caption"
            )
        texts = value if isinstance(value, list) else [value]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f"its caption must be text or a list of it, not {describe(value)}.", "bad record")
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise DataError("its caption is empty.", "empty caption")
        chosen = texts[int(torch.randint(len(texts), ()))] if len(texts) > 1 else texts[0]
        if problem := text_problem(chosen):
            raise DataError(f"its caption holds {problem}: {describe(chosen)}.", "bad record")
        return chosen


def read_shard(shard: str, data_type: str) -> ShardIndex:
    """What a shard holds. One without samples counts as damaged.

    The members of a key belong together wherever they are in the shard. A `BadRecord` stands for a sample
    that lacks its image or its caption, and for one whose key was there before. A key is all before the
    suffix, dots included; but where there is a sample ``001``, ``001.seg.png`` is a further part of it, as
    webdataset has it, and a whole sample ``001.seg`` beside it is a `BadRecord`: it may be either.
    """
    found: dict[tuple[str, int], dict[str, Part]] = {}
    times: dict[tuple[str, str], int] = defaultdict(int)
    wanted = {*SUFFIXES[data_type], *_TEXTS}
    damage: DataError | None = None
    try:
        for member in tar_members(local_path(shard)):
            key, suffix = key_and_suffix(member.name)
            if key and suffix in wanted:
                found.setdefault((key, times[key, suffix]), {})[suffix] = (member.offset, member.size)
                times[key, suffix] += 1
    except DataError as error:
        before = f" {len(found)} samples before that are read." if found else ""
        damage = DataError(f"{error}{before}", error.cause)
        damage.__cause__ = error.__cause__
    made = {
        (key, number): _sample(shard, key, number, parts, data_type) for (key, number), parts in found.items()
    }
    whole = {key for (key, _), sample in made.items() if isinstance(sample, ShardSample)}
    samples = []
    for (key, _), sample in made.items():
        if (first := before_dots(key)) == key or first not in whole:
            samples.append(sample)
        elif key in whole:
            why = f"its name has dots: it may be a sample of its own, or belong to '{first}'."
            samples.append(BadRecord(f"{shard_name(shard)}/{key}", why, "ambiguous name"))
    if not samples and damage is None:
        damage = DataError(f"{shard} has no samples.", "damaged shard")
    return ShardIndex(samples, damage)


def _read_patiently(read: Callable[[str], ShardIndex], shard: str) -> ShardIndex:
    """What a shard holds, read again as `PAUSES` allow where a disk or the network has failed."""
    for pause in PAUSES:
        index = read(shard)
        if index.damage is None or not _may_pass(index.damage):
            return index
        logger.warning("%s Trying again in %g s.", index.damage, pause)
        time.sleep(pause)
    return read(shard)


def _may_pass(damage: DataError) -> bool:
    """Whether this may be gone at the next try: not what is wrong in the file, nor that it is not there."""
    cause = damage.__cause__
    lasting = (FileNotFoundError, IsADirectoryError, PermissionError, urllib.error.HTTPError)
    return isinstance(cause, OSError) and not isinstance(cause, lasting)


def _sample(
    shard: str, key: str, number: int, parts: dict[str, Part], data_type: str
) -> ShardSample | BadRecord:
    name = f"{shard_name(shard)}/{key}"
    if number:
        return BadRecord(name, "its shard has had a sample of this key: the first is taken.", "duplicate id")
    suffix = next((s for s in SUFFIXES[data_type] if s in parts), None)
    if suffix is None:
        what = data_type.removesuffix("s")
        return BadRecord(name, f"it has no {what}, but {', '.join(parts)}.", "missing file")
    if not any(text in parts for text in _TEXTS):
        return BadRecord(name, "it has no caption: neither json nor txt.", "no caption")
    return ShardSample(shard, key, suffix, parts[suffix], parts.get("json"), parts.get("txt"))


def partition_pieces(shards: Sequence[str], partition: Partition) -> list[tuple[str, int, int]]:
    """What a partition reads, ``(shard, i, m)``: the i-th of m equal slices of a shard.

    Shards stay whole where there are many more than partitions. Else each is cut into as few slices as give
    every partition equally many, or, where that takes more, nearly so.
    """
    order = _permuted(shards, random.Random(f"{partition.seed}"))
    parts = min(
        partition.count // math.gcd(len(shards), partition.count), -(-_EVEN * partition.count // len(shards))
    )
    pieces = [(shard, part, parts) for part in range(parts) for shard in order]
    return pieces[partition.index :: partition.count]


def stats_path(shard: str) -> str:
    """Where img2dataset writes what a shard holds."""
    return f"{os.path.splitext(shard)[0]}_stats.json"


def shard_name(shard: str) -> str:
    """What messages call a shard: its file name."""
    return os.path.basename(shard.partition("?")[0])


def _permuted(values: Sequence[Any], order: random.Random) -> list[Any]:
    return sorted(values, key=lambda _: order.random())  # the same in every version of Python


def _shuffled(places: Iterator[Any], size: int, order: random.Random) -> Iterator[Any]:
    """Each next one is drawn out of the next ``size``."""
    buffer: list[Any] = []
    for place in places:
        if len(buffer) < size:
            buffer.append(place)
        elif buffer:
            drawn = int(order.random() * size)
            yield buffer[drawn]
            buffer[drawn] = place
        else:
            yield place
    yield from _permuted(buffer, order)


def key_and_suffix(name: str) -> tuple[str, str]:
    """``a/b/001.seg.png`` -> ``("a/b/001.seg", "png")``; no key where the name of the file is hidden."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.rpartition(".")
    return (folder + slash + stem if stem and not file.startswith(".") else "", suffix.lower())


def before_dots(key: str) -> str:
    """``a/b/001.seg`` -> ``a/b/001``: what webdataset calls a sample."""
    folder, slash, file = key.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _path(place: ShardSample) -> str:
    return f"{place.shard}/{place.key}.{place.suffix}"


def local_path(shard: str) -> str:
    return resolve(shard) if "://" in shard else shard


def read_part(file: BinaryIO, part: Part, what: str) -> bytes:
    offset, size = part
    if size > _MOST_BYTES[what]:
        which = "text" if what == "caption" else "file"
        raise DataError(f"its {which} has {size} bytes: that is no {what.removesuffix('s')}.", "too large")
    if offset + size > os.fstat(file.fileno()).st_size:
        raise DataError(f"{file.name} is cut off inside of it.", "damaged shard")
    file.seek(offset)
    return file.read(size)


def parse_json(content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(_decoded(content))
    except (ValueError, RecursionError) as error:
        raise DataError(f"its json cannot be read ({error}).", "bad record") from error
    if not isinstance(record, dict):
        raise DataError(f"its json must be a mapping, not {describe(record)}.", "bad record")
    return record


def _image_id(record: dict[str, Any], name: str) -> int | str:
    """What ``data pack`` noted of where the image was; the sample's name where nothing is noted."""
    noted = record.get("image_id")
    return noted if isinstance(noted, int | str) and not isinstance(noted, bool) else name


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"its text is not UTF-8 ({error}).", "not UTF-8") from error
