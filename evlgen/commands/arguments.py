"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import functools
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evlgen.config.consent import Consent


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """``--cfg-path`` and ``--options``, and the common ones."""
    parser.add_argument(
        "--cfg-path", required=True, help="project file; looked up as given, then inside the package"
    )
    add_options(parser)
    add_allow_downloads(parser)
    add_common(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--options``."""
    parser.add_argument(
        "--options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change the configuration: run.batch_size_train=32",
    )


def add_common(parser: argparse.ArgumentParser) -> None:
    """What every command takes: ``--plugins`` and ``--debug``."""
    parser.add_argument(
        "--plugins",
        nargs="+",
        action="extend",
        default=[],
        metavar="MODULE",
        help="modules or .py files that register parts",
    )
    add_debug(parser)


def add_debug(parser: argparse.ArgumentParser) -> None:
    """``--debug``."""
    parser.add_argument("--debug", action="store_true", help="show tracebacks and debug messages")


def add_allow_downloads(parser: argparse.ArgumentParser) -> None:
    """``--allow-downloads``."""
    parser.add_argument(
        "--allow-downloads",
        action="store_true",
        help="fetch from addresses that a config.yaml beside weights names; otherwise a terminal is asked",
    )


def allow_downloads(args: argparse.Namespace) -> bool | Consent:
    """What ``--allow-downloads`` says, or who is asked: nobody where a launcher started several processes."""
    from evlgen.config.consent import ask_on_terminal

    if args.allow_downloads or os.environ.get("WORLD_SIZE", "1") != "1":
        return args.allow_downloads
    return functools.cache(ask_on_terminal)  # one answer for all configurations of a comparison


def fail_for(left_out: list[str], named: list[str], done: str) -> None:
    """Raises `DataError`, for the exit status, where some of the files a user named are not ``done``."""
    if left_out:
        from evlgen.common.errors import DataError
        from evlgen.common.safe_text import shown_name

        some = ", ".join(map(shown_name, left_out[:5])) + (", ..." if len(left_out) > 5 else "")
        raise DataError(f"{len(left_out)} of the {len(named)} paths named could not be {done}: {some}.")


def positive(text: str) -> int:
    """The type of a number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number
