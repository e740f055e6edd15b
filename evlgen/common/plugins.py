"""Plugins: code of the user's own that registers connectors, datasets, tasks when imported."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from evlgen.common.errors import EVLGenError

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "evlgen.plugins"


def load_plugins(names: Sequence[str], base: Path | None = None) -> list[str]:
    """Imports plugins; one that is loaded already is left as it is.

    Args:
        names: ``package.module``, or a file whose name ends in ``.py``.
        base: the folder of the YAML file: relative files are looked up there, then in the working folder.

    Returns:
        The names with files as absolute paths, each once: what a saved configuration lists.

    Raises:
        EVLGenError: a file or module is not there, or it raised while it was imported.
    """
    loaded = []
    for name in names:
        if name.endswith(".py"):
            path = _find_file(name, base)
            _load_file(name, path)
            loaded.append(str(path))
        else:
            _load_module(name)
            loaded.append(name)
    return list(dict.fromkeys(loaded))


def load_entry_points() -> list[str]:
    """Imports what installed packages declare as entry points ``evlgen.plugins``; returns their names.

    Raises:
        EVLGenError: one of them raised while it was imported.
    """
    unordered = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)  # as folders list them
    found = sorted(unordered, key=lambda entry: (entry.name, entry.value))
    for entry in found:
        package = entry.dist.name if entry.dist else "an installed package"
        plugin = f"plugin '{entry.name}' of {package} ({entry.value})"
        with _named(plugin, "Repair or uninstall that package."):
            entry.load()
    return [entry.name for entry in found]


def _find_file(name: str, base: Path | None) -> Path:
    given = Path(os.path.expanduser(name))
    places = list(dict.fromkeys(folder / given for folder in (base or Path.cwd(), Path.cwd())))
    for place in places:
        if os.path.isfile(place):
            return place.resolve()
    looked = " nor at ".join(str(place.absolute()) for place in dict.fromkeys(places))
    raise EVLGenError(f"plugin '{name}': there is no file at {looked}.")


def _load_file(name: str, path: Path) -> None:
    # The same file is the same module in every process, so that its classes can be pickled by name.
    module_name = f"evlgen_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise EVLGenError(f"plugin '{name}': {path} is not a Python file. Its name has to end in .py.")
    module = importlib.util.module_from_spec(spec)
    named = _named(f"plugin '{name}' ({path})", "", path)
    with named, _registered(module_name, module), _on_path(path.parent):
        spec.loader.exec_module(module)
    logger.info("plugin %s loaded", path)


def _load_module(name: str) -> None:
    try:
        known = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        known = not (error.name and f"{name}.".startswith(f"{error.name}."))
    except ValueError:
        known = name in sys.modules
    if not known:
        raise EVLGenError(
            f"plugin '{name}': Python finds no such module. Install its package, put its folder on "
            "PYTHONPATH, or give the file, such as ./my_task.py."
        )
    with _named(f"plugin '{name}'", ""):
        importlib.import_module(name)


@contextmanager
def _registered(name: str, module: ModuleType) -> Iterator[None]:
    """The module in ``sys.modules`` while it runs, as dataclasses need it; out again where it fails."""
    sys.modules[name] = module
    try:
        yield
    except BaseException:
        del sys.modules[name]
        raise


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """The folder importable for as long as the plugin is imported, so that it finds its neighbours."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


@contextmanager
def _named(plugin: str, remedy: str, path: Path | None = None) -> Iterator[None]:
    """Any error of a plugin as one that names the plugin, the cause and the line."""
    try:
        yield
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".rstrip(": .")
        raise EVLGenError(f"{plugin} failed{_line_in(path, error)}: {cause}. {remedy}".rstrip()) from error


def _line_in(path: Path | None, error: Exception) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        return f" at line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f" at line {lines[-1]}" if lines else ""
