"""Processes that die, and disks that fail, at any system call that changes a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

CALLS = ("rename", "replace", "fsync", "unlink", "symlink", "mkdir", "rmdir")


class Killed(BaseException):
    """The process ended before a call. Its cleaning up fails too: every later call raises this again."""


def deaths(act: Callable[[], Any], *extra: tuple[Any, str], error: OSError | None = None) -> Iterator[str]:
    """Does something again and again, and ends it before its first system call, its second, and so on, until
    it comes to its end. Yields each time the name of the call.

    Args:
        extra: more calls, as object and name of the attribute.
        error: raised by that one call, and the process lives on; None: the process is dead.
    """
    for number in range(1000):
        with pytest.MonkeyPatch.context() as patch:
            done: list[str] = []
            for place, name in [*((os, name) for name in CALLS), *extra]:
                patch.setattr(place, name, _failing(getattr(place, name), name, done, number, error))
            try:
                act()
            except (Killed, OSError):
                pass
        if len(done) <= number:
            return
        yield done[number]
    raise AssertionError("it never ends")


def _failing(call: Callable, name: str, done: list[str], number: int, error: OSError | None) -> Callable:
    def failing(*args: Any, **kwargs: Any) -> Any:
        done.append(name)
        if error is not None and len(done) == number + 1:
            raise error
        if error is None and len(done) > number:
            raise Killed
        return call(*args, **kwargs)

    return failing
