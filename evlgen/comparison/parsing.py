"""What the command line says: budgets, and axes of values."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from evlgen.common.errors import ConfigError, EVLGenError
from evlgen.config.yaml_io import parse_options

_UNITS = {"s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(it|s|min|m|h)\s*")
_OPENING, _CLOSING = "[{(", "]})"


@dataclasses.dataclass(frozen=True)
class Amount:
    """So much training: seconds or iterations."""

    value: float
    unit: Literal["s", "it"]

    @classmethod
    def parse(cls, text: str, what: str) -> Amount:
        """``120s``, ``2min``, ``1.5h`` or ``500it``.

        Raises:
            ConfigError: it is none of them, or nothing.
        """
        match = _AMOUNT.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"{what} {text}: write seconds or iterations, such as 120s, 2min, 1.5h or 500it."
            )
        number, unit = float(match[1]), match[2]
        if number <= 0 or (unit == "it" and number != int(number)):
            raise ConfigError(f"{what} {text}: must be more than 0, and iterations a whole number.")
        return cls(number, "it") if unit == "it" else cls(number * _UNITS[unit], "s")

    def share(self, share: float) -> Amount:
        """A part of it; of iterations at least one."""
        value = self.value * share
        return Amount(max(1.0, float(round(value))) if self.unit == "it" else value, self.unit)

    def __str__(self) -> str:
        return f"{self.value:g} {'iterations' if self.unit == 'it' else 's'}"


@dataclasses.dataclass(frozen=True)
class Axis:
    """One key and the values it takes, as they were written, in YAML."""

    key: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, what: str = "--grid") -> Axis:
        """``model.connector.r=0,4,8``; commas inside of brackets and quotes are part of a value.

        Raises:
            ConfigError: no key, no value, the same value twice, or one that is not YAML.
        """
        key, equals, rest = text.partition("=")
        key, values = key.strip(), tuple(value.strip() for value in split_values(rest))
        if not equals or not key or not all(values):
            raise ConfigError(f"{what} {text}: write key=value,value, such as model.connector.r=0,8,19.")
        doubled = next((value for value in values if values.count(value) > 1), None)
        if doubled is not None:
            raise ConfigError(f"{what} {text}: {doubled} is there twice.")
        for value in values:
            try:
                parse_options([f"{key}={value}"])
            except EVLGenError as error:
                raise ConfigError(str(error).replace("--options", what, 1)) from error
        return cls(key, values)

    def option(self, value: str) -> str:
        """The ``--options`` entry that gives the key a value."""
        return f"{self.key}={value}"

    def label(self, value: str) -> str:
        """What a value is called in plots and tables: ``mlp``, ``r=8``, ``tomeformer, r=16``."""
        last = self.key.rpartition(".")[2]
        content = parse_options([f"value={value}"])["value"]
        if not isinstance(content, dict):
            return value if last in ("name", "arch", "model_type") else f"{last}={value}"
        parts = [str(content["name"])] if "name" in content else []
        return ", ".join([*parts, *(f"{k}={v}" for k, v in content.items() if k != "name")]) or last


def split_values(text: str) -> list[str]:
    """Splits at the commas that are outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and not parts[-1].strip(" {[,:"):
            quote = character
        elif character in "\"'" and parts[-1].rstrip()[-1] in "{[,:":
            quote = character
        elif character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        elif character == "," and depth <= 0:
            parts.append("")
            continue
        parts[-1] += character
    return parts


def parse_seeds(text: str) -> list[int]:
    """``42,43,44``. Raises `ConfigError` for what is no whole number, and for one that is there twice."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--seeds {text}: write whole numbers, such as 42,43,44.") from error
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text}: a seed is there twice.")
    return seeds


def parse_shares(text: str | None, stages: int) -> list[float]:
    """The share of the budget of each of so many stages.

    Args:
        text: shares of all stages but the last, with commas between them; None: equal shares.

    Raises:
        ConfigError: their number or sum does not fit.
    """
    if text is None:
        return [1 / stages] * stages
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--stage-split {text}: write shares, such as 0.5.") from error
    if len(shares) != stages - 1 or min(shares) <= 0 or sum(shares) >= 1:
        raise ConfigError(
            f"--stage-split {text}: a run of {stages} stages needs {stages - 1} of it, each above 0 and "
            "below 1 together; the last stage has the rest."
        )
    return [*shares, 1 - sum(shares)]
