"""The errors a user can cause. Each says what was wrong, where, and what to do next; the command line shows
them without a traceback (``--debug`` shows it)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from evlgen.common.safe_text import message as safe_message


class EVLGenError(Exception):
    """Base class of every error this package raises on purpose.

    Args:
        message: control characters and line breaks in it are escaped, as it may hold names of files and other
            text of users. Several lines are made by `safe_text.message_lines`.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(safe_message(message))

    def __str__(self) -> str:
        return self.args[0]  # a `safe_text.Lines` stays one where an error takes over another's message


class RegistryError(EVLGenError):
    """A name is not registered, registered twice, or its class has the wrong base."""


class ConfigError(EVLGenError):
    """A key is unknown, has a wrong type or an impossible value. Names the key's path and the file it came
    from."""


class CheckpointError(EVLGenError):
    """A checkpoint is missing, damaged, unsafe, or of another architecture."""


class DataError(EVLGenError):
    """An annotation, image or video is missing or cannot be read.

    Attributes:
        cause: in two or three words what kind of trouble this is, by which broken samples are counted:
            ``missing file``, ``not an image``.
    """

    def __init__(self, message: str, cause: str = "unreadable") -> None:
        super().__init__(message)
        self.cause = cause


class TrainingError(EVLGenError):
    """A run cannot go on: a loss that is not finite, too many broken samples, an output folder that takes no
    files."""


class ProcessLost(TrainingError):
    """Another process of the run ended, so this one cannot go on."""


class Interrupted(EVLGenError):
    """Somebody asked a run to stop, and it did after saving.

    Attributes:
        exit_code: 128 + the signal's number, as shells have it.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def did_you_mean(name: str, candidates: Iterable[str], at_least: float = 0.5) -> str:
    """`` Did you mean 'a' or 'b'?`` with a leading blank, the nearest first; empty when nothing is near."""
    folded = {c.lower().replace("-", "_"): c for c in candidates}
    name = name[:200].lower().replace("-", "_")
    hits = difflib.get_close_matches(name, folded, n=3, cutoff=at_least)
    return f" Did you mean {' or '.join(repr(folded[hit]) for hit in hits)}?" if hits else ""
