"""Text of users (names of files, captions, values of keys) for a terminal, a log, a figure or a report: it
can neither move the cursor, start a line of its own, nor fill the screen."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

# Control characters (C0, C1, DEL), line and paragraph separators, what turns the direction of writing, the
# byte order mark, and halves of surrogate pairs: what "\ud800" in JSON, or a file name that is not UTF-8, is
# read as.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_LONGEST_NAME = 240  # characters of a name in a message
_LONGEST_LINE = 2000  # of a line in a message


class Lines(str):
    """A message of several lines, each of which is `printable`: its line breaks are the package's own."""


def printable(text: object, limit: int | None = None) -> str:
    r"""The text with control characters, escape sequences and line breaks written as ``\x1b``, ``\n``,
    ``\u202e``.

    Args:
        text: anything that has a text.
        limit: characters at most, of which the middle ones are left out; None: all.
    """
    text = str(text)
    if limit is not None and len(text) > limit:
        text = text[: limit - limit // 2 - 1] + "…" + text[len(text) - limit // 2 :]
    return _UNSAFE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def shown_name(name: str | os.PathLike) -> str:
    """A file's name, an address or a key as messages show it: `printable`, and cut where it is very long."""
    return printable(os.fspath(name), _LONGEST_NAME)


def message(text: object) -> str:
    """What an error says: one line, or `Lines`."""
    return text if isinstance(text, Lines) else printable(text, _LONGEST_LINE)


def message_lines(lines: Iterable[object]) -> Lines:
    """A message of several lines, none of which a user's text breaks into more."""
    return Lines("\n".join(map(message, lines)))
