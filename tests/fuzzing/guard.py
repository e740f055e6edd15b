"""The bounds every input is held to: only our own errors, some seconds, some memory, no code of the input."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator

from evlgen.common.errors import EVLGenError

SECONDS = 10.0  # of processor time, so that a busy machine fails no input
PEAK_MEGABYTES = 300  # that one input may take beyond what was ever taken before it
TOTAL_MEGABYTES = 600  # that all of them may
_ADDRESS_SPACE = 8 << 30  # beyond what is mapped: a last line, so that no machine goes down


class TooSlow(BaseException):
    """Raised inside an input that takes too long; no handler for errors may swallow it."""


@dataclasses.dataclass
class Result:
    """What came of a number of inputs."""

    read: int = 0
    refused: int = 0
    slowest: float = 0.0
    grown: int = 0  # megabytes
    failures: list[str] = dataclasses.field(default_factory=list)

    @property
    def inputs(self) -> int:
        return self.read + self.refused + len(self.failures)

    def __str__(self) -> str:
        return (
            f"{self.inputs} inputs: {self.read} read, {self.refused} refused by errors of ours, "
            f"{len(self.failures)} failures; slowest {self.slowest:.2f} s; peak memory grew by "
            f"{self.grown} MB"
        )


class Guard:
    """Runs inputs one by one and notes what each came to."""

    def __init__(self) -> None:
        self.result = Result()
        self._start = self._peak = _peak_megabytes()

    def run(self, name: str, action: Callable[[], object]) -> None:
        """One input. ``name`` says how to make it again."""
        started = time.process_time()
        try:
            with _time_limit():
                action()
            self.result.read += 1
        except EVLGenError as error:
            if str(error).strip():
                self.result.refused += 1
            else:
                self._fail(name, "an error without a word")
        except TooSlow:
            self._fail(name, f"more than {SECONDS} s\n{traceback.format_exc(limit=-12)}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self._fail(name, traceback.format_exc(limit=-8))
        self.result.slowest = max(self.result.slowest, time.process_time() - started)
        peak = _peak_megabytes()
        if peak - self._peak > PEAK_MEGABYTES:
            self._fail(name, f"it took {peak - self._peak} MB")
        self._peak = peak
        self.result.grown = peak - self._start

    def finish(self) -> Result:
        """The result of all of them together."""
        if self.result.grown > TOTAL_MEGABYTES:
            self.result.failures.append(f"all inputs together took {self.result.grown} MB")
        return self.result

    def _fail(self, name: str, what: str) -> None:
        self.result.failures.append(f"{name}: {what}")


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Within the block the process maps only some GB more than now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _ADDRESS_SPACE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    # where not even signals are heard, or something is waited for
    faulthandler.dump_traceback_later(60 * SECONDS, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        faulthandler.cancel_dump_traceback_later()


def _peak_megabytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
