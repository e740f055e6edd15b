"""Checks plain YAML values against annotations, so that a plugin's constructor *is* its YAML schema.

``check_section(section, MyConnector, "model.connector")`` compares the keys and values of a section with the
parameters of ``MyConnector.__init__`` (or the fields of a dataclass). What annotations can say:

========================================  ===================================================================
``bool``, ``int``, ``float``, ``str``     a scalar; an int is a float, a bool no int, ``"1e-4"`` is a float
``list[int]``, ``tuple[float, float]``    a YAML list (and stays one); a fixed tuple fixes the length
``dict``, ``dict[str, float]``            a YAML mapping
``X | None``, ``int | list[int]``         one of several
``Literal["a", "b"]``                     one of these values
a dataclass                               a section of its own
``Annotated[int, AtLeast(0)]``            a value within bounds; see also `PositiveInt` and its like
``Annotated[str, Registered("task")]``    a name in the registry
========================================  ===================================================================

Anything else (no annotation, a class of your own) is not checked. All problems of a section are collected and
raised as one `ConfigError` with a line for each.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, cast

from evlgen.common.errors import did_you_mean
from evlgen.config.constraints import (
    AtLeast,
    AtMost,
    Fraction,
    LessThan,
    MoreThan,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Registered,
    show,
)
from evlgen.config.problems import Problems, Source

__all__ = [
    "REQUIRED",
    "AtLeast",
    "AtMost",
    "LessThan",
    "MoreThan",
    "NonNegativeFloat",
    "NonNegativeInt",
    "Parameter",
    "Parameters",
    "PositiveFloat",
    "PositiveInt",
    "Problems",
    "Registered",
    "Fraction",
    "build_dataclass",
    "check_section",
    "describe",
    "instantiate",
    "parameters_of",
    "show",
    "to_plain",
    "unknown_key",
]

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_LISTS = (list, tuple, Sequence)
_MAPPINGS = (dict, Mapping)
_SCALARS = {bool: "bool", int: "int", float: "float", str: "str", type(None): "null"}
# An unknown key lists every key it could have been, unless there are more than this and a near one is named.
_KEYS_SHOWN = 16


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()


@dataclass(frozen=True)
class Parameter:
    """What one key may be: an annotation, and the default or `REQUIRED`."""

    annotation: Any
    default: Any = REQUIRED


class Parameters(dict[str, Parameter]):
    """Parameters by name; ``any_key`` is true when the target also takes ``**kwargs``."""

    any_key: bool = False


def parameters_of(target: Any) -> Parameters:
    """The keys that a section for ``target`` (a class, a function or a dataclass) may have; of a class that
    declares them in a dataclass (`config_of`), its fields."""
    if declared := target if dataclasses.is_dataclass(target) else config_of(target):
        return _fields_of(declared)
    is_class = isinstance(target, type)
    function = target.__init__ if is_class else target
    found = Parameters()
    if function is object.__init__:
        return found
    hints = _type_hints(function)
    signature = list(inspect.signature(function).parameters.values())
    for parameter in signature[1:] if is_class else signature:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found.any_key = True
        elif parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY):
            default = REQUIRED if parameter.default is inspect.Parameter.empty else parameter.default
            found[parameter.name] = Parameter(hints.get(parameter.name, Any), default)
    return found


def config_of(target: Any) -> Any:
    """The dataclass that a class declares as its ``CONFIG``; None where it has none, or where a subclass with
    a constructor of its own has the keys."""
    for owner in target.__mro__ if isinstance(target, type) else ():
        if "CONFIG" in vars(owner) or "__init__" in vars(owner):
            return vars(owner).get("CONFIG")
    return None


def check_section(
    section: Mapping[str, Any] | None,
    target: Any,
    path: str = "",
    source: Source | None = None,
    ignore: Iterable[str] = (),
    problems: Problems | None = None,
) -> dict[str, Any]:
    """The section as plain values of the right types; defaults are not filled in.

    Args:
        section: a mapping (plain or OmegaConf); None is an empty one.
        target: a class, a function or a dataclass whose parameters are the keys.
        path: the section's own key path, such as ``model.connector``.
        source: from a key's path to the file it came from.
        ignore: parameters that are no YAML keys, because the framework hands them in.
        problems: where to collect problems; without it they are raised here.

    Raises:
        ConfigError: unknown or missing keys, wrong types, impossible values: one line for each.
    """
    found = problems if problems is not None else Problems(source)
    values = _check_mapping(to_plain(section), parameters_of(target), path, found, set(ignore))
    if problems is None:
        found.raise_any()
    return values


def build_dataclass(
    cls: type,
    section: Mapping[str, Any] | None,
    path: str = "",
    source: Source | None = None,
    ignore: Iterable[str] = (),
) -> Any:
    """An instance of the dataclass from a section, nested dataclasses too, defaults filled in.

    Raises:
        ConfigError: as `check_section`.
    """
    return instantiate(cls, check_section(section, cls, path, source, ignore))


def instantiate(cls: type, values: Mapping[str, Any]) -> Any:
    """An instance of the dataclass from values that `check_section` returned."""
    parameters = parameters_of(cls)
    return cls(**{key: _instantiated(value, parameters[key].annotation) for key, value in values.items()})


def _instantiated(value: Any, annotation: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if nested := _dataclass_in(annotation):
        return instantiate(nested, value)
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in _MAPPINGS and len(arguments) == 2:
        return {key: _instantiated(item, arguments[1]) for key, item in value.items()}
    return value


def to_plain(value: Any) -> Any:
    """OmegaConf containers as plain dicts and lists, interpolations resolved; other values unchanged."""
    if type(value).__module__.startswith("omegaconf"):
        from omegaconf import OmegaConf

        return OmegaConf.to_container(value, resolve=True)
    return value


def describe(annotation: Any) -> str:
    """What an annotation allows, in words: ``int (at least 0), list of int or null``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    if origin is Annotated:
        named = [c for c in arguments[1:] if isinstance(c, Registered)]
        bounds = ", ".join(str(c) for c in arguments[1:] if hasattr(c, "problem"))
        return (
            str(named[0])
            if named
            else f"{describe(arguments[0])} ({bounds})"
            if bounds
            else describe(arguments[0])
        )
    if origin in (Union, types.UnionType):
        return _either([describe(a) for a in arguments])
    if origin is Literal:
        return _either([show(a) for a in arguments])
    if origin is tuple and Ellipsis not in arguments:
        return f"[{', '.join(describe(a) for a in arguments)}]"
    if annotation in _LISTS or origin in _LISTS:
        return f"list of {describe(arguments[0])}" if arguments else "list"
    if annotation in _MAPPINGS or origin in _MAPPINGS or dataclasses.is_dataclass(annotation):
        return "mapping"
    return getattr(annotation, "__name__", str(annotation))


def unknown_key(key: Any, allowed: Iterable[str]) -> str:
    """The message for a key that is not among the allowed ones: the nearest, and all that are allowed."""
    allowed = sorted(allowed)
    hint = did_you_mean(str(key), allowed)
    if hint and len(allowed) > _KEYS_SHOWN:
        return f"there is no such key.{hint}"
    return f"there is no such key.{hint} Allowed: {', '.join(allowed) or 'no keys at all'}"


def _fields_of(cls: Any) -> Parameters:
    hints = _type_hints(cls)
    found = Parameters()
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        default = REQUIRED
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found[field.name] = Parameter(hints.get(field.name, Any), default)
    return found


def _type_hints(target: Any) -> dict[str, Any]:
    """Evaluated annotations; one that cannot be evaluated (imported for type checkers only) is left out."""
    try:
        return typing.get_type_hints(target, include_extras=True)
    except NameError:
        pass
    hints = {}
    for owner in reversed(target.__mro__) if isinstance(target, type) else [inspect.unwrap(target)]:
        namespace = vars(inspect.getmodule(owner) or types)
        for name, annotation in getattr(owner, "__annotations__", {}).items():
            single = types.SimpleNamespace(__annotations__={name: annotation})
            try:
                hints.update(typing.get_type_hints(single, globalns=namespace, include_extras=True))
            except NameError:
                hints.pop(name, None)
    return hints


def _check_mapping(
    section: Any, parameters: Parameters, path: str, problems: Problems, ignore: set[str] | None = None
) -> dict[str, Any]:
    if section is None:
        section = {}
    if not isinstance(section, Mapping):
        problems.add(path, f"must be a mapping of keys to values, not {show(section)}")
        return {}
    allowed = [name for name in parameters if name not in (ignore or ())]
    values = {}
    for key, value in section.items():
        at = f"{path}.{key}" if path else str(key)
        if key in allowed:
            values[key] = _convert_parameter(value, parameters[key], at, problems)
        elif parameters.any_key and isinstance(key, str) and key not in (ignore or ()):
            values[key] = value
        else:
            problems.add(at, unknown_key(key, allowed))
    for name in allowed:
        if parameters[name].default is REQUIRED and name not in section:
            at = f"{path}.{name}" if path else name
            problems.add(at, f"is required: {describe(parameters[name].annotation)}")
    return values


def _convert_parameter(value: Any, parameter: Parameter, path: str, problems: Problems) -> Any:
    if value is None and parameter.default is None:
        return None
    return _convert(value, parameter.annotation, path, problems)


def _convert(value: Any, annotation: Any, path: str, problems: Problems) -> Any:
    """``value`` as ``annotation`` wants it; notes a problem and returns ``value`` where that cannot be."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _SCALARS:
        return _convert_scalar(value, annotation, path, problems)
    if origin is Annotated:
        return _convert_annotated(value, arguments, path, problems)
    if origin in (Union, types.UnionType):
        return _convert_union(value, annotation, path, problems)
    if origin is Literal:
        return _convert_literal(value, annotation, path, problems)
    if dataclasses.is_dataclass(annotation):
        if isinstance(value, cast(type, annotation)):
            return value
        return _check_mapping(value, parameters_of(annotation), path, problems)
    if annotation in _LISTS or origin in _LISTS:
        return _convert_list(value, annotation, path, problems)
    if annotation in _MAPPINGS or origin in _MAPPINGS:
        return _convert_dict(value, annotation, path, problems)
    return value


def _mismatch(value: Any, annotation: Any, path: str, problems: Problems) -> Any:
    quotes = (
        "; put it in quotes if it is meant as text" if annotation is str and not _is_container(value) else ""
    )
    problems.add(path, f"must be {describe(annotation)}, not {show(value)}{quotes}")
    return value


def _convert_scalar(value: Any, annotation: type, path: str, problems: Problems) -> Any:
    if annotation is float:
        number = _as_float(value)
        return _mismatch(value, annotation, path, problems) if number is None else number
    right = isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool))
    return value if right else _mismatch(value, annotation, path, problems)


def _as_float(value: Any) -> float | None:
    """A finite float, or None. YAML 1.1 reads ``1e-4`` as text, so numbers in text count."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _convert_annotated(value: Any, arguments: tuple[Any, ...], path: str, problems: Problems) -> Any:
    before = len(problems)
    value = _convert(value, arguments[0], path, problems)
    if len(problems) > before or value is None:
        return value
    for constraint in arguments[1:]:
        if not hasattr(constraint, "problem") or (
            isinstance(constraint, Registered) and not problems.check_names
        ):
            continue
        message = constraint.problem(value)
        if message:
            problems.add(path, message)
    return value


def _convert_union(value: Any, annotation: Any, path: str, problems: Problems) -> Any:
    """The first alternative that takes the value as it is, else the first that can convert it."""
    converted = []
    near_miss: Problems | None = None
    for alternative in typing.get_args(annotation):
        trial = problems.trial()
        result = _convert(value, alternative, path, trial)
        if not len(trial):
            converted.append(result)
        elif near_miss is None and _right_kind(value, alternative):
            near_miss = trial
    if converted:
        return next((c for c in converted if type(c) is type(value)), converted[0])
    if near_miss is not None:
        problems.extend(near_miss)
        return value
    return _mismatch(value, annotation, path, problems)


def _right_kind(value: Any, annotation: Any) -> bool:
    """Whether the value is of the alternative's kind, so that its complaint is the one to show."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _right_kind(value, arguments[0])
    if annotation in (bool, int, float, str):
        trial = Problems()
        _convert_scalar(value, annotation, "", trial)
        return not len(trial)
    if annotation in _LISTS or origin in _LISTS:
        return isinstance(value, list | tuple)
    if annotation in _MAPPINGS or origin in _MAPPINGS or dataclasses.is_dataclass(annotation):
        return isinstance(value, Mapping)
    return False


def _convert_literal(value: Any, annotation: Any, path: str, problems: Problems) -> Any:
    choices = typing.get_args(annotation)
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    hint = did_you_mean(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
    problems.add(path, f"must be {describe(annotation)}, not {show(value)}.{hint}")
    return value


def _convert_list(value: Any, annotation: Any, path: str, problems: Problems) -> Any:
    arguments = typing.get_args(annotation)
    if not isinstance(value, list | tuple):
        return _mismatch(value, annotation, path, problems)
    if typing.get_origin(annotation) is tuple and Ellipsis not in arguments:
        if len(value) != len(arguments):
            return _mismatch(value, annotation, path, problems)
        kinds = arguments
    else:
        kinds = (arguments[0] if arguments else Any,) * len(value)
    return [
        _convert(v, kind, f"{path}[{i}]", problems)
        for i, (v, kind) in enumerate(zip(value, kinds, strict=True))
    ]


def _convert_dict(value: Any, annotation: Any, path: str, problems: Problems) -> Any:
    if not isinstance(value, Mapping):
        return _mismatch(value, annotation, path, problems)
    arguments = typing.get_args(annotation)
    kind = arguments[1] if len(arguments) == 2 else Any
    trials = {key: problems.trial() for key in value}
    out = {key: _convert(item, kind, f"{path}.{key}", trials[key]) for key, item in value.items()}
    for key, trial in trials.items():
        if value[key] is None and len(trial):
            problems.add(
                f"{path}.{key}", f"must be {describe(kind)}, not null; take the key out to have none"
            )
        else:
            problems.extend(trial)
    return out


def _dataclass_in(annotation: Any) -> Any:
    """The dataclass an annotation is, or is an alternative of."""
    if dataclasses.is_dataclass(annotation):
        return annotation
    if typing.get_origin(annotation) in (Annotated, Union, types.UnionType):
        return next(filter(None, map(_dataclass_in, typing.get_args(annotation))), None)
    return None


def _is_container(value: Any) -> bool:
    return isinstance(value, list | tuple | Mapping)


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
