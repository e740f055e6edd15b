"""The contract of streams: datasets that are too large to be shuffled by index, and come in an order of their
own.

A stream is read in *partitions*: endless sequences, side by side, of which each goes again and again through
a part of the stream. Training batches take the partitions in turn, so that several processes can read at the
same time, each going on where it was. What a partition holds at an ordinal follows from the seed alone, as
long as all of the stream can be read, so a run that is resumed asks for the next ordinals and gets what it
would have got.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from PIL import Image

from evlgen.common.errors import DataError
from evlgen.datasets.base_dataset import BadRecord, BaseDataset, Skipped
from evlgen.processors.base_processor import BaseProcessor


class Partition(NamedTuple):
    """One of ``count`` partitions of all processes together, whose order follows from ``seed``."""

    seed: int
    index: int  # type: ignore[assignment]  # not that of tuples
    count: int  # type: ignore[assignment]  # nor this


class StreamDataset(BaseDataset):
    """A dataset that is read by partition and ordinal.

    A subclass defines `places`, `load_place` and `place_id`, and sets ``num_samples``. A *place* says where
    a sample is, and is small; a `BadRecord` stands for one that cannot be read. Samples have the keys of
    map-style ones, so that both can stand in one batch.

    Attributes:
        num_samples: how many there are; None where unknown. Asking may take seconds: who need not know
            does not ask.
    """

    num_samples: int | None = None

    def __init__(
        self,
        records: Sequence[Any],
        vis_processor: BaseProcessor,
        text_processor: BaseProcessor | None = None,
    ) -> None:
        super().__init__(records, vis_processor, text_processor)
        self._cursors: dict[Partition, _Cursor] = {}

    def places(self, partition: Partition | None, number: int = 0) -> Iterator[Any]:
        """A partition's samples in its pass of that number; with None, all samples of the stream as they lie.

        Every pass of a partition has the same places in another order; those of different partitions (of one
        seed and count) have none in common.
        """
        raise NotImplementedError(f"{type(self).__name__} must define places(partition, number)")

    def load_place(self, place: Any) -> dict[str, Any]:
        """The sample at a place. Raises `DataError` or `OSError` where it cannot be read."""
        raise NotImplementedError(f"{type(self).__name__} must define load_place(place)")

    def place_id(self, place: Any) -> str:
        """What a report calls the sample at a place."""
        raise NotImplementedError(f"{type(self).__name__} must define place_id(place)")

    def image_at(self, place: Any) -> Image.Image | None:
        """The image there as a person sees it; None where there is none."""
        return None

    def __len__(self) -> int:
        if self.num_samples is None:
            raise DataError(f"{type(self).__name__} does not know how many samples it has.")
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any] | Skipped:
        raise TypeError(f"{type(self).__name__} is read by partition; listed() can be read by index")

    def read(self, partition: Partition, ordinal: int) -> dict[str, Any] | Skipped:
        """The sample at an ordinal of a partition, counted from 0 over all passes.

        Quick for the ordinal after the last one asked for; for another one the partition's places are gone
        through without reading samples.

        Raises:
            DataError: the stream has no samples.
        """
        if partition not in self._cursors:
            self._cursors[partition] = _Cursor(self, partition)
        return self.read_place(self._cursors[partition].place(ordinal))

    def read_place(self, place: Any) -> dict[str, Any] | Skipped:
        """The sample at a place, or why it cannot be read."""
        if isinstance(place, BadRecord):
            return Skipped(None, place.id, place.reason, place.cause, place.lost_share)
        name = self.place_id(place)
        try:
            return {**self.load_place(place), "sample_id": name}
        except DataError as error:
            return Skipped(None, name, str(error), error.cause)
        except OSError as error:
            return Skipped(None, name, str(error))

    def listed(self) -> BaseDataset:
        """All samples as they lie, to be read by index."""
        return _Listed(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cursors": {}}  # another process begins its own


class _Listed(BaseDataset):
    """A stream's samples by index."""

    def __init__(self, stream: StreamDataset) -> None:
        super().__init__(list(stream.places(None)), stream.vis_processor, stream.text_processor)
        self._stream = stream

    def load_sample(self, index: int) -> dict[str, Any]:
        return self._stream.load_place(self.records[index])

    def load_text(self, index: int) -> dict[str, Any]:
        return {k: v for k, v in self.load_sample(index).items() if k not in ("image", "images")}

    def visual_source(self, index: int) -> str:
        return self.sample_id(index)  # no two samples of a stream are told to show the same

    def image(self, index: int) -> Image.Image | None:
        return self._stream.image_at(self.records[index])

    def sample_id(self, index: int) -> str:
        place = self.records[index]
        return place.id if isinstance(place, BadRecord) else self._stream.place_id(place)


class _Cursor:
    """Where in a partition a process is."""

    def __init__(self, stream: StreamDataset, partition: Partition) -> None:
        self._stream, self._partition = stream, partition
        self._begin(0, 0)

    def place(self, ordinal: int) -> Any:
        """What is at an ordinal of the partition."""
        if ordinal < self._next:
            self._begin(0, 0)
        while True:
            for place in self._places:
                self._next += 1
                if self._next > ordinal:
                    return place
            length = self._next // (self._pass + 1)  # of each pass
            if length:
                self._begin(ordinal // length, length)
            elif self._partition.count > 1:  # fewer samples than partitions: this one shares all of them
                self._partition = Partition(self._partition.seed, 0, 1)
                self._begin(0, 0)
            else:
                raise DataError("a stream has no samples: there is nothing to train on.")

    def _begin(self, number: int, length: int) -> None:
        self._pass, self._next = number, number * length
        self._places = self._stream.places(self._partition, number)
