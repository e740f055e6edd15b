"""What configurations name of code: parts by their dotted paths; and plugins in files of somebody else, which
are imported only where the user names them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from evlgen.common.errors import EVLGenError
from evlgen.common.plugins import is_imported
from evlgen.common.safe_text import shown_name

_NAMING_KEYS = ("name", "arch", "kind", "builder", "task", "runner", "lr_sched")
_CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\.[A-Z]\w*")


def modules_of_paths(config: Any) -> list[str]:
    """The modules of the classes that a configuration names by dotted path, such as
    ``connector: {name: my_package.my_module.MyConnector}``: they are plugins as those under ``plugins:`` are.
    """
    found: list[str] = []
    entries = config.items() if isinstance(config, Mapping) else [(None, item) for item in config]
    for key, value in entries:
        if key in _NAMING_KEYS and isinstance(value, str) and _CLASS_PATH.fullmatch(value):
            found.append(value.rpartition(".")[0])
        elif isinstance(value, Mapping | list):
            found += modules_of_paths(value)
    return found


def check_named(plugins: Iterable[str], what: str) -> None:
    """Raises `EVLGenError` where a file from the hub needs plugins that the user has not named: they are
    code, and nothing of what was fetched is run.

    Args:
        what: needs them, for the message.
    """
    wanted = [plugin for plugin in plugins if not is_imported(plugin)]
    if wanted:
        raise EVLGenError(
            f"{shown_name(what)} needs plugins: {', '.join(map(shown_name, wanted[:5]))}. Nothing that comes "
            "with weights is run. Get that code, read it, and name it yourself: --plugins ./my_part.py (in "
            "Python: import it first)."
        )
