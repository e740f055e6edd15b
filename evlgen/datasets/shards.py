"""Captioned pictures and clips in webdataset shards: tar files of ``key.jpg`` with ``key.json`` or ``.txt``.

Shards are read where they are: their headers say where each sample lies, and its bytes are read when its turn
comes. What is shuffled are these places, not the bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Literal, NamedTuple

import torch
from PIL import Image

from evlgen.common.errors import DataError
from evlgen.common.images import open_image
from evlgen.common.io import NamedBytes, resolve
from evlgen.common.tar_headers import tar_members
from evlgen.common.video import Video
from evlgen.datasets.annotations import describe, text_problem
from evlgen.datasets.base_dataset import BadRecord
from evlgen.datasets.stream import Lane, StreamDataset
from evlgen.processors.base_processor import BaseProcessor

#: What follows a key, by what a dataset is of.
SUFFIXES = {
    "images": ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jp2", "ppm", "ico", "tga"),
    "videos": ("mp4", "webm", "mkv", "avi", "mov", "m4v", "mpg", "mpeg", "wmv", "flv", "ogv", "3gp", "gif"),
}
_TEXTS = ("json", "txt")
_MOST_TEXT_BYTES = 1 << 20
_EVEN = 8  # a lane has one piece more or less than another, of so many at least
_KEPT_INDICES = 8

Part = tuple[int, int]  # where bytes begin in a shard, and how many they are


class ShardSample(NamedTuple):
    """Where a sample lies."""

    shard: str
    key: str
    suffix: str
    visual: Part
    json: Part | None
    txt: Part | None


class ShardDataset(StreamDataset):
    """A stream of ``image`` float32 [3, H, W] or, of clips, [3, T, H, W], ``text_input``, ``image_id``,
    ``instance_id``. Where a sample has several captions, each reading draws one.

    Lanes have shards of their own, or, where there are few, slices of them.

    Args:
        shards: paths of tar files, or addresses, which are fetched into the cache when they are first read.
        vis_processor: of a Pillow image or a `Video`.
        text_processor: of the caption.
        data_type: ``images`` or ``videos``: which of a key's files is looked at.
        caption: the key of the caption, or list of captions, in ``key.json``. A sample without takes
            ``key.txt``.
        shuffle_buffer: a lane's next sample is drawn out of so many of its next ones.
        num_samples: how many there are in all shards; None where nobody knows.
        reader: of clips; see `Video`.
    """

    def __init__(
        self,
        shards: Sequence[str],
        vis_processor: BaseProcessor,
        text_processor: BaseProcessor,
        data_type: Literal["images", "videos"] = "images",
        caption: str = "caption",
        shuffle_buffer: int = 1000,
        num_samples: int | None = None,
        reader: str = "auto",
    ) -> None:
        super().__init__(list(shards), vis_processor, text_processor)
        self.data_type, self.caption, self.shuffle_buffer = data_type, caption, shuffle_buffer
        self.num_samples, self.reader = num_samples, reader
        self._indices: dict[str, list[ShardSample | BadRecord]] = {}

    def places(self, lane: Lane | None, number: int = 0) -> Iterator[ShardSample | BadRecord]:
        if lane is None:
            return self._in_pieces([(shard, 0, 1) for shard in self.records])
        order = random.Random(f"{lane.seed} {lane.index} {number}")
        pieces = _permuted(lane_pieces(self.records, lane), order)
        return _shuffled(self._in_pieces(pieces), self.shuffle_buffer, order)

    def load_place(self, place: ShardSample) -> dict[str, Any]:
        name = self.place_id(place)
        with open(_local(place.shard), "rb") as file:
            record, text = _read(file, place.json), _read(file, place.txt)
            content = _read(file, place.visual)
        caption = self._caption(record, text)
        with self._opened(content, _path(place)) as visual:
            pixels = self.vis_processor(visual)
        return {
            "image": pixels,
            "text_input": self.text_processor(caption),
            "image_id": name,
            "instance_id": name,
        }

    def picture_at(self, place: ShardSample) -> Image.Image:
        with open(_local(place.shard), "rb") as file:
            content = _read(file, place.visual)
        with self._opened(content, _path(place)) as visual:
            if isinstance(visual, Image.Image):
                return visual
            return Image.fromarray(visual.read([len(visual) // 2])[0])

    def place_id(self, place: ShardSample) -> str:
        return f"{shard_name(place.shard)}/{place.key}"

    def _in_pieces(self, pieces: Sequence[tuple[str, int, int]]) -> Iterator[ShardSample | BadRecord]:
        for shard, part, parts in pieces:
            samples = self._index(shard)
            yield from samples[len(samples) * part // parts : len(samples) * (part + 1) // parts]

    def _index(self, shard: str) -> list[ShardSample | BadRecord]:
        """`read_shard`, of which the last few are kept: lanes may share a shard."""
        if shard not in self._indices:
            if len(self._indices) >= _KEPT_INDICES:
                del self._indices[next(iter(self._indices))]
            self._indices[shard] = read_shard(shard, self.data_type)
        return self._indices[shard]

    @contextlib.contextmanager
    def _opened(self, content: bytes, name: str) -> Iterator[Image.Image | Video]:
        """What a processor takes, of a file's bytes."""
        if self.data_type == "images":
            yield open_image(NamedBytes(content, name), getattr(self.vis_processor, "draft_size", None))
            return
        with tempfile.NamedTemporaryFile(suffix=os.path.splitext(name)[1]) as file:  # readers want a path
            file.write(content)
            file.flush()
            try:
                yield Video(file.name, self.reader)
            except DataError as error:
                raise DataError(str(error).replace(file.name, name), error.cause) from error

    def _caption(self, record: bytes | None, text: bytes | None) -> str:
        value = _parsed(record).get(self.caption) if record is not None else None
        if value is None and text is not None:
            value = _decoded(text)
        if value is None:
            raise DataError(
                f"it has no caption: neither '{self.caption}' in its json, nor a txt.", "no caption"
            )
        texts = value if isinstance(value, list) else [value]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f"its caption must be text or a list of it, not {describe(value)}.", "bad record")
        chosen = texts[int(torch.randint(len(texts), ()))] if len(texts) > 1 else texts[0]
        if not chosen.strip():
            raise DataError("its caption is empty.", "empty caption")
        if problem := text_problem(chosen):
            raise DataError(f"its caption holds {problem}: {describe(chosen)}.", "bad record")
        return chosen


def read_shard(shard: str, data_type: str) -> list[ShardSample | BadRecord]:
    """The samples of a shard in the order in which their keys first come; at least one entry.

    The members of a key belong together wherever they are in the shard. A `BadRecord` stands for a sample
    that lacks its picture or its caption, for one whose key was there before, and for what a damaged shard
    has lost.
    """
    name = shard_name(shard)
    found: dict[tuple[str, int], dict[str, Part]] = {}
    times: dict[tuple[str, str], int] = defaultdict(int)
    wanted = {*SUFFIXES[data_type], *_TEXTS}
    damage: list[BadRecord] = []
    try:
        for member in tar_members(_local(shard)):
            key, suffix = _split(member.name)
            if key and suffix in wanted:
                found.setdefault((key, times[key, suffix]), {})[suffix] = (member.offset, member.size)
                times[key, suffix] += 1
    except DataError as error:
        damage.append(BadRecord(name, f"{error} {len(found)} samples before that are read.", error.cause))
    samples = [_sample(shard, key, number, parts, data_type) for (key, number), parts in found.items()]
    return samples + damage or [BadRecord(name, f"{shard} has no samples.", "damaged shard")]


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


def lane_pieces(shards: Sequence[str], lane: Lane) -> list[tuple[str, int, int]]:
    """What a lane reads, ``(shard, i, m)``: the i-th of m equal slices of a shard.

    Shards stay whole where there are many more than lanes. Else each is cut into as few slices as give every
    lane equally many, or, where that takes more, nearly so.
    """
    order = _permuted(shards, random.Random(f"{lane.seed}"))
    parts = min(lane.count // math.gcd(len(shards), lane.count), -(-_EVEN * lane.count // len(shards)))
    pieces = [(shard, part, parts) for part in range(parts) for shard in order]
    return pieces[lane.index :: lane.count]


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


def _split(name: str) -> tuple[str, str]:
    """``a/b/001.seg.png`` -> ``("a/b/001", "seg.png")``, as webdataset names samples."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return (folder + slash + stem if stem else "", suffix.lower())


def _path(place: ShardSample) -> str:
    return f"{place.shard}/{place.key}.{place.suffix}"


def _local(shard: str) -> str:
    return resolve(shard) if "://" in shard else shard


def _read(file: BinaryIO, part: Part | None) -> bytes | None:
    if part is None:
        return None
    offset, size = part
    if offset + size > os.fstat(file.fileno()).st_size:
        raise DataError(f"{file.name} is cut off inside of it.", "damaged shard")
    file.seek(offset)
    return file.read(size)


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(_decoded(content))
    except (ValueError, RecursionError) as error:
        raise DataError(f"its json cannot be read ({error}).", "bad record") from error
    if not isinstance(record, dict):
        raise DataError(f"its json must be a mapping, not {describe(record)}.", "bad record")
    return record


def _decoded(content: bytes) -> str:
    if len(content) > _MOST_TEXT_BYTES:
        raise DataError(f"its text has {len(content)} bytes: that is no caption.", "too large")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"its text is not UTF-8 ({error}).", "not UTF-8") from error
