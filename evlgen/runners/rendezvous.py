"""Where the processes of a run that torchrun started find each other, also when it starts them again.

torchrun keeps one store for all attempts at a run (`pytorch#135712`): a process that is started again may
find the addresses of processes that are dead, and wait for them for ever. ``TORCHELASTIC_RESTART_COUNT`` does
not tell the attempts apart: machines count for themselves (`pytorch#108158`).
"""

from __future__ import annotations

import datetime
import json
import os
import time
import uuid
from typing import Any

import torch.distributed as dist

_POLL = 0.05  # seconds


def meeting(timeout: datetime.timedelta) -> dict[str, Any]:
    """Arguments for `torch.distributed.init_process_group`: a part of torchrun's store that only this attempt
    uses. Nothing where torchrun did not start this process, or it alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return {}
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    word = agree(store, rank, world_size)
    return {"store": dist.PrefixStore(word, store), "rank": rank, "world_size": world_size}


def agree(store: dist.Store, rank: int, world_size: int) -> str:
    """A word that the processes of this attempt have together and no other attempt has.

    Each writes a word of its own; the first process writes the list of all words it sees, until every other
    has answered that its own is in it, so that none of the words is of an earlier attempt. The list's first
    word, the first process's, is the common one.
    """
    own = uuid.uuid4().hex
    store.set(f"word/{rank}", own)
    if rank == 0:
        answers = [f"{own}/{other}" for other in range(1, world_size)]
        while not store.check(answers):
            words = [store.get(f"word/{other}").decode() for other in range(world_size)]
            store.set("words", json.dumps(words))
            time.sleep(_POLL)
        return own
    while (words := json.loads(store.get("words")))[rank : rank + 1] != [own]:
        time.sleep(_POLL)
    store.set(f"{words[0]}/{rank}", "")
    return words[0]
