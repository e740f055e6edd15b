"""Collecting what is wrong in a configuration, so that all of it is shown at once."""

from __future__ import annotations

from collections.abc import Callable

from evlgen.common.errors import ConfigError
from evlgen.common.safe_text import message_lines

Source = Callable[[str], str]


class Problems:
    """Collects what is wrong in a configuration, to be shown all at once.

    Args:
        source: from a key's path to the file it came from (or ``--options``); "" where that is not known.
        check_names: whether `Registered` is checked, which imports the packages that register names.
    """

    def __init__(self, source: Source | None = None, check_names: bool = True) -> None:
        self.source = source or (lambda path: "")
        self.check_names = check_names
        self._lines: list[str] = []

    def add(self, path: str, message: str) -> None:
        """Notes a problem at a key's full path."""
        source = self.source(path)
        place = f"{path} ({source})" if source else path
        line = f"{place}: {message}" if message.endswith((".", "?")) else f"{place}: {message}."
        if line not in self._lines:
            self._lines.append(line)

    def trial(self) -> Problems:
        """An empty collection with the same settings, for one of several alternatives."""
        return Problems(self.source, self.check_names)

    def extend(self, other: Problems) -> None:
        self._lines.extend(line for line in other._lines if line not in self._lines)

    def raise_any(self) -> None:
        """Raises all problems as one `ConfigError`, a line each; does nothing when there are none."""
        if len(self._lines) == 1:
            raise ConfigError(self._lines[0])
        if self._lines:
            title = f"{len(self._lines)} problems in the configuration:"
            raise ConfigError(message_lines([title, *(f"  {line}" for line in self._lines)]))

    def __len__(self) -> int:
        return len(self._lines)
