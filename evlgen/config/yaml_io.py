"""Plain YAML in and out: files, and values written on the command line.

Read with PyYAML's safe loader, narrowed further: what comes out is text, numbers, true, false, null, lists,
and mappings whose keys are text. Any tag that asks for something else is refused, and so are a key given
twice in one mapping, text that no file name or message can hold, and files that nest or repeat themselves
(by ``*alias``) too large or too deep. ``1e-4`` is a number, and a date is text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml

from evlgen.common.errors import ConfigError
from evlgen.files.io import read_bytes

_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


# A whole configuration, as it is saved with a run, takes 5 KB and nests 7 deep.
MAX_BYTES = 256 << 10
MAX_DEPTH = 64
_MAX_NODES = 100_000  # where what an alias repeats counts each time
_MAX_CHARACTERS = 4_000_000  # likewise
_MAX_INT = 2**63 - 1

_PREFIX = "tag:yaml.org,2002:"
_TAGS = {_PREFIX + name for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge", "value")}
_NO_TEXT = re.compile("[\x00\ud800-\udfff]")


class _PlainLoader(yaml.SafeLoader):
    _depth = 0

    def compose_document(self) -> yaml.Node | None:
        root = super().compose_document()
        assert root is not None  # only called where there is a document
        _Sizes().of(root)
        return root

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            _object_to(self.peek_event(), f"it nests more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and node.tag not in _TAGS:
            name = node.tag.replace(_PREFIX, "!!")
            _object_to(node, f"'{name}' is refused: configurations are plain YAML and construct no objects")
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.tag not in (_PREFIX + "str", _PREFIX + "merge", _PREFIX + "value"):
                shown = f"{key.value!r:.40}" if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                _object_to(key, f"a key must be text, not {shown}; quote it if it is meant as text")
            if key.value in seen:
                _object_to(key, f"the key '{key.value}' is given twice")
            seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            # PyYAML's own constructors stumble over 0x_ and the like
            _object_to(node, f"{node.value!r:.40} is no {node.tag.removeprefix(_PREFIX)}", error)
        if isinstance(value, int) and not -_MAX_INT <= value <= _MAX_INT:
            _object_to(node, f"a whole number has 19 digits at most, not {len(node.value)}")
        if isinstance(value, str) and _NO_TEXT.search(value):
            _object_to(node, "text may hold neither a null byte nor half of a surrogate pair")
        return value


def _object_to(place: Any, problem: str, cause: Exception | None = None) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, problem, place.start_mark) from cause


class _Sizes:
    """How much a document is when aliases are written out: nodes and characters, each node looked at once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int] | None] = {}  # None: being looked at

    def of(self, node: yaml.Node) -> tuple[int, int]:
        """Raises a YAMLError where a node holds itself or all of it is too large."""
        if id(node) in self._known:
            size = self._known[id(node)]
            if size is None:
                _object_to(node, "it contains itself (a recursive alias)")
            return size
        self._known[id(node)] = None
        if isinstance(node, yaml.ScalarNode):
            nodes, characters = 1, len(node.value)
        else:
            mapping = isinstance(node, yaml.MappingNode)
            parts = [part for pair in node.value for part in pair] if mapping else node.value
            sizes = [self.of(part) for part in parts]
            nodes, characters = 1 + sum(n for n, _ in sizes), sum(c for _, c in sizes)
        if nodes > _MAX_NODES or characters > _MAX_CHARACTERS:
            _object_to(node, "with its aliases written out it is too large")
        self._known[id(node)] = nodes, characters
        return nodes, characters


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_PlainLoader, _PlainDumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
        for first, resolvers in _class.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: not there, not text, too large, not plain YAML (with line and column), or no mapping.
    """
    try:
        text = read_bytes(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read: it is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
    content = _load(text, f"{path}")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no mapping of keys to values but {type(content).__name__}.")
    return content


def dump_yaml(content: dict[str, Any]) -> str:
    """Text that `read_yaml` reads back as the same content; keys keep their order."""
    return yaml.dump(content, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)


def as_yaml_would_be(content: Any, name: str) -> Any:
    """Content from elsewhere, held to what `read_yaml` holds files to: plain, neither deep nor vast.

    Raises:
        ConfigError: it is not; calls it ``name``.
    """
    try:
        text = dump_yaml(content)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{name} is no plain configuration.") from error
    return _load(text, name)


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """``["run.batch_size_train=32", "model.connector.r=[8, 2]"]`` as one nested mapping; values are YAML.

    A later option wins over an earlier one. ``a.b=`` is the empty text, ``a.b=null`` is null.

    Raises:
        ConfigError: an option without ``=``, with an empty key, or whose value is not YAML.
    """
    content: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            raise ConfigError(f"--options {option}: write key=value, such as run.batch_size_train=32.")
        if len(names) > MAX_DEPTH:
            raise ConfigError(f"--options {option[:60]}...: no key lies more than {MAX_DEPTH} deep.")
        section = content
        for name in names[:-1]:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[names[-1]] = _parse_value(option, text)
    return content


def _parse_value(option: str, text: str) -> Any:
    if not text.strip():
        return ""
    try:
        return _load(text, f"--options {option}")
    except ConfigError as error:
        key = option.partition("=")[0]
        raise ConfigError(
            f"{error} To give text with colons or brackets, quote it: '{key}=\"...\"'."
        ) from error


def _load(text: str, name: str) -> Any:
    try:
        return yaml.load(text, Loader=_PlainLoader)  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{name}{place}: {_reason(error)}.") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # its scanner: "\UFFFFFFFF", %YAML 1.99999..
        raise ConfigError(f"{name}: {' '.join(str(error).split())}.") from error


def _reason(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "not YAML"
    return problem if " is refused: " in problem else f"not plain YAML: {problem}"
