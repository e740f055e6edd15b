"""Ctrl-C and SIGTERM: noted at once, acted on where a run can be saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from evlgen.common.errors import Interrupted

# Seconds in which one of several processes must come to a place where it can save. One that waits for a
# process that died never does, and its launcher waits longer than this before it kills.
PATIENCE = 15.0


class StopNow(BaseException):
    """A stop was requested while a run waited for a batch. No `Exception`: torch looks into those."""


class StopRequest:
    """Inside its block the first Ctrl-C or SIGTERM is only noted, in `received`; a second one ends at once.

    Args:
        distributed: whether other processes may keep this one waiting for ever.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, distributed: bool = False) -> None:
        self.received: signal.Signals | None = None
        self.distributed = distributed
        self._is_waiting = False
        self._before: dict[signal.Signals, Any] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python takes signals nowhere else
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        self.in_time()

    @property
    def requested(self) -> bool:
        """Whether somebody asked this process to stop."""
        return self.received is not None

    def heeding(self, batches: Iterable[Any], has_workers: bool) -> Iterator[Any]:
        """The batches of a loader, of which the next one may never come.

        Args:
            has_workers: whether other processes read them. This process itself is not to be stopped in the
                middle of a sample, nor while it takes part in a distributed run: the others would wait.

        Raises:
            StopNow: a stop is requested while the next batch is awaited.
        """
        is_heeded = has_workers and not self.distributed
        batches = iter(batches)
        while True:
            try:
                self._is_waiting = is_heeded
                if is_heeded and self.requested:
                    raise StopNow
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._is_waiting = False
            yield batch

    def interrupted(self, where: str) -> Interrupted:
        """What a run raises when it stops."""
        number = self.received or signal.SIGTERM  # where another process was asked
        name = "Ctrl-C" if number == signal.SIGINT else number.name
        remedy = "run.resume=auto among the same command's --options goes on from there"
        return Interrupted(f"stopped by {name} {where}; {remedy}", 128 + number)

    def in_time(self) -> None:
        """Called where the request is acted on: the process need not be ended by force."""
        if self._timer is not None:
            self._timer.cancel()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = signal.Signals(number)
        if self.distributed:
            self._timer = threading.Timer(PATIENCE, os._exit, [128 + number])
            self._timer.daemon = True
            self._timer.start()
        if self._is_waiting:
            raise StopNow


def leave_to_parent() -> None:
    """For data-loading processes: Ctrl-C and SIGTERM, which torchrun and Slurm send to every process of a
    run, are the parent's to act on, and it needs their data until it has. Its own SIGTERM ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigwaitinfo"):  # else (macOS) nobody can tell who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
