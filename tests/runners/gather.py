"""Two processes gather what they have; the first prints what both got, and whether anything was pickled."""

from __future__ import annotations

import json
import os

rank = 0 if os.fork() else 1
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from accelerate import PartialState  # noqa: E402

from evlgen.runners.gathering import gather_records, gather_rows  # noqa: E402

state = PartialState(cpu=True)
pickled = []
all_gather_object = dist.all_gather_object
dist.all_gather_object = lambda *args, **options: (pickled.append(1), all_gather_object(*args, **options))
plain = [
    [{"image_id": 7, "caption": "ein Würfel \ud83d", "scores": [0.1 + 0.2, float("inf"), -0.0], "x": None}],
    [{"image_id": "a/b.jpg", "caption": "", "is": True, "one": 1.0}, "x", 3, {}],
]
cases = {
    "plain": plain[rank],
    "one has none": plain[0] if rank else [],
    "none has any": [],
    "a tuple": [(1, 2)] if rank else [[1, 2]],
    "a key that is a number": [{1: "a"}] if rank else [],
    "a tensor": [torch.ones(2)] if rank == 0 else [],
}
found = {}
for name, own in cases.items():
    pickled.clear()
    got = gather_records(own)
    found[name] = [repr(got), bool(pickled)]
rows = [torch.arange(6.0).view(2, 3), torch.full((1, 3), 7.0), torch.zeros(0, 3)]
found["rows"] = gather_rows(rows[rank]).tolist()
found["rows of one"] = gather_rows(rows[2 - 2 * rank]).tolist()
everyone = [None, None]
all_gather_object(everyone, found)
if rank == 0:
    assert everyone[0] == everyone[1]
    print(json.dumps(found))
state.destroy_process_group()
if rank:
    os._exit(0)
os.wait()
