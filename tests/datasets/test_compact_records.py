"""Records packed into two tensors."""

from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from evlgen.datasets import compact_records as packed
from evlgen.datasets.base_dataset import BadRecord
from evlgen.datasets.compact_records import PackedRecords

RECORDS = [{"visual": f"{i}.jpg", "caption": ["caf\u00e9", "x" * i], "image_id": i} for i in range(10)]


def test_what_comes_out_is_what_went_in(monkeypatch) -> None:
    monkeypatch.setattr(packed, "_CHUNK", 4)
    records = [*RECORDS, BadRecord("record 3 of x.json", "it is bad.", "bad record"), "text", 7]
    found = PackedRecords(iter(records))
    assert len(found) == 13 and list(found) == records
    assert [found[i] for i in range(-13, 13)] == records * 2
    assert list(pickle.loads(pickle.dumps(found))) == records


@pytest.mark.parametrize("index", [10, -11])
def test_an_index_beyond_the_end_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match=f"record {index} of 10"):
        PackedRecords(RECORDS)[index]


def test_no_records_are_a_sequence_of_none() -> None:
    assert list(PackedRecords([])) == []


def test_a_record_that_was_changed_after_it_came_out_is_as_it_was() -> None:
    found = PackedRecords(RECORDS)
    found[0]["caption"].append("more")
    assert found[0] == RECORDS[0]


def test_what_is_sent_to_a_spawned_worker_is_the_same_memory() -> None:
    found = PackedRecords(RECORDS)
    received = pickle.loads(ForkingPickler.dumps(found))
    assert list(received) == RECORDS
    found._ends[1] = 0
    assert received._ends[1] == 0 and received._data.is_shared()


def test_the_tensors_hold_little_more_than_the_texts() -> None:
    records = [{"visual": f"images/{i:08}.jpg", "caption": "a caption of usual length"} for i in range(1000)]
    found = PackedRecords(records)
    texts = sum(len(key) + len(text) for record in records for key, text in record.items())
    assert found._data.nbytes < texts + 40 * 1000 and found._ends.dtype == torch.int64
