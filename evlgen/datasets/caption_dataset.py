"""Pictures with captions in Karpathy's JSON layout, for training and for scoring.

Training files are ``[{"image", "caption", "image_id"}]``, others ``[{"image", "caption": [..]}]``. Either
layout is read for either purpose: training sees one sample per caption, scoring one per picture.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from PIL import Image

from evlgen.common.errors import DataError
from evlgen.common.images import open_image
from evlgen.datasets.annotations import describe, read_annotation, read_records, text_problem
from evlgen.datasets.base_dataset import BaseDataset
from evlgen.processors.base_processor import BaseProcessor

References = dict[int | str, list[str]]


class _PictureFiles(BaseDataset):
    """Records whose ``image`` is a file name relative to ``image_root``."""

    image_root: str | os.PathLike

    def picture(self, index: int) -> Image.Image:
        return open_image(self.visual_source(index))

    def load_visual(self, index: int) -> torch.Tensor:
        return self.vis_processor(self.picture(index))

    def visual_source(self, index: int) -> Path:
        return Path(self.image_root, self.records[index]["image"])

    def sample_id(self, index: int) -> str:
        return self.records[index]["image"]


class CaptionDataset(_PictureFiles):
    """One sample per caption: ``image`` float32 [3, H, W], ``text_input``, ``image_id``, ``instance_id``.

    Args:
        records: of `read_caption_records`.
        image_root: the folder that file names are relative to.
        vis_processor: Pillow image -> tensor.
        text_processor: caption -> text to learn.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        image_root: str | os.PathLike,
        vis_processor: BaseProcessor,
        text_processor: BaseProcessor,
    ) -> None:
        super().__init__(one_per_caption(records), vis_processor, text_processor)
        self.image_root = image_root

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


class CaptionEvalDataset(_PictureFiles):
    """One sample per picture: ``image`` float32 [3, H, W], ``image_id``, ``instance_id``.

    Args:
        records: of `read_caption_records`.
        image_root: the folder that file names are relative to.
        vis_processor: Pillow image -> tensor.
        text_processor: not applied to references; kept for tasks that ask for it.
        references: captions to score against instead of those in the records, by image id.

    Raises:
        DataError: ``references`` lacks a picture, or two pictures have the same image id.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        image_root: str | os.PathLike,
        vis_processor: BaseProcessor,
        text_processor: BaseProcessor | None = None,
        references: References | None = None,
    ) -> None:
        super().__init__(one_per_image(records), vis_processor, text_processor)
        self.image_root = image_root
        self._ground_truth = references
        for record in self.records if references is not None else ():
            if record["image_id"] not in references:
                raise DataError(
                    f"the ground truth has no caption for image_id {record['image_id']!r} "
                    f"({record['image']}). Take another file, or none: the annotation's captions serve then."
                )

    def load_text(self, index: int) -> dict[str, Any]:
        return {"image_id": self.records[index]["image_id"], "instance_id": str(index)}

    def references(self) -> References:
        if self._ground_truth is None:
            return {record["image_id"]: record["caption"] for record in self.records}
        return {record["image_id"]: self._ground_truth[record["image_id"]] for record in self.records}


def read_caption_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a Karpathy file: ``image`` is a file name, ``caption`` a text or a list of texts.

    Raises:
        DataError: names the file, the record and what is wrong with it.
    """
    records = read_records(path, ("image", "caption"))
    for index, record in enumerate(records):
        image, caption, image_id = record["image"], record["caption"], record.get("image_id", 0)
        if not isinstance(image, str) or not image or text_problem(image):
            raise DataError(f"record {index} of {path}: 'image' must be a file name, not {describe(image)}.")
        texts = caption if isinstance(caption, list) else [caption]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"record {index} of {path}: 'caption' must be text or a list of it, not {describe(caption)}."
            )
        for text in texts:
            if problem := text_problem(text):
                raise DataError(f"record {index} of {path}: 'caption' holds {problem}: {describe(text)}.")
        if not _is_id(image_id):
            raise DataError(
                f"record {index} of {path}: 'image_id' must be a number or text, not {describe(image_id)}."
            )
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
    """Records with exactly ``image``, ``caption`` (one text) and ``image_id``, in the captions' order."""
    ids = image_ids(records)
    return [
        {"image": record["image"], "caption": caption, "image_id": ids[record["image"]]}
        for record in records
        for caption in _texts(record)
    ]


def one_per_image(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records with exactly ``image``, ``caption`` (all its texts), ``image_id``, in the pictures' order."""
    captions: dict[str, list[str]] = {}
    for record in records:
        captions.setdefault(record["image"], []).extend(_texts(record))
    ids = image_ids(records)
    return [{"image": image, "caption": texts, "image_id": ids[image]} for image, texts in captions.items()]


def image_ids(records: Sequence[Mapping[str, Any]]) -> dict[str, int | str]:
    """An id for every file name: its records' ``image_id``; else the number at the end of the name, as COCO
    counts its pictures; else, where a name has no number or two have the same, the names themselves.

    Raises:
        DataError: two pictures carry the same ``image_id``.
    """
    given = {record["image"]: record.get("image_id") for record in records}
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
