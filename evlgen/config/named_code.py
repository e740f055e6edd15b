"""What configurations name of code: parts by their dotted paths; and plugins in files of somebody else, which
are imported only where the user names them."""

from __future__ import annotations

import importlib.machinery
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evlgen.common.errors import EVLGenError
from evlgen.common.safe_text import shown_name
from evlgen.weights.checkpoints import WEIGHTS_FILE, found_checkpoints
from evlgen.weights.hub_checkpoints import is_from_hub

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


def comes_with_weights(file: Path) -> bool:
    """Whether a YAML file may be somebody else's: it lies beside weights, in the folder of a run with
    checkpoints, or in a folder from the hub."""
    return lies_beside_weights(file) or bool(found_checkpoints(file.parent / "checkpoints"))


def not_imported_unasked(plugins: Iterable[str], file: Path) -> list[str]:
    """Which plugins of a file that comes with weights the user has to name himself: all that it lists, where
    it lies beside the weights. The file in the folder of a run lists what the run imported, by absolute
    paths, and goes on by itself: there those inside the folder, and relative paths. Imports nothing."""
    if lies_beside_weights(file):
        return [name for name in plugins if name.partition(".")[0] != "evlgen"]
    return [name for name in plugins if _may_lie_in(name, file.parent)]


def lies_beside_weights(file: Path) -> bool:
    """Whether a YAML file is in a folder with weights, or in one from the hub."""
    return os.path.lexists(file.parent / WEIGHTS_FILE) or is_from_hub(file.parent)


def _may_lie_in(plugin: str, folder: Path) -> bool:
    if plugin.endswith(".py"):
        path = os.path.expanduser(plugin)
        return not os.path.isabs(path) or _is_below(path, folder)
    spec = importlib.machinery.PathFinder.find_spec(plugin.partition(".")[0])
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    return any(_is_below(place, folder) for place in places if place)


def _is_below(path: str, folder: Path) -> bool:
    """Whether a file lies in a folder, or is a link that does."""
    found = (Path(os.path.abspath(path)), Path(path).resolve())
    return any(place.is_relative_to(top) for place in found for top in (folder.absolute(), folder.resolve()))


def check_named(plugins: Iterable[str], what: str) -> None:
    """Raises `EVLGenError` where somebody else's file needs plugins that the user has not named: they are
    code, and nothing that comes with weights is run.

    Args:
        what: needs them, for the message.
    """
    wanted = [plugin for plugin in plugins if not _is_imported(plugin)]
    if wanted:
        raise EVLGenError(
            f"{shown_name(what)} needs plugins: {', '.join(map(shown_name, wanted[:5]))}. Nothing that comes "
            "with weights is run. Get that code, read it, and name it yourself: --plugins ./my_part.py (in "
            "Python: import it first)."
        )


def _is_imported(plugin: str) -> bool:
    """Whether its module is imported already; a file is known by its own name, wherever it lies. Imports
    nothing."""
    if not plugin.endswith(".py"):
        return plugin in sys.modules
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    return any(file and os.path.basename(file) == os.path.basename(plugin) for file in files)
