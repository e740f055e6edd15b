"""Which ``${..}`` a configuration may hold: checked before OmegaConf resolves any.

References to other keys, ``${oc.env:NAME}``, ``${oc.decode:${oc.env:NAME}}`` and resolvers that a plugin
registered. What would grow beyond bounds (``a: ${b}${b}``, ``b: ${c}${c}``, ..), refer to itself, or build
code of its own out of text is refused. A configuration that comes with weights may not ask for anything of
this machine, such as its environment variables: they could travel on in an address.
"""

from __future__ import annotations

import re
from typing import Any

from evlgen.common.errors import ConfigError

_INNERMOST = re.compile(r"\$\{([^${}]*)\}")
_ENVIRONMENT = re.compile(r"\$\{oc\.decode:\s*\$\{oc\.env:[^${}]*\}\s*\}")
_DONE = "\x00"  # stands for an interpolation inside another; YAML text has no null byte
_MAX_TEXT = 4096  # of text with interpolations
_MAX_IN_TEXT = 16
_MAX_CHAIN = 20
_MAX_SIZE = 1_000_000  # characters and values, all written out

KeyPath = tuple[Any, ...]


def check_interpolations(content: dict[str, Any], resolvers: bool = True) -> None:
    """Returns where a configuration's interpolations are harmless.

    Args:
        content: plain, interpolations not resolved.
        resolvers: whether ``${name:..}`` is allowed at all.

    Raises:
        ConfigError: names the key.
    """
    if _holds_any(content):
        try:
            _Check(content, resolvers).size((), content, 0)
        except RecursionError as error:
            raise ConfigError("the interpolations ${..} refer on and on.") from error


def check_resolved(content: Any, path: str = "") -> None:
    """Raises `ConfigError` where a resolved value still holds ``${``: it would be resolved once more."""
    if isinstance(content, dict):
        for key, value in content.items():
            check_resolved(value, f"{path}.{key}" if path else str(key))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            check_resolved(value, f"{path}[{index}]")
    elif isinstance(content, str) and "${" in content:
        raise ConfigError(f"{path}: its value '{content:.60}' holds '${{', which text here may not.")


def _holds_any(content: Any) -> bool:
    if isinstance(content, dict):
        return any(map(_holds_any, content.values()))
    if isinstance(content, list):
        return any(map(_holds_any, content))
    return isinstance(content, str) and "${" in content


class _Check:
    """Finds how large everything is when written out, each value looked at once."""

    def __init__(self, content: dict[str, Any], resolvers: bool) -> None:
        self.content, self.resolvers = content, resolvers
        self._known: dict[KeyPath, int | None] = {}  # None: being looked at

    def size(self, path: KeyPath, value: Any, chain: int) -> int:
        """Characters and values at a path; ``chain``: interpolations that led here."""
        if path in self._known:
            if (size := self._known[path]) is None:
                raise self._refused(path, "refers to itself")
            return size
        self._known[path] = None
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            size = 1 + sum(self.size((*path, key), item, chain) for key, item in items)
        elif isinstance(value, str) and "${" in value:
            size = self._size_of_text(path, value, chain)
        else:
            size = 1 + (len(value) if isinstance(value, str) else 0)
        if size > _MAX_SIZE:
            raise self._refused(path, "grows too large")
        self._known[path] = size
        return size

    def _size_of_text(self, path: KeyPath, text: str, chain: int) -> int:
        if len(text) > _MAX_TEXT or text.count("${") > _MAX_IN_TEXT:
            raise self._refused(path, f"has more than {_MAX_IN_TEXT} in one text, or in a text too long")
        if chain >= _MAX_CHAIN:
            raise self._refused(path, f"refers on and on, more than {_MAX_CHAIN} times")
        size = 1 + len(text)
        if _ENVIRONMENT.fullmatch(text.strip()) and self.resolvers:
            return size
        while match := _INNERMOST.search(text):
            size += self._size_of_one(path, match.group(1).strip(), chain)
            text = f"{text[: match.start()]}{_DONE}{text[match.end() :]}"
        return size

    def _size_of_one(self, path: KeyPath, inner: str, chain: int) -> int:
        if ":" not in inner:
            if _DONE in inner:
                raise self._refused(path, "names a key by another interpolation")
            return self._size_at(_absolute(inner, path), chain + 1)
        name = inner.partition(":")[0]
        if not self.resolvers:
            raise self._refused(
                path,
                f"asks for {name}: a model's file may come from others, and gets nothing of this machine",
            )
        if name.startswith("oc.") and name != "oc.env":
            raise self._refused(path, f"asks for {name}, which is not supported")
        return 1

    def _size_at(self, target: KeyPath, chain: int) -> int:
        """The size of what is at a path; where the way there leads through other interpolations, of those."""
        value: Any = self.content
        path: KeyPath = ()
        for key in target:
            if isinstance(value, list) and str(key).isdecimal() and int(key) < len(value):
                key = int(key)
            elif isinstance(value, str) and "${" in value:
                break
            elif not isinstance(value, dict) or key not in value:
                return 1  # nowhere: OmegaConf will say so
            path, value = (*path, key), value[key]
        return self.size(path, value, chain)

    @staticmethod
    def _refused(path: KeyPath, problem: str) -> ConfigError:
        return ConfigError(f"{'.'.join(map(str, path))}: its interpolation ${{..}} {problem}.")


def _absolute(inner: str, path: KeyPath) -> KeyPath:
    """The key path that an interpolation at ``path`` names; one leading dot is the mapping it stands in."""
    dots = len(inner) - len(inner.lstrip("."))
    keys = tuple(key for key in re.split(r"[.\[\]]+", inner) if key)
    return (*path[: len(path) - dots], *keys) if dots else keys
