"""CUDA graphs: the kernels a function launches are recorded once, and launched again together.

In generation a processor launches some hundred small kernels for each token, and the card waits for it: a
token took 16 to 25 ms where reading the weights takes 1.3. What is recorded must launch the same kernels on
the same memory every time: its inputs and results stay where they are, and nothing in it waits for the card.
A function for which that is not so is found out by running it once while waiting is forbidden, before
anything is recorded; it then runs as without graphs, and one line in the log says so.

A shape is recorded when it comes the second time: recording takes longer than a single caption.
``EVLGEN_CUDA_GRAPHS=0`` in the environment turns all of it off.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_UNRECORDED_USES = 1  # of a shape, before it is recorded
_MOST_SHAPES = 1000  # whose uses are counted
_MEMORY_FRACTION = 0.15  # of a card's memory: what is kept of a module's recordings
_recording = threading.Lock()  # one thread records at a time


class Recording(Protocol):
    """Functions without arguments over tensors that stay where they are."""

    @property
    def num_bytes(self) -> int:
        """Of those tensors, once the functions have run."""
        ...

    def functions(self) -> list[Callable[[], None]]:
        """In the order in which they run first."""
        ...

    def play(self, functions: list[Callable[[], None]]) -> None:
        """Takes what runs in place of `functions` from now on."""
        ...


R = TypeVar("R", bound=Recording)


class RecordedCall:
    """A function from one tensor to one; it and an example of its input."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.input, self.output = x.clone(), x.new_empty(0)
        # the function is here alone: what is recorded does not keep a model alive
        self._run: Callable[[], None] = partial(self._compute, function)

    def __call__(self, x: Tensor) -> Tensor:
        self.input.copy_(x)
        self._run()
        return self.output.clone()

    def functions(self) -> list[Callable[[], None]]:
        return [self._run]

    def play(self, functions: list[Callable[[], None]]) -> None:
        (self._run,) = functions

    @property
    def num_bytes(self) -> int:
        return self.input.nbytes + self.output.nbytes

    def _compute(self, function: Callable[[Tensor], Tensor]) -> None:
        result = function(self.input)
        if self.output.shape != result.shape:  # the first time
            self.output = torch.zeros_like(result)
        self.output.copy_(result)


class _Kept:
    """The recordings of one module, the latest used last."""

    def __init__(self, weights: tuple[int, ...]) -> None:
        self.weights = weights
        self.by_key: OrderedDict[Hashable, tuple[Any, threading.Lock]] = OrderedDict()
        self.uses: Counter[Hashable] = Counter()  # of shapes that are not recorded
        self.pool: Any = None  # memory of what is computed in between, shared: nothing in it outlives a call


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()
_failed: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextlib.contextmanager
def recorded(
    module: nn.Module, device: torch.device, key: Hashable, make: Callable[[], R]
) -> Iterator[R | None]:
    """The recording of a module's work for a shape; nobody else uses it inside the block.

    Args:
        module: whose weights the functions read.
        key: what the functions' shapes depend on.
        make: called where there is none for the key yet; its inputs must be in place.

    Yields:
        None where it cannot be recorded, comes for the first time, or is in use: then the work is to be done
        without.
    """
    found = _find(module, device, key, make) if can_record(module, device) else None
    if found is None:
        yield None
        return
    recording, lock = found
    try:
        yield recording
    finally:
        lock.release()


def forget(module: nn.Module) -> None:
    """Frees what was recorded of a module and of its parts."""
    for part in module.modules():
        _kept.pop(part, None)


def can_record(module: nn.Module, device: torch.device) -> bool:
    """Whether work with a module may be recorded here: on a CUDA device, without gradients, by weights that
    are plain tensors on that device."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and os.environ.get("EVLGEN_CUDA_GRAPHS") != "0"
        and module not in _failed
        and not torch.is_grad_enabled()
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.cuda.is_current_stream_capturing()
        and not any(part._compiled_call_impl is not None for part in module.modules())
        and all(
            type(p.data) is Tensor and p.is_floating_point() and p.device == device
            for p in module.parameters()
        )
    )


def _find(
    module: nn.Module, device: torch.device, key: Hashable, make: Callable[[], R]
) -> tuple[R, threading.Lock] | None:
    """A recording and its lock, taken."""
    if not _recording.acquire(blocking=False):
        return None
    try:
        weights = tuple(p.data_ptr() for p in module.parameters())
        kept = _kept.get(module)
        if kept is None or kept.weights != weights:  # moved or replaced: graphs read the old places
            kept = _kept[module] = _Kept(weights)
        key = (key, torch.cuda.current_stream(device).cuda_stream, *_modes())
        if key not in kept.by_key:
            kept.uses[key] += 1
            if kept.uses[key] <= _UNRECORDED_USES:
                if len(kept.uses) > _MOST_SHAPES:
                    kept.uses.clear()
                return None
            with torch.cuda.device(device):
                kept.pool = kept.pool or torch.cuda.graph_pool_handle()
                recording = make()
                recording.play([_record(function, kept.pool) for function in recording.functions()])
            kept.by_key[key] = (recording, threading.Lock())
        kept.by_key.move_to_end(key)
        _make_room(kept, device)
        found = kept.by_key[key]
        return found if found[1].acquire(blocking=False) else None
    except Exception as error:  # whatever it is, the work can be done without
        _failed[module] = True
        _kept.pop(module, None)
        _restore_generator(device)
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning("%s runs without CUDA graphs: %s", type(module).__name__, first_line)
        return None
    finally:
        _recording.release()


def _modes() -> tuple[Hashable, ...]:
    """What decides, besides shapes, which kernels are launched."""
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return torch.is_inference_mode_enabled(), autocast


def _record(function: Callable[[], None], pool: Any) -> Callable[[], None]:
    """Runs a function, and records it."""
    is_cast, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    # weights that autocast has converted and keeps are gone when it ends
    with torch.autocast("cuda", dtype, is_cast, cache_enabled=False):
        return _recorded_as_it_is(function, pool)


def _recorded_as_it_is(function: Callable[[], None], pool: Any) -> Callable[[], None]:
    function()  # what is set up at a first call is set up on the stream that will use it
    stream, current = _stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream), _waiting_forbidden():
        function()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        function()
    return graph.replay


@functools.cache
def _stream_of(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _stream() -> torch.cuda.Stream:
    """What all recording on the current device goes by: cuBLAS sets memory aside for each stream."""
    return _stream_of(torch.cuda.current_device())


@contextlib.contextmanager
def _waiting_forbidden() -> Iterator[None]:
    """Inside, what would wait for the card raises RuntimeError. While a graph is recorded it would do more
    harm."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _restore_generator(device: torch.device) -> None:
    """A recording that broke off leaves the card's random generator waiting for its end; one that ends well
    sets it right."""
    with contextlib.suppress(Exception), torch.cuda.device(device):
        torch.cuda.synchronize()
        x = torch.zeros(1, device=device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            x.add_(1)


def _make_room(kept: _Kept, device: torch.device) -> None:
    """Forgets what was not used for longest, but for the last."""
    most = _MEMORY_FRACTION * torch.cuda.get_device_properties(device).total_memory
    used = sum(recording.num_bytes for recording, _ in kept.by_key.values())
    for key, (recording, lock) in list(kept.by_key.items())[:-1]:
        if used > most and not lock.locked():
            used -= recording.num_bytes
            del kept.by_key[key]
