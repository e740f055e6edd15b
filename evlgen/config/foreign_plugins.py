"""Plugins that files of somebody else list: they are imported only where the user names them."""

from __future__ import annotations

from pathlib import Path

from evlgen.common.errors import CheckpointError
from evlgen.common.plugins import is_imported
from evlgen.common.safe_text import shown_name
from evlgen.config.yaml_io import read_yaml


def check_plugins(file: Path, name: str) -> None:
    """Raises `CheckpointError` where a ``config.yaml`` from the hub lists plugins that the user has not
    named: they are code, and nothing of what was fetched is run.

    Args:
        file: the ``config.yaml``.
        name: what the user asked for.
    """
    plugins = read_yaml(file).get("plugins") or []
    listed = [str(plugin) for plugin in (plugins if isinstance(plugins, list) else [plugins])]
    wanted = [plugin for plugin in listed if not is_imported(plugin)]
    if wanted:
        raise CheckpointError(
            f"{shown_name(name)} needs plugins: {', '.join(map(shown_name, wanted[:5]))}. Nothing that comes "
            "with weights is run. Get that code, read it, and name it yourself: --plugins ./my_part.py (in "
            "Python: import it first)."
        )
