"""What every command line shares: errors as a line or two, exit statuses, stops."""

from __future__ import annotations

import argparse
import io
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from evlgen.common.errors import EVLGenError, Interrupted, ProcessLost
from evlgen.common.launcher import is_first, report_to_launcher
from evlgen.common.safe_text import printable


class Parser(argparse.ArgumentParser):
    """Shows escaped what somebody typed and it does not know."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def write_any_text() -> None:
    r"""From now on standard output shows characters that its encoding lacks as ``\u6f22``, as standard error
    does, instead of raising."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def guarded(action: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser, argv) -> int:
    """Runs a command; what a user can fix is shown in a line or two, without a traceback unless
    ``--debug``."""
    args = parser.parse_args(argv)
    from evlgen.common.logs import log_to_terminal

    write_any_text()
    log_to_terminal(args.debug)
    try:
        return action(args) or 0
    except Interrupted as stop:
        if is_first():
            print(stop, file=sys.stderr)
        return stop.exit_code
    except EVLGenError as error:
        report_to_launcher(str(error), follows_another=isinstance(error, ProcessLost))
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except UnicodeEncodeError as error:
        if args.debug or sys.getfilesystemencoding().lower().startswith("utf"):
            raise
        name = printable(repr(error.object)[:200])
        print(
            f"error: {name} cannot be the name of a file: this system writes names in {error.encoding}. "
            "Set the environment variable PYTHONUTF8=1, or LC_ALL=C.UTF-8.",
            file=sys.stderr,
        )
        return 1
    except Exception:
        report_to_launcher(traceback.format_exc())
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
