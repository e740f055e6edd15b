"""Bounds and registry names as annotations, such as ``Annotated[int, AtLeast(1)]``; `schema` reads them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from evlgen.common.errors import RegistryError, did_you_mean
from evlgen.common.registry import registry


def show(value: Any) -> str:
    """A value as YAML would write it, short enough for a message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class _Bound:
    bound: float

    words: ClassVar[str]
    holds: ClassVar[Callable[[Any, float], bool]]

    def problem(self, value: Any) -> str | None:
        return None if type(self).holds(value, self.bound) else f"must be {self}, not {show(value)}"

    def __str__(self) -> str:
        return f"{self.words} {self.bound:.12g}"


class AtLeast(_Bound):
    """The number is ``bound`` or more."""

    words, holds = "at least", operator.ge


class MoreThan(_Bound):
    """The number is above ``bound``."""

    words, holds = "more than", operator.gt


class AtMost(_Bound):
    """The number is ``bound`` or less."""

    words, holds = "at most", operator.le


class LessThan(_Bound):
    """The number is below ``bound``."""

    words, holds = "less than", operator.lt


@dataclass(frozen=True)
class Registered:
    """The text names something registered of this kind."""

    kind: str

    def problem(self, value: Any) -> str | None:
        if not isinstance(value, str):
            return f"must be {self}, not {show(value)}"
        try:
            if registry.has(self.kind, value):
                return None
        except RegistryError as error:
            return str(error).rstrip(".")
        known = registry.names(self.kind)
        hint = did_you_mean(value, known)
        return f"no {self.kind} is registered as {show(value)}.{hint} Known: {', '.join(known) or 'none'}"

    def __str__(self) -> str:
        return f"a registered {self.kind}"


PositiveInt = Annotated[int, AtLeast(1)]
NonNegativeInt = Annotated[int, AtLeast(0)]
PositiveFloat = Annotated[float, MoreThan(0)]
NonNegativeFloat = Annotated[float, AtLeast(0)]
Fraction = Annotated[float, AtLeast(0), AtMost(1)]
