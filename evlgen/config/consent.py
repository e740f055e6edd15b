"""What files that somebody else wrote ask for: addresses in them are not fetched unless the user agrees, and
plugins are imported only where the user names them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from evlgen.common.errors import CheckpointError, EVLGenError
from evlgen.common.plugins import is_imported
from evlgen.common.safe_text import printable, shown_name
from evlgen.config.yaml_io import read_yaml
from evlgen.files.io import download_target, scheme_of

#: What answers a question with yes or no.
Consent = Callable[[str], bool]

_LOCAL = ("evlgen", "cache", "file")  # schemes that stay on this machine
_TEXTS = ("prompt",)  # keys whose values name no file


def check_addresses(section: Mapping[str, Any], file: Path, allow: bool | Consent) -> None:
    """Asks whether the addresses in the ``model`` section of a file that came with weights may be fetched.

    Args:
        section: plain values.
        file: where it is from.
        allow: the answer, or what gives it. Files of earlier downloads are used without a question.

    Raises:
        CheckpointError: they may not. Names each with its key.
    """
    found = [f"{key}: {shown_name(value)}" for key, value in _addresses(section) if not _is_here(value)]
    if not found or allow is True:
        return
    named = f"{shown_name(file)} names addresses to fetch from: {'; '.join(found)}."
    if callable(allow) and allow(f"{named} Fetch them?"):
        return
    raise CheckpointError(
        f"{named} Files that come with weights fetch nothing unasked: where you trust these addresses, add "
        "--allow-downloads (in Python: allow_downloads=True), or fetch them yourself and write the paths "
        "into the file."
    )


def check_plugins(file: Path, name: str) -> None:
    """Raises `CheckpointError` where a ``config.yaml`` from the hub lists plugins that the user has not
    named: they are code, and nothing of what was fetched is run.

    Args:
        file: the ``config.yaml``.
        name: what the user asked for.
    """
    plugins = read_yaml(file).get("plugins") or []
    listed = [str(plugin) for plugin in (plugins if isinstance(plugins, list) else [plugins])]
    wanted = [plugin for plugin in listed if not is_imported(plugin)]
    if wanted:
        raise CheckpointError(
            f"{shown_name(name)} needs plugins: {', '.join(map(shown_name, wanted[:5]))}. Nothing that comes "
            "with weights is run. Get that code, read it, and name it yourself: --plugins ./my_part.py (in "
            "Python: import it first)."
        )


def ask_on_terminal(question: str) -> bool:
    """The answer of somebody at a terminal; no where there is none."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(f"{printable(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _addresses(value: Any, key: str = "model") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name not in _TEXTS:
                yield from _addresses(inner, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _addresses(inner, f"{key}.{number}")
    elif isinstance(value, str) and scheme_of(value.strip()) not in (None, *_LOCAL):
        yield key, value


def _is_here(address: str) -> bool:
    """Whether an earlier download of it is in the cache."""
    if scheme_of(address) not in ("http", "https"):
        return False
    try:
        return os.path.isfile(download_target(address))
    except EVLGenError:
        return False
