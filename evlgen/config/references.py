"""``${run.seed}`` in a configuration: the value at another key, or in a text that value as text. A leading
dot names a key beside it, ``${.name}``.

Nothing else stands in ``${..}``: what would read the environment or files is refused, and so is what refers
to itself or, written out, is larger than any configuration.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from evlgen.common.errors import ConfigError
from evlgen.config.problems import Source

_REFERENCE = re.compile(r"\$\{\s*([^${}:\s]+)\s*\}")
_MAX_CHAIN = 20
_MAX_SIZE = 1_000_000  # characters and values, all written out

KeyPath = tuple[str, ...]


class References:
    """A configuration whose references are followed as its values are asked for.

    Args:
        content: plain values.
        source: from a key's path to the file it came from, for messages.
    """

    def __init__(self, content: dict[str, Any], source: Source) -> None:
        self.content, self.source = content, source
        self._size = 0
        self._followed: list[KeyPath] = []

    def find(self, keys: Sequence[str]) -> Any:
        """The value at a key path, references in it followed.

        Raises:
            KeyError: there is none.
            ConfigError: a reference leads nowhere or is refused; names the key.
        """
        value, path = self.content, KeyPath()
        for key in keys:
            value = self._text(value, path) if isinstance(value, str) else value
            if isinstance(value, dict) and key in value:
                value = value[key]
            elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
                value = value[int(key)]
            else:
                raise KeyError(key)
            path = (*path, key)
        return self._resolved(value, path)

    def _resolved(self, value: Any, path: KeyPath) -> Any:
        if isinstance(value, dict):
            value = {key: self._resolved(item, (*path, key)) for key, item in value.items()}
        elif isinstance(value, list):
            value = [self._resolved(item, (*path, str(i))) for i, item in enumerate(value)]
        elif isinstance(value, str):
            value = self._text(value, path)
        self._size += 1 + (len(value) if isinstance(value, str) else 0)
        if self._size > _MAX_SIZE:
            raise self._error(path, "with its references ${..} written out it is too large")
        return value

    def _text(self, text: str, path: KeyPath) -> Any:
        if text == "???":
            raise self._error(path, "is still ???: give it a value")
        if "${" not in text:
            return text
        if path in self._followed or len(self._followed) == _MAX_CHAIN:
            raise self._error(path, f"{text:.60} refers to itself, or on and on")
        self._followed.append(path)
        whole = _REFERENCE.fullmatch(text)
        found = (
            self._target(whole[1], path)
            if whole
            else _REFERENCE.sub(lambda match: str(self._target(match[1], path)), text)
        )
        self._followed.pop()
        if isinstance(found, str) and "${" in found:
            raise self._error(
                path,
                f"{text:.60} is refused: ${{..}} names another key, such as ${{run.seed}}, and nothing else",
            )
        return found

    def _target(self, name: str, path: KeyPath) -> Any:
        """What a reference at ``path`` stands for; one leading dot is the mapping it stands in."""
        dots = len(name) - len(name.lstrip("."))
        keys = [key for key in re.split(r"[.\[\]]+", name) if key]
        try:
            return self.find([*path[: len(path) - dots], *keys] if dots else keys)
        except KeyError:
            raise self._error(path, f"${{{name}}} names no key that there is") from None

    def _error(self, path: KeyPath, problem: str) -> ConfigError:
        key = ".".join(path)
        source = self.source(key)
        return ConfigError(f"{key} ({source}): {problem}." if source else f"{key}: {problem}.")
