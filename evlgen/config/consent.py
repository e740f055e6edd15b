"""Addresses in files that somebody else wrote: nothing is fetched from them unless the user agrees."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from evlgen.common.errors import CheckpointError, ConfigError, EVLGenError
from evlgen.common.safe_text import printable, shown_name
from evlgen.config.config import Config
from evlgen.config.layers import display
from evlgen.config.named_code import lies_beside_weights
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
    _ask(_addresses(section), file, allow)


def check_project(cfg: Config, allow: bool | Consent) -> None:
    """As `check_addresses`, of a whole project file, where it lies in a folder with weights: what it says of
    the model and of the datasets itself. Options, and what is built in, need no consent.

    Raises:
        ConfigError: it has stages.
        CheckpointError: the addresses may not be fetched.
    """
    file = cfg.cfg_path
    if file is None or not lies_beside_weights(file):
        return
    if cfg.stage is not None:
        raise ConfigError(f"{shown_name(file)}: a file that comes with weights describes one run: no stages.")
    found = list(_addresses(cfg.model_plain()))
    for name, section in cfg.datasets_plain().items():
        found += _addresses(section, f"datasets.{name}")
    own = [(k, v) for k, v in found if cfg.source(k) == display(file) and not cfg.is_built_in(k)]
    _ask(own, file, allow)


def _ask(addresses: Iterable[tuple[str, str]], file: Path, allow: bool | Consent) -> None:
    found = [f"{key}: {shown_name(value)}" for key, value in addresses if not _is_here(value)]
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
            yield from _addresses(inner, f"{key}[{number}]")
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
