"""Logging of the command line: plain lines on the terminal, and all of them in the run's folder."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from evlgen.common.safe_text import message


class _Formatter(logging.Formatter):
    """A message is one line, whatever names and texts of users are in it. Tracebacks keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return message(super().formatMessage(record))


class _Handler(logging.StreamHandler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            with tqdm.external_write_mode(file=self.stream):
                super().emit(record)
        else:
            super().emit(record)


def log_to_terminal(debug: bool = False) -> None:
    """Shows this package's messages on standard error; other libraries' warnings too, their progress only on
    a terminal."""
    handler = _Handler()
    handler.setFormatter(_Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("evlgen").setLevel(logging.DEBUG if debug else logging.INFO)


def quiet_libraries() -> None:
    """Hugging Face's own progress bars only where there is a terminal to draw on."""
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


class _LogFile(logging.FileHandler):
    """A file that loses lines where the disk is full: they are on the terminal too, and the run says why it
    ends."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def log_to_file(path: Path, enabled: bool = True) -> Iterator[None]:
    """Adds every message to a file while the block runs."""
    if not enabled:
        yield
        return
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
