"""Records of annotation files: one that makes no sample is noted in its place and fails nothing else."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from evlgen.common.errors import DataError
from evlgen.datasets.base_dataset import BadRecord
from evlgen.datasets.compact_records import PackedRecords


def sift(
    items: Iterable[Any],
    path: str | os.PathLike,
    parse: Callable[[Any, str], Iterable[Any]],
    what: str = "record",
) -> PackedRecords:
    """What a file's items make, in their order; a `BadRecord` stands where one is bad.

    Args:
        items: of the file; a `BadRecord` among them passes.
        parse: (item, place) -> records, `BadRecord`s among them where part of an item is bad. What it raises
            as `DataError` says what is wrong with the item; the place, ``record 17 of x.json``, goes before.
        what: what the file's items are called.

    Raises:
        DataError: there are no items, or all of them are bad: it is another kind of file.
    """

    def parsed() -> Iterator[Any]:
        for index, item in enumerate(items):
            place = f"{what} {index} of {path}"
            if isinstance(item, BadRecord):
                yield item
                continue
            try:
                yield from parse(item, place)
            except DataError as error:
                yield BadRecord(place, str(error), error.cause)

    records = PackedRecords(parsed())
    if not len(records):
        raise DataError(f"annotation {path} has no {what}s: it can be neither trained on nor scored.")
    refuse_bad(records)
    return records


def refuse_bad(records: Sequence[Any]) -> None:
    """Raises `DataError` for the first record where not one of them makes a sample."""
    if all(isinstance(record, BadRecord) for record in records):
        first = records[0]
        others = f" So it is with all {len(records)} of them." if len(records) > 1 else ""
        raise DataError(f"{first.id}: {first.reason}{others}", first.cause)


def good(records: Iterable[Any]) -> Iterator[Any]:
    """Those that are no `BadRecord`."""
    return (record for record in records if not isinstance(record, BadRecord))


def digest(records: Sequence[Any]) -> str | None:
    """A sum of all records in their order; None where they cannot be told apart.

    Of files and folders the names count, not where they lie.
    """
    if isinstance(records, PackedRecords):
        return records.digest()
    digest = hashlib.blake2b(digest_size=16)
    try:
        for record in [repr(records)] if isinstance(records, range) else records:
            is_path = isinstance(record, str | os.PathLike)
            digest.update(pickle.dumps(os.path.basename(record) if is_path else record))
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    return digest.hexdigest()
