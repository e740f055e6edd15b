"""HTML pages that need nothing else: no script, and nothing from elsewhere. ``templates/`` has their text."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from evlgen.common.safe_text import Lines, printable
from evlgen.report.plots import COLOURS


def render(template: str, **values: Any) -> str:
    """A page of ``templates/``. Text is shown as text, whatever is in it: control characters escaped, and
    never as markup."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("evlgen.report"),
        autoescape=True,
        finalize=_as_text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["value"] = yaml_value
    environment.globals |= {"colour": _colour, "image_data": image_data}
    return environment


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _as_text(value: Any) -> Any:
    """Printable text of what a template shows; its line breaks stay where they are our own."""
    return value if isinstance(value, Markup | Lines) else printable(value)


def yaml_value(value: Any) -> str:
    """A plain value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def image_data(file: Path | None) -> str | None:
    """A PNG file as an address for an ``img`` element; None where it is missing."""
    if file is None or not file.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
