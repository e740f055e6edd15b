"""JSON files read with errors that name the file and the place, whatever is in them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from evlgen.common.errors import EVLGenError
from evlgen.files.io import read_bytes

MAX_SETTINGS_BYTES = 64 << 20  # tokenizers are the largest files that hold settings; they have up to 30 MB


def read_json(
    path: str | os.PathLike, error: type[EVLGenError], what: str, max_bytes: int | None = MAX_SETTINGS_BYTES
) -> Any:
    """The content of a JSON file.

    Args:
        error: what is raised.
        what: what the file is, for messages: ``annotation``.
        max_bytes: the largest file that is read; None: any.

    Raises:
        error: missing, too large, not text, not JSON (with line and column), nested too deeply.
    """
    with json_errors(path, error, what):
        return json.loads(read_bytes(path, max_bytes).decode("utf-8"))


@contextlib.contextmanager
def json_errors(path: str | os.PathLike, error: type[EVLGenError], what: str) -> Iterator[None]:
    """Raises whatever reading and parsing a JSON file raises as ``error``; see `read_json`."""
    try:
        yield
    except json.JSONDecodeError as cause:
        raise error(
            f"{what} {path} is not JSON: {cause.msg} at line {cause.lineno}, column {cause.colno}. "
            "Fetch it again if it was cut off."
        ) from cause
    except UnicodeDecodeError as cause:
        raise error(f"{what} {path} is not UTF-8 text (byte {cause.start}).") from cause
    except OSError as cause:
        raise error(f"{what} {path} cannot be read: {cause.strerror or cause}.") from cause
    except RecursionError as cause:
        raise error(f"{what} {path} nests its lists and mappings too deeply.") from cause
    except ValueError as cause:  # Python converts no number of more than 4300 digits
        raise error(f"{what} {path} has a number that is none: {str(cause).partition(';')[0]}.") from cause
    except MemoryError as cause:
        raise error(f"{what} {path} does not fit into memory.") from cause
