"""Plain YAML in and out: files, and values written on the command line.

Read with PyYAML's safe loader, so that no tag constructs an object; three things differ from it. A key given
twice in one mapping is an error, ``1e-4`` is a number, and a date is text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from evlgen.common.errors import ConfigError

_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _PlainLoader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' is given twice", key.start_mark
                )
            seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key))
        return node


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
        ConfigError: not there, not text, not plain YAML (with line and column), or no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    content = _load(text, f"{path}")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no mapping of keys to values but {type(content).__name__}.")
    return content


def dump_yaml(content: dict[str, Any]) -> str:
    """Text that `read_yaml` reads back as the same content; keys keep their order."""
    return yaml.dump(content, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)


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
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: {' '.join(str(error).split())}.") from error


def _reason(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "not YAML"
    if "could not determine a constructor" in problem:
        tag = problem.rsplit("'", 2)[-2] if problem.count("'") > 1 else "a tag"
        return f"'{tag}' is refused: configurations are plain YAML and construct no objects"
    return f"not plain YAML: {problem}"
