"""Conversations in webdataset shards: tar files of ``key.json``, a record in a layout of
`evlgen.datasets.conversation_records`, with its images and videos beside it.

Their names begin with the key and a dot, ``key.jpg`` or ``key.0.jpg``, ``key.1.jpg``. In the order of these
names (numbers by value) they stand at the record's places, whatever the record calls them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from PIL import Image

from evlgen.common.errors import DataError
from evlgen.datasets.base_dataset import BadRecord
from evlgen.datasets.conversation_dataset import check_reads, frames_of
from evlgen.datasets.conversation_records import read_conversation
from evlgen.datasets.shards import (
    SUFFIXES,
    Part,
    ShardDataset,
    ShardIndex,
    before_dots,
    key_and_suffix,
    local_path,
    parse_json,
    read_part,
    shard_name,
)
from evlgen.datasets.tables import Row
from evlgen.files.tar_headers import tar_members


class ShardConversation(NamedTuple):
    """Where a conversation lies.

    Attributes:
        json: its record.
        visuals: kind (``images``, ``videos``), name and place of each image and video, in their order.
    """

    shard: str
    key: str
    json: Part
    visuals: tuple[tuple[str, str, Part], ...]


class ConversationShardDataset(ShardDataset):
    """A stream of ``messages``, ``images`` and ``instance_id``, as of
    `evlgen.datasets.conversation_dataset.ConversationDataset`."""

    def load_place(self, place: ShardConversation) -> dict[str, Any]:  # type: ignore[override]  # its own places
        with open(local_path(place.shard), "rb") as file:
            values = parse_json(read_part(file, place.json, "caption"))
            contents = [read_part(file, part, kind) for kind, _, part in place.visuals]
        values = {key: value for key, value in values.items() if key not in ("image", "video", "videos")}
        values["images"] = [name for kind, name, _ in place.visuals if kind == "images"]
        values["videos"] = [name for kind, name, _ in place.visuals if kind == "videos"]
        name = self.place_id(place)  # type: ignore[arg-type]  # it has a key and a shard as well
        record = read_conversation(Row(name, values))
        if len(record["visuals"]) != len(contents):
            raise DataError(
                f"it has {len(record['visuals'])} places of images and {len(contents)} images: there must be "
                "one for each.",
                "images without places"
                if len(contents) > len(record["visuals"])
                else "places without images",
            )
        return {
            "messages": record["messages"],
            "instance_id": name,
            "images": list(self._pixels(place, contents, [kind for kind, _ in record["visuals"]])),
        }

    def image_at(self, place: ShardConversation) -> Image.Image | None:  # type: ignore[override]  # likewise
        if not place.visuals:
            return None
        kind, name, part = place.visuals[0]
        with open(local_path(place.shard), "rb") as file:
            content = read_part(file, part, kind)
        with self._opened(content, f"{place.shard}/{name}", kind) as visual:
            if isinstance(visual, Image.Image):
                return visual
            return Image.fromarray(visual.read([len(visual) // 2])[0])

    def _read_shard(self, shard: str) -> ShardIndex:
        return read_conversation_shard(shard)

    def _pixels(
        self, place: ShardConversation, contents: list[bytes], kinds: list[str]
    ) -> Iterator[torch.Tensor]:
        """What the model sees at each place: the next image, or the next video."""
        waiting: dict[str, list[tuple[str, bytes]]] = defaultdict(list)
        for (kind, name, _), content in zip(place.visuals, contents, strict=True):
            waiting[kind.removesuffix("s")].append((name, content))
        for kind in kinds:
            if not waiting[kind]:
                raise DataError("its places of images and of videos are not as many as these.", "bad record")
            name, content = waiting[kind].pop(0)
            check_reads(self.vis_processor, kind, name)
            with self._opened(content, f"{place.shard}/{name}", f"{kind}s") as visual:
                yield self.vis_processor(frames_of(self.vis_processor, visual))


def read_conversation_shard(shard: str, data_type: str = "images") -> ShardIndex:
    """What a shard holds. A `BadRecord` stands for images without a conversation, and for a conversation
    whose key was there before. A shard without conversations counts as damaged."""
    records: dict[str, list[Part]] = defaultdict(list)
    visuals: dict[str, list[tuple[str, str, Part]]] = defaultdict(list)
    damage: DataError | None = None
    try:
        for member in tar_members(local_path(shard)):
            stem, suffix = key_and_suffix(member.name)
            key, part = before_dots(stem), (member.offset, member.size)
            kind = next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), None)
            if key and suffix == "json" and key == stem:
                records[key].append(part)
            elif key and kind is not None:
                visuals[key].append((kind, member.name, part))
    except DataError as error:
        before = f" {len(records)} samples before that are read." if records else ""
        damage = DataError(f"{error}{before}", error.cause)
        damage.__cause__ = error.__cause__
    samples: list[Any] = []
    for key, parts in records.items():
        samples.append(ShardConversation(shard, key, parts[0], tuple(sorted(visuals[key], key=_in_order))))
        why = "its shard has had a sample of this key: the first is taken."
        samples += [BadRecord(f"{shard_name(shard)}/{key}", why, "duplicate id") for _ in parts[1:]]
    for key in [key for key in visuals if key not in records]:  # as the shard has them
        why = f"it has no conversation ({key}.json)."
        samples.append(BadRecord(f"{shard_name(shard)}/{key}", why, "no turns"))
    if not samples and damage is None:
        damage = DataError(f"{shard} has no conversations.", "damaged shard")
    return ShardIndex(samples, damage)


def _in_order(visual: tuple[str, str, Part]) -> list[Any]:
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", visual[1])]
