"""The order of the training data and the loaders.

Which samples a batch holds, and every random choice made while reading a sample, are functions of (seed,
epoch, index) alone: not of the number of workers, nor of where a run was interrupted. So it is with streams
(`mixed_plan`), by partition and ordinal.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import errno
import functools
import logging
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from multiprocessing.reduction import ForkingPickler
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from evlgen.batch import Batch
from evlgen.common.errors import EVLGenError, TrainingError
from evlgen.datasets.base_dataset import BaseDataset, CollatedDataset, Skipped
from evlgen.datasets.stream import StreamDataset
from evlgen.loaders.batch_plan import BatchPlan
from evlgen.loaders.interruption import leave_to_parent
from evlgen.loaders.mixed_plan import MixedPlan, StreamSlot

logger = logging.getLogger(__name__)

_SHARED_MEMORY = "/dev/shm"


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds Python's, NumPy's and torch's CPU generators inside the block and, but for worker processes,
    which do nothing else, puts their states back after it."""
    own_process = get_worker_info() is not None
    states = None if own_process else (random.getstate(), np.random.get_state(), torch.get_rng_state())
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also queue a call for each GPU
    try:
        yield
    finally:
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


class _SeededDataset(Dataset):
    """Reads a plan's (place, seed) from several datasets, with all random generators seeded, and notes what
    to call the sample in messages, ``sample_id``, and which ``dataset`` it is of. A place is an index in all
    map-style datasets one after the other, or a `StreamSlot`."""

    def __init__(self, datasets: Mapping[str, BaseDataset]) -> None:
        self.datasets, self.names = list(datasets.values()), list(datasets)
        self._ends = list(accumulate(0 if isinstance(d, StreamDataset) else len(d) for d in self.datasets))

    def __getitem__(self, pair: tuple[int | StreamSlot, int]):
        place, seed = pair
        with seeded(seed):
            which, sample = self._in_map(place) if isinstance(place, int) else self._in_stream(place)
        if isinstance(sample, Skipped):
            return dataclasses.replace(sample, dataset=self.names[which])
        if isinstance(sample, dict):
            sample["dataset"] = self.names[which]
            if len(self.names) > 1:
                sample["sample_id"] = f"{self.names[which]}: {sample['sample_id']}"
        return sample

    def _in_map(self, index: int) -> tuple[int, Any]:
        which = bisect.bisect_right(self._ends, index)
        index -= self._ends[which - 1] if which else 0
        sample = self.datasets[which][index]
        if isinstance(sample, dict):
            sample["sample_id"] = self.datasets[which].sample_id(index)
        return which, sample

    def _in_stream(self, slot: StreamSlot) -> tuple[int, Any]:
        dataset = self.datasets[slot.dataset]
        assert isinstance(dataset, StreamDataset)
        return slot.dataset, dataset.read(slot.partition, slot.ordinal)


def train_loader(
    datasets: Mapping[str, BaseDataset], plan: BatchPlan | MixedPlan, num_workers: int, pin_memory: bool
) -> DataLoader:
    """An endless loader over the datasets, by name, in the plan's order."""
    return DataLoader(
        _SeededDataset(datasets),
        batch_sampler=plan,
        collate_fn=_Collater(next(iter(datasets.values())).collater),
        num_workers=_workers(num_workers),
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else each new iterator would draw from the generator dropout uses
    )


def eval_loader(
    dataset: CollatedDataset,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    rank: int = 0,
    world_size: int = 1,
    max_samples: int | None = None,
) -> DataLoader:
    """A loader over a rank's share of the samples, in order: what the ranks see, one after the other, is the
    dataset, each sample once; or ``max_samples`` of it, spread evenly."""
    indices = evenly_spread(len(dataset), max_samples)
    first, end = (len(indices) * r // world_size for r in (rank, rank + 1))
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=indices[first:end],
        collate_fn=_Collater(dataset.collater),
        num_workers=_workers(num_workers, len(indices) // (batch_size * world_size)),
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else each new iterator would draw from the generator dropout uses
    )


class _Collater:
    """Makes a batch of samples and, in a worker process, sends it off: what cannot be sent, such as a batch
    larger than the shared memory that is left, fails like a sample that cannot be read. torch would send it
    in a thread of the worker, whose failure nobody learns of, and be waited for for ever."""

    def __init__(self, collate: Callable[[Sequence[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Any]) -> Any:
        batch = self.collate(samples)
        return batch if get_worker_info() is None else _Sent(bytes(ForkingPickler.dumps(batch)))


class _Sent:
    """Something pickled, that becomes the thing itself where it arrives."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return pickle.loads, (self.content,)


@contextlib.contextmanager
def workers_named() -> Iterator[None]:
    """Says plainly why a data-loading process failed or died. torch raises what it learns of a death out of a
    signal handler, in the middle of any line: the block is to be around all that is done with a loader.

    Raises:
        TrainingError: a process died; shared memory or file handles ran out.
        EVLGenError: what a process raised, without the traceback that torch puts into its message.
    """
    try:
        yield
    except EVLGenError as error:
        name = f"{type(error).__module__}.{type(error).__qualname__}: "
        text = str(error).replace("\\n", "\n")  # messages show line breaks escaped, those of a traceback too
        _, is_from_worker, message = text.partition(f"\n{name}")
        if not is_from_worker:
            raise
        raise type(error)(message.rstrip()) from None
    except (RuntimeError, OSError) as error:
        problem = _worker_problem(error)
        if problem is None:
            raise
        raise TrainingError(problem) from error


def _worker_problem(error: RuntimeError | OSError) -> str | None:
    """What an error of torch says about data-loading processes, and what to do; None where it does not."""
    text = str(error.__cause__ or "") or str(error)  # the cause of "exited unexpectedly" names the signal
    shown = text.strip().splitlines()[-1].removeprefix("RuntimeError: ").strip().rstrip(".") if text else ""
    has_no_space = isinstance(error, OSError) and error.errno == errno.ENOSPC
    shared = shutil.disk_usage(_SHARED_MEMORY) if os.path.isdir(_SHARED_MEMORY) else None
    is_full = shared is not None and has_no_space and not shared.free
    if is_full or re.search(r"shared memory|</torch_|Bus error", text):
        size = f"has {shared.total / 1e6:.0f} MB in all" if shared else "is not there"
        return (
            f"a data-loading process found no room for a batch in shared memory ({shown}). "
            f"{_SHARED_MEMORY} {size}: raise it (docker run --shm-size=8g), lower run.num_workers (0 needs "
            "none), or lower the batch size."
        )
    if "Too many open files" in text:
        return (
            "the data-loading processes have too many open files. Raise the limit (ulimit -n 65536), or "
            "lower run.num_workers (0 needs none)."
        )
    if "DataLoader worker" in str(error) and ("exited" in str(error) or "killed" in str(error)):
        return (
            f"a data-loading process died ({shown or error}), often because memory ran out. Lower "
            "run.num_workers or the batch size. Checkpoints saved so far are whole: run.resume=auto goes on "
            "from the newest."
        )
    return None


def evenly_spread(length: int, count: int | None) -> Sequence[int]:
    """The indices of ``count`` of ``length`` samples, or of all where there are no more."""
    if count is None or count >= length:
        return range(length)
    return [i * length // count for i in range(count)]


def _workers(wanted: int, batches: int | None = None) -> int:
    """No more worker processes than there are cores to run them, or batches to make."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if wanted > cores:
        _tell_of_cores(wanted, cores)
    return min(wanted, cores, wanted if batches is None else batches)


@functools.cache  # once is enough
def _tell_of_cores(wanted: int, cores: int) -> None:
    logger.info("run.num_workers: %d workers of %d, as this process may use so many cores", cores, wanted)


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    leave_to_parent()


def to_device(samples: Batch, device: torch.device) -> Batch:
    """Moves the tensors of a batch."""
    moved = {
        k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in samples.items()
    }
    return cast(Batch, moved)


def batch_size(samples: Mapping[str, Any]) -> int:
    """The number of samples in a batch."""
    return max((len(v) for v in samples.values() if hasattr(v, "__len__")), default=0)


def rows_of(samples: Batch, rows: Sequence[int]) -> Batch:
    """Some of the samples of a batch."""
    values: Mapping[str, Any] = samples
    chosen = {
        key: value[list(rows)] if isinstance(value, torch.Tensor) else [value[row] for row in rows]
        for key, value in values.items()
        if rows
    }
    return cast(Batch, chosen)
