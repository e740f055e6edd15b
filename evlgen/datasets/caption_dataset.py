"""Pictures with captions in Karpathy's JSON layout, for training and for scoring.

Training files are ``[{"image", "caption", "image_id"}]``, others ``[{"image", "caption": [..]}]``. Either
layout is read for either purpose: training sees one sample per caption, scoring one per picture.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from evlgen.common.errors import DataError
from evlgen.datasets.annotations import describe, read_annotation, read_records, text_problem
from evlgen.datasets.base_dataset import MediaDataset
from evlgen.datasets.media import Media
from evlgen.processors.base_processor import BaseProcessor

References = dict[int | str, list[str]]


class CaptionDataset(MediaDataset):
    """One sample per caption: ``image`` float32 [3, H, W], ``text_input``, ``image_id``, ``instance_id``.

    Args:
        records: of `read_caption_records`.
        media: where pictures or clips are read.
        vis_processor: Pillow image -> tensor.
        text_processor: caption -> text to learn.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        media: Media,
        vis_processor: BaseProcessor,
        text_processor: BaseProcessor,
    ) -> None:
        super().__init__(one_per_caption(records), media, vis_processor, text_processor)

    def load_text(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        return {
            "text_input": self.text_processor(record["caption"]),
            "image_id": record["image_id"],
            "instance_id": str(index),
        }

    def references(self) -> References:
        found: References = {}
        for record in self.records:
            found.setdefault(record["image_id"], []).append(record["caption"])
        return found


class CaptionEvalDataset(MediaDataset):
    """One sample per picture: ``image`` float32 [3, H, W], ``image_id``, ``instance_id``.

    Args:
        records: of `read_caption_records`.
        media: where pictures or clips are read.
        vis_processor: Pillow image -> tensor.
        text_processor: not applied to references; kept for tasks that ask for it.
        references: captions to score against instead of those in the records, by image id.

    Raises:
        DataError: ``references`` lacks a picture, or two pictures have the same image id.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        media: Media,
        vis_processor: BaseProcessor,
        text_processor: BaseProcessor | None = None,
        references: References | None = None,
    ) -> None:
        super().__init__(one_per_image(records), media, vis_processor, text_processor)
        self._ground_truth = references
        for record in self.records if references is not None else ():
            if record["image_id"] not in references:
                raise DataError(
                    f"the ground truth has no caption for image_id {record['image_id']!r} "
                    f"({record['visual']}). Take another file, or none: the annotation's captions serve then."
                )

    def load_text(self, index: int) -> dict[str, Any]:
        return {"image_id": self.records[index]["image_id"], "instance_id": str(index)}

    def references(self) -> References:
        if self._ground_truth is None:
            return {record["image_id"]: record["caption"] for record in self.records}
        return {record["image_id"]: self._ground_truth[record["image_id"]] for record in self.records}


def read_caption_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a Karpathy file: ``visual`` is the file name of the picture or clip, ``caption`` a text
    or a list of texts, ``image_id`` may be there.

    Raises:
        DataError: names the file, the record and what is wrong with it.
    """
    records = read_records(path, ("caption",))
    key = "video" if "video" in records[0] else "image"
    for index, record in enumerate(records):
        place = f"record {index} of {path}"
        if key not in record:
            raise DataError(f"{place} has no '{key}'; it has {', '.join(map(repr, record))}.")
        visual, caption, image_id = record.pop(key), record["caption"], record.get("image_id", 0)
        record["visual"] = visual
        if not isinstance(visual, str) or not visual or text_problem(visual):
            raise DataError(f"{place}: '{key}' must be a file name, not {describe(visual)}.")
        texts = caption if isinstance(caption, list) else [caption]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{place}: 'caption' must be text or a list of it, not {describe(caption)}.")
        for text in texts:
            if problem := text_problem(text):
                raise DataError(f"{place}: 'caption' holds {problem}: {describe(text)}.")
        if not _is_id(image_id):
            raise DataError(f"{place}: 'image_id' must be a number or text, not {describe(image_id)}.")
    return records


def read_ground_truth(path: str | os.PathLike) -> References:
    """Captions by image id from a file in COCO's layout: ``{"annotations": [{"image_id", "caption"}, ..]}``.

    Raises:
        DataError: the file has another layout.
    """
    content = read_annotation(path)
    found: References = {}
    try:
        for annotation in content["annotations"]:
            image_id, caption = annotation["image_id"], annotation["caption"]
            if not _is_id(image_id) or not isinstance(caption, str) or text_problem(caption):
                raise TypeError(f"{image_id!r:.40}: {caption!r:.40}")
            found.setdefault(image_id, []).append(caption)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"ground truth {path} must be {{'annotations': [{{'image_id', 'caption'}}, ..]}}; "
            f"it is {describe(content)}."
        ) from error
    return found


def one_per_caption(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records with exactly ``visual``, ``caption`` (one text) and ``image_id``, in the captions' order."""
    ids = image_ids(records)
    return [
        {"visual": record["visual"], "caption": caption, "image_id": ids[record["visual"]]}
        for record in records
        for caption in _texts(record)
    ]


def one_per_image(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records with exactly ``visual``, ``caption`` (all its texts), ``image_id``, in the pictures' order."""
    captions: dict[str, list[str]] = {}
    for record in records:
        captions.setdefault(record["visual"], []).extend(_texts(record))
    ids = image_ids(records)
    return [{"visual": image, "caption": texts, "image_id": ids[image]} for image, texts in captions.items()]


def image_ids(records: Sequence[Mapping[str, Any]]) -> dict[str, int | str]:
    """An id for every file name: its records' ``image_id``; else the number at the end of the name, as COCO
    counts its pictures; else, where a name has no number or two have the same, the names themselves.

    Raises:
        DataError: two pictures carry the same ``image_id``.
    """
    given = {record["visual"]: record.get("image_id") for record in records}
    if None not in given.values():
        _check_distinct(given)
        return given
    numbers = {image: _number_at_end(image) for image in given}
    if None in numbers.values() or len(set(numbers.values())) < len(numbers):
        return {image: image for image in given}
    return numbers


def _check_distinct(ids: Mapping[str, int | str]) -> None:
    if len(set(ids.values())) == len(ids):
        return
    owners: dict[int | str, str] = {}
    for image, image_id in ids.items():
        if image_id in owners:
            raise DataError(
                f"image_id {image_id!r} is given to two pictures, {owners[image_id]} and {image}. "
                "Give every picture its own, or leave image_id out."
            )
        owners[image_id] = image


def _is_id(value: Any) -> bool:
    """Whether an image id is a number or a text, such as they are written: no null byte, no 4,000 digits."""
    if isinstance(value, str):
        return text_problem(value) is None
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _number_at_end(image: str) -> int | None:
    digits = re.search(r"[0-9]+$", PurePath(image).stem)
    return int(digits.group()) if digits and len(digits.group()) <= 18 else None


def _texts(record: Mapping[str, Any]) -> list[str]:
    caption = record["caption"]
    return caption if isinstance(caption, list) else [caption]
