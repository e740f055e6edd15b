"""Captioned images and videos: records in any of the published layouts, for training and for scoring.

``[{"image", "caption", "image_id"}]``, one record for each caption, and ``[{"image", "caption": [..]}]``,
one for each image, are Karpathy's files as LAVIS distributes them and what most datasets use; videos have
``video`` in place of ``image``; nocaps has ``img_id``, and no captions. COCO's own layout is ``{"images",
"annotations"}``. Any is read for either purpose: training sees one sample per caption, scoring one per
image.
"""

from __future__ import annotations

import hashlib
import logging
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evlgen.common.errors import DataError
from evlgen.datasets.annotations import (
    describe,
    has_keys,
    is_id,
    known_as,
    open_annotation,
    read_annotation,
    text_problem,
)
from evlgen.datasets.base_dataset import BadRecord, MediaDataset
from evlgen.datasets.coco_format import coco_items, is_coco_format
from evlgen.datasets.compact_records import PackedRecords
from evlgen.datasets.media import Media
from evlgen.datasets.records import good, refuse_bad, sift
from evlgen.processors.base_processor import BaseProcessor

logger = logging.getLogger(__name__)

_BAD = "bad record"

References = dict[int | str, list[str]]
Records = Sequence[Mapping[str, Any] | BadRecord]


class CaptionDataset(MediaDataset):
    """One sample per caption: ``image`` float32 [3, H, W] (a video: [3, T, H, W]), ``text_input``,
    ``image_id``, ``instance_id``. With ``captions_together`` one per image, whose ``text_input`` is the list
    of its captions: each is learned after the same soft prompts, which are computed and read once.

    Args:
        records: mappings with ``visual``, a file name; ``caption``, a text or a list of them; ``image_id``
            where they have one; or `BadRecord`s.
        media: where images or videos are read.
        vis_processor: what ``media`` opens -> tensor.
        text_processor: caption -> text to learn.

    Raises:
        DataError: no record has a caption.
    """

    def __init__(
        self,
        records: Records,
        media: Media,
        vis_processor: BaseProcessor,
        text_processor: BaseProcessor,
        captions_together: bool = False,
    ) -> None:
        ordered = one_per_image(records, scored=False) if captions_together else one_per_caption(records)
        super().__init__(PackedRecords(ordered), media, vis_processor, text_processor)
        refuse_bad(self.records)

    def load_text(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        caption = record["caption"]
        is_list = isinstance(caption, list)
        return {
            "text_input": [*map(self.text_processor, caption)] if is_list else self.text_processor(caption),
            "image_id": _id(record),
            "instance_id": str(index),
        }

    def references(self) -> References:
        found: References = {}
        for record in good(self.records):
            found.setdefault(_id(record), []).extend(_texts(record))
        return found


class CaptionEvalDataset(MediaDataset):
    """One sample per image: ``image`` float32 [3, H, W] (a video: [3, T, H, W]), ``image_id``,
    ``instance_id``.

    An image is scored against the references given, or, where they have none of it, against its own
    captions. An image without either is a `BadRecord`; but where no references are given and no image has
    captions, they can be written and not scored. The second of two images with one image id is a
    `BadRecord`.

    Args:
        records: see `CaptionDataset`; captions may be missing.
        media: where images or videos are read.
        vis_processor: what ``media`` opens -> tensor.
        text_processor: not applied to references; kept for tasks that ask for it.
        references: captions to score against, by image id. Where they have ids as numbers and the records as
            text, or the other way round, theirs are taken: results are compared with them.
        domains: the part of the dataset that an image belongs to, by image id; see `BaseDataset.domains`.

    Raises:
        DataError: not one record makes a sample.
    """

    def __init__(
        self,
        records: Records,
        media: Media,
        vis_processor: BaseProcessor,
        text_processor: BaseProcessor | None = None,
        references: References | None = None,
        domains: Mapping[int | str, str] | None = None,
    ) -> None:
        images = one_per_image(records, references)
        super().__init__(PackedRecords(images), media, vis_processor, text_processor)
        refuse_bad(images)
        self._domains = domains or {}

    def load_text(self, index: int) -> dict[str, Any]:
        return {"image_id": _id(self.records[index]), "instance_id": str(index)}

    def references(self) -> References:
        return {_id(record): record["caption"] for record in good(self.records) if record["caption"]}

    def domains(self) -> dict[int | str, str]:
        own = {i: known_as(i, self._domains) for i in (_id(record) for record in good(self.records))}
        return {i: self._domains[known] for i, known in own.items() if known in self._domains}


def read_caption_records(
    path: str | os.PathLike, captioned: bool = True, root: Path | None = None
) -> PackedRecords:
    """The records of a file in one of the layouts above: ``visual``, the file name of the image or video;
    ``caption``, a list of texts; ``image_id`` where there is one. A record that has not all of this is a
    `BadRecord` in its place, and so is every empty caption.

    Args:
        captioned: a record without captions is bad; if not, its ``caption`` is an empty list.
        root: the media folder, where COCO's own files need it; see `coco_items`.

    Raises:
        DataError: the file cannot be read, has another layout, or no record is good. Names the file, the
            first record and what is wrong with it.
    """
    content, what = open_annotation(path), "record"
    if is_coco_format(content):
        content, what = coco_items(content, path, root), "image"
    elif not isinstance(content, Iterator):
        raise DataError(
            f"annotation {path} must be a list of records, or {{'images': [..], 'annotations': [..]}} as "
            f"COCO's own files are, not {describe(content)}."
        )
    return sift(content, path, lambda item, place: _parse(item, place, captioned), what)


def _parse(item: Any, place: str, captioned: bool) -> Iterator[dict[str, Any] | BadRecord]:
    if not isinstance(item, Mapping):
        raise DataError(f"it must be a mapping with 'image' and 'caption', not {describe(item)}.", _BAD)
    key = "video" if "video" in item else "image"
    has_keys(item, (key, "caption") if captioned else (key,))
    captions: list[str] = []
    record: dict[str, Any] = {"visual": _file_name(item[key], key), "caption": captions}
    image_id = item.get("image_id", item.get("img_id"))
    if image_id is not None:
        if not is_id(image_id):
            raise DataError(f"'image_id' must be a number or text, not {describe(image_id)}.", _BAD)
        record["image_id"] = image_id
    problems = []
    for text in _texts(item):
        if (problem := _caption_problem(text)) is None:
            captions.append(text)
        else:
            problems.append(BadRecord(place, *problem))
    if record["caption"] or not (captioned or problems):
        yield record
    elif not problems:
        raise DataError("it has no caption.", "no caption")
    yield from problems


def _file_name(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value or text_problem(value):
        raise DataError(f"'{key}' must be a file name, not {describe(value)}.", _BAD)
    return value


def _caption_problem(text: Any) -> tuple[str, str] | None:
    """What is wrong with a caption, and the `DataError.cause` of it; None where it can be learned."""
    if not isinstance(text, str):
        return f"'caption' must be text or a list of it, not {describe(text)}.", _BAD
    if not text.strip():
        return "its caption is empty.", "empty caption"
    if problem := text_problem(text):
        return f"its caption holds {problem}: {describe(text)}.", "damaged text"
    return None


def read_ground_truth(path: str | os.PathLike) -> References:
    """Captions by image id from a file in COCO's layout: ``{"annotations": [{"image_id", "caption"}, ..]}``.
    An empty caption counts, as in COCO's own scores; non-string captions are skipped with a warning.

    Raises:
        DataError: the file has another layout, or no caption.
    """
    content = read_annotation(path)
    annotations = content.get("annotations") if isinstance(content, Mapping) else None
    found: References = {}
    bad = []
    for annotation in annotations if isinstance(annotations, list) else []:
        given = annotation if isinstance(annotation, Mapping) else {}
        image_id: Any = given.get("image_id")
        caption = given.get("caption")
        if is_id(image_id) and isinstance(caption, str) and not text_problem(caption):
            found.setdefault(image_id, []).append(caption)
        else:
            bad.append(annotation)
    if not found:
        raise DataError(
            f"ground truth {path} must be {{'annotations': [{{'image_id', 'caption'}}, ..]}}; "
            f"it is {describe(bad[0] if bad else content)}."
        )
    if bad:
        logger.warning(
            "ground truth %s: %d captions are left out, such as %s", path, len(bad), describe(bad[0])
        )
    return found


def read_domains(path: str | os.PathLike) -> dict[int | str, str]:
    """The domain of each image by its id, from a ground truth whose images have one:
    ``{"images": [{"id", "domain"}]}``, as nocaps' do. Empty where they have none."""
    content = read_annotation(path)
    images = content["images"] if is_coco_format(content) else []
    return {
        image["id"]: image["domain"]
        for image in images
        if isinstance(image, Mapping) and is_id(image.get("id")) and isinstance(image.get("domain"), str)
    }


def one_per_caption(records: Records) -> Iterator[dict[str, Any] | BadRecord]:
    """Records with ``visual``, ``caption`` (one text) and, where it is another than ``visual``, ``image_id``,
    in the captions' order."""
    name = id_rule(records)
    for record in records:
        if isinstance(record, BadRecord):
            yield record
            continue
        texts, image_id = _texts(record), name(record)
        if not texts:
            yield BadRecord(record["visual"], "it has no caption.", "no caption")
        for text in texts:
            yield _named({"visual": record["visual"], "caption": text}, image_id)


def one_per_image(
    records: Records, references: Mapping[int | str, Any] | None = None, scored: bool = True
) -> list[dict[str, Any] | BadRecord]:
    """Records with ``visual``, ``caption`` (all texts) and, where it is another than ``visual``,
    ``image_id``, in the images' order; see `CaptionEvalDataset` for those that become `BadRecord`s.

    Args:
        scored: whether results are known by the images' ids, which must then differ.
    """
    name = id_rule(records)
    found: list[dict[str, Any] | BadRecord] = []
    places: dict[str, int] = {}
    owners: dict[int | str, str] = {}
    for record in records:
        if isinstance(record, BadRecord):
            found.append(record)
            continue
        visual = record["visual"]
        if visual in places:
            known = found[places[visual]]
            if not isinstance(known, BadRecord):
                known["caption"] += _texts(record)
            continue
        places[visual] = len(found)
        image_id = known_as(name(record), references or {})
        if (owner := owners.setdefault(image_id, visual)) != visual and scored:
            reason = f"its image_id {image_id!r} is that of {owner} too. Give every image its own, or none."
            found.append(BadRecord(visual, reason, "duplicate id"))
        else:
            found.append(_named({"visual": visual, "caption": [*_texts(record)]}, image_id))
    return _captioned(found, references)


def id_rule(records: Sequence[Mapping[str, Any] | BadRecord]) -> Callable[[Mapping[str, Any]], int | str]:
    """How the images of records are called: by their ``image_id``, where every record has one; else by the
    number at the end of the file name, as COCO counts its images; else, where a name has no number or two
    have the same, by the file names themselves.

    Of each record no more is kept in memory than two numbers.
    """
    if all(record.get("image_id") is not None for record in good(records)):
        return lambda record: record["image_id"]
    names, numbers = array("q"), array("q")
    for record in good(records):
        number = number_at_end(record["visual"])
        name = record["visual"].encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(name, digest_size=8).digest()
        names.append(int.from_bytes(digest, "big", signed=True))
        numbers.append(-1 if number is None else number)
    if _one_to_one(np.frombuffer(names, dtype=np.int64), np.frombuffer(numbers, dtype=np.int64)):
        return lambda record: _number_or_name(record["visual"])
    return lambda record: record["visual"]


def number_at_end(name: str) -> int | None:
    """The number that a file name ends with, its suffix aside."""
    stem = os.path.splitext(name)[0]
    digits = stem[len(stem.rstrip("0123456789")) :]
    return int(digits) if 0 < len(digits) <= 18 else None


def _number_or_name(name: str) -> int | str:
    number = number_at_end(name)
    return name if number is None else number


def _one_to_one(names: np.ndarray, numbers: np.ndarray) -> bool:
    """Whether no number (-1: none) stands beside two names."""
    order = np.argsort(numbers, kind="stable")
    names, numbers = names[order], numbers[order]
    shared = (numbers[1:] == numbers[:-1]) & (names[1:] != names[:-1])
    return not shared.any() and (not len(numbers) or int(numbers[0]) >= 0)


def _captioned(
    images: list[dict[str, Any] | BadRecord], references: Mapping[int | str, Any] | None
) -> list[dict[str, Any] | BadRecord]:
    """The images with the captions to score them against; those that have none are bad, if any has."""
    own = 0
    for image in good(images):
        truth = (references or {}).get(_id(image))
        own += bool(truth is None and image["caption"])
        image["caption"] = image["caption"] if truth is None else truth
    if references is not None and own:
        logger.warning("images that the ground truth lacks: %d, scored against captions of their own", own)
    if references is None and not any(image["caption"] for image in good(images)):
        return images
    return [p if isinstance(p, BadRecord) or p["caption"] else _uncaptioned(p, references) for p in images]


def _uncaptioned(image: Mapping[str, Any], references: Mapping[int | str, Any] | None) -> BadRecord:
    truth = "" if references is None else f", nor has the ground truth one of image_id {_id(image)!r}"
    return BadRecord(image["visual"], f"it has no caption{truth}.", "no caption")


def _named(record: dict[str, Any], image_id: int | str) -> dict[str, Any]:
    return record if image_id == record["visual"] else {**record, "image_id": image_id}


def _id(record: Mapping[str, Any]) -> int | str:
    return record.get("image_id", record["visual"])


def _texts(record: Mapping[str, Any]) -> list[str]:
    caption = record.get("caption")
    return caption if isinstance(caption, list) else [] if caption is None else [caption]
