"""The contract of datasets: one record becomes one sample, or a note that it could not be read."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate

from evlgen.batch import Batch
from evlgen.common.errors import DataError
from evlgen.datasets.media import Media
from evlgen.processors.base_processor import BaseProcessor

logger = logging.getLogger(__name__)

_CHARS_PER_TOKEN = 4  # about; an image counts as many tokens as a model commonly has soft prompts for it
_TOKENS_PER_IMAGE = 64
_LARGEST_SHOWN = 512  # pixels of a side
_TEXTS = (
    "caption",
    "question",
    "answers",
)  # keys of records: a text, or a list of which one is read at a time


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be read: its index in the dataset, what its records call it, and why.

    Attributes:
        index: None in a stream, whose samples have none.
        cause: see `DataError`.
        lost_share: where it stands for more than a sample, such as a shard: the share of the dataset that is
            lost with it.
        dataset: the dataset's name in the run.
    """

    index: int | None
    id: str
    reason: str
    cause: str = "unreadable"
    lost_share: float = 0.0
    dataset: str = ""


@dataclass(frozen=True)
class BadRecord:
    """Stands among a dataset's records in the place of one that makes no sample.

    Attributes:
        id: what reports call it: ``record 17 of captions.json``.
        reason: what is wrong with it.
        cause: see `DataError`.
        lost_share: see `Skipped`.
    """

    id: str
    reason: str
    cause: str = "bad record"
    lost_share: float = 0.0


class CollatedDataset(Dataset):
    """Items by index, and how a batch is made of them."""

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} must define __len__()")

    def collater(self, samples: Sequence[Any]) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define collater(samples)")


class BaseDataset(CollatedDataset):
    """Records, and how one of them becomes a sample.

    A subclass defines `load_sample`, or its two halves `load_visual` and `load_text`, and, where captions are
    scored, `references`. With the halves and `visual_source`, ``run.cache_vision`` can keep what a frozen
    encoder makes of the visuals. A sample that cannot be read comes out as `Skipped` in its own place: no
    other sample is moved or put in its stead. Randomness comes from the global generators of Python, numpy
    and torch alone, so that whoever seeds them decides what a sample looks like.

    Args:
        records: one entry per sample, or a `BadRecord`.
        vis_processor: for the image or video of a sample.
        text_processor: for its text.

    Raises:
        DataError: there are no records.
    """

    def __init__(
        self,
        records: Sequence[Any],
        vis_processor: BaseProcessor | None = None,
        text_processor: BaseProcessor | None = None,
    ) -> None:
        if not len(records):
            raise DataError(f"{type(self).__name__} has no records: it can be neither trained on nor scored.")
        self.records = records
        self.vis_processor: Any = vis_processor  # None only where a dataset has no visuals
        self.text_processor: Any = text_processor  # None only where a dataset has no texts

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any] | Skipped:
        record = self.records[index]
        if isinstance(record, BadRecord):
            return Skipped(index, record.id, record.reason, record.cause, record.lost_share)
        try:
            return self.load_sample(index)
        except DataError as error:
            return Skipped(index, self.sample_id(index), str(error), error.cause)
        except OSError as error:
            return Skipped(index, self.sample_id(index), str(error))

    def load_sample(self, index: int) -> dict[str, Any]:
        """The sample of a record. Raises `DataError` or `OSError` where it cannot be read."""
        return {"image": self.load_visual(index), **self.load_text(index)}

    def load_visual(self, index: int) -> torch.Tensor:
        """The pixels of a sample, [3, H, W] or, for a video, [3, T, H, W]. Raises as `load_sample`."""
        raise NotImplementedError(
            f"{type(self).__name__} must define load_sample(index), or load_visual(index) and "
            "load_text(index)"
        )

    def load_text(self, index: int) -> dict[str, Any]:
        """What a sample holds besides its pixels: texts and ids. Raises as `load_sample`."""
        raise NotImplementedError(f"{type(self).__name__} must define load_text(index) beside load_visual")

    def visual_source(self, index: int) -> Hashable:
        """What the pixels of a sample are made from, equal for samples that show the same.

        Either the `pathlib.Path` of a file, whose size and time tell when it changed, or any value whose text
        is another one when the image is another one.
        """
        raise NotImplementedError(f"{type(self).__name__} must define visual_source(index)")

    def visual_sources(self) -> Iterator[Hashable]:
        """`visual_source` of all samples, in their order."""
        return map(self.visual_source, range(len(self)))

    def sample_id(self, index: int) -> str:
        """What a report calls the sample; by default its index."""
        return str(index)

    def references(self) -> dict[int | str, list[str]]:
        """What people wrote about each image or video, by image id; empty where no text is scored."""
        return {}

    def answers(self) -> dict[int | str, list[str]]:
        """What people answered to each question, by question id; empty where no answer is scored."""
        return {}

    def answer_types(self) -> dict[int | str, str]:
        """The kind of each question's answer (``yes/no``, ``number``, ``other``), by question id; empty where
        it is not known."""
        return {}

    def question_types(self) -> dict[int | str, str]:
        """The kind of each question (``how many``), by question id; empty where it is not known."""
        return {}

    def correct_choices(self) -> dict[int | str, str]:
        """The right one of each question's ``choices``, by question id; empty where none are given."""
        return {}

    def answer_list(self) -> list[str]:
        """The answers that ranking chooses from for every question; empty where there is no such list."""
        return []

    def domains(self) -> dict[int | str, str]:
        """The part of the dataset that each image belongs to, by image id, for scores of each part; empty
        where there are no parts."""
        return {}

    def image(self, index: int) -> Image.Image | None:
        """The image of a record as a person sees it, for sheets of results; None where there is none."""
        return None

    def picture(self, index: int) -> Image.Image | None:
        """The earlier name of `image`. A subclass may still define it in its place."""
        return self.image(index)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "picture" in vars(cls) and "image" not in vars(cls):
            cls.image = cls.picture  # type: ignore[method-assign]  # the earlier name

    def extra_metrics(self, captions: Mapping[int | str, str]) -> dict[str, float]:
        """What only this dataset can judge about captions, by metric name.

        Args:
            captions: what was written, by image id.
        """
        return {}

    def collater(self, samples: Sequence[Mapping[str, Any] | Skipped]) -> Batch:
        """A batch of samples; see `collate`."""
        return collate(samples, ("image",) if getattr(self.vis_processor, "shapes_differ", False) else ())


class SequenceDataset(BaseDataset):
    """Records whose samples show none, one or several images and videos, in ``images``.

    A subclass defines `load_text`, `visuals`, `load_one` and `source_of`.
    """

    def load_sample(self, index: int) -> dict[str, Any]:
        return {"images": [self.load_one(visual) for visual in self.visuals(index)], **self.load_text(index)}

    def visuals(self, index: int) -> Sequence[Hashable]:
        """What names each image and video of a sample, in the order of their places."""
        raise NotImplementedError(f"{type(self).__name__} must define visuals(index)")

    def load_one(self, visual: Any) -> torch.Tensor:
        """The pixels of one of `visuals`, [3, H, W] or, of a video, [3, T, H, W]. Raises as `load_sample`."""
        raise NotImplementedError(f"{type(self).__name__} must define load_one(visual)")

    def source_of(self, visual: Any) -> Hashable:
        """What the pixels of one of `visuals` are made from; see `visual_source`."""
        raise NotImplementedError(f"{type(self).__name__} must define source_of(visual)")


class MediaDataset(BaseDataset):
    """Records, mappings with ``visual``: the name of an image or video among ``media``.

    A subclass defines `load_text`.

    Args:
        records: see above.
        media: where images or videos are read.
        vis_processor: of what ``media`` opens -> tensor.
        text_processor: of a text.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any] | BadRecord],
        media: Media,
        vis_processor: BaseProcessor,
        text_processor: BaseProcessor | None = None,
    ) -> None:
        super().__init__(records, vis_processor, text_processor)
        self.media = media

    def load_visual(self, index: int) -> torch.Tensor:
        draft_size = getattr(self.vis_processor, "draft_size", None)
        return self.vis_processor(self.media.open(self._visual(index), draft_size))

    def visual_source(self, index: int) -> Hashable:
        record = self.records[index]
        return record.id if isinstance(record, BadRecord) else self.media.source(record["visual"])

    def visual_sources(self) -> Iterator[Hashable]:
        if type(self).visual_source is not MediaDataset.visual_source:  # a subclass's own
            yield from super().visual_sources()
            return
        source = functools.cache(self.media.source)  # an image with five captions is looked at once
        for record in self.records:
            yield record.id if isinstance(record, BadRecord) else source(record["visual"])

    def image(self, index: int) -> Image.Image:
        return self.media.image(self._visual(index))

    def sample_id(self, index: int) -> str:
        record = self.records[index]
        return record.id if isinstance(record, BadRecord) else record["visual"]

    def size(self, index: int) -> int:
        """About how many positions a sample takes, for batches of samples of similar length
        (``run.group_by_length``), by the texts of its record; 0 for a `BadRecord`."""
        record = self.records[index]
        return (
            0 if isinstance(record, BadRecord) else about_positions(*(record.get(key, "") for key in _TEXTS))
        )

    def _visual(self, index: int) -> str:
        record = self.records[index]
        if isinstance(record, BadRecord):
            raise DataError(record.reason, record.cause)
        return record["visual"]


def image_to_show(dataset: BaseDataset, index: int) -> Image.Image | None:
    """`BaseDataset.image`, no side longer than 512 pixels: a sheet of large photographs would take gigabytes.
    None with a warning where it cannot be read any more: sheets of results do without it."""
    try:
        image = dataset.image(index)
    except (DataError, OSError) as error:
        logger.warning("an image is not shown: %s", error)
        return None
    if image is not None and max(image.size) > _LARGEST_SHOWN:
        image = image.copy()  # the dataset may keep its own
        image.thumbnail((_LARGEST_SHOWN, _LARGEST_SHOWN))
    return image


def about_positions(*texts: str | Sequence[str], num_images: int = 1) -> int:
    """About how many positions a sample takes: of a list of texts the longest counts."""
    chars = sum(len(text) if isinstance(text, str) else max(map(len, text), default=0) for text in texts)
    return chars // _CHARS_PER_TOKEN + _TOKENS_PER_IMAGE * num_images


def collate(samples: Sequence[Mapping[str, Any] | Skipped], may_differ: Collection[str] = ()) -> Batch:
    """A batch (`evlgen.batch.Batch`): tensors stacked along a new first dimension, everything else in
    lists.

    Args:
        may_differ: keys whose tensors stay in a list where their shapes differ.

    ``skipped`` lists what could not be read and is always there; when nothing was read it is the only key.

    Raises:
        DataError: the tensors of one key differ in shape; samples have different keys.
    """
    read = [sample for sample in samples if not isinstance(sample, Skipped)]
    for sample in read:
        if sample.keys() != read[0].keys():
            raise DataError(_different_keys(read[0], sample))
    batch: dict[str, Any] = {
        key: _batched(key, [sample[key] for sample in read], key in may_differ)
        for key in (read[0] if read else ())
    }
    batch["skipped"] = [sample for sample in samples if isinstance(sample, Skipped)]
    return cast(Batch, batch)


def _different_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    kinds = [
        f"{', '.join(sorted(own.keys() - rest.keys())) or 'nothing else'}"
        f"{f' (dataset {name!r})' if (name := own.get('dataset')) else ''}"
        for own, rest in ((one, other), (other, one))
    ]
    return (
        f"samples of one batch have different keys: one has {kinds[0]} where another has {kinds[1]}. Only "
        "datasets whose samples have the same keys can be mixed: all of captions, or all of questions with "
        "the same train_answers. Take one of them out of datasets."
    )


def _batched(key: str, values: list[Any], may_differ: bool) -> torch.Tensor | list[Any]:
    if not isinstance(values[0], torch.Tensor):
        return values
    shapes = {tuple(value.shape) for value in values}
    if len(shapes) > 1:
        if may_differ:
            return values
        raise DataError(
            f"'{key}' has samples of different shapes in one batch: {', '.join(map(str, sorted(shapes)))}. "
            "A processor must give every sample the same shape."
        )
    if len({value.dtype for value in values}) == 1:
        return default_collate(values)  # in a loader's process straight into memory that others read
    return torch.stack(values)
