"""Processes find those of their own attempt in a store that still holds the words of earlier ones."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from evlgen.runners.rendezvous import agree, meeting


class TellingStore(dist.HashStore):
    """Says when a key is first read."""

    def __init__(self, key):
        super().__init__()
        self.key, self.is_read = key, threading.Event()

    def get(self, key):
        if key == self.key:
            self.is_read.set()
        return super().get(key)


@pytest.mark.parametrize("last", [0, 1, 2])
def test_every_attempt_has_a_word_of_its_own_whoever_comes_last(last):
    store = TellingStore("words" if last == 0 else f"word/{last}")
    found = []
    for _ in range(3):
        store.is_read.clear()
        with ThreadPoolExecutor(3) as pool:
            others = [pool.submit(agree, store, rank, 3) for rank in range(3) if rank != last]
            assert store.is_read.wait(10)  # what the last one left there in the attempt before, if anything
            words = {agree(store, last, 3), *(other.result(10) for other in others)}
        assert len(words) == 1
        found += words
    assert len(set(found)) == 3


def test_a_process_alone_meets_nobody(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert meeting(None) == {}
