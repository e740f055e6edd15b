"""What docs/how-it-works.md names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")


def defined(path: str) -> set[str]:
    """The classes, functions and methods of a file: ``Name``, ``Name.method``."""
    names = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
            names |= {f"{node.name}.{x.name}" for x in ast.walk(node) if isinstance(x, ast.FunctionDef)}
    return names


def test_every_file_and_function_it_names_is_there():
    named = re.findall(r"`(evlgen/[\w/]+\.py)`\W+`([\w.]+)`", PAGE)
    assert len(named) > 24
    missing = [(path, name) for path, name in named if name not in defined(path)]
    assert not missing


def test_every_file_and_link_is_there():
    files = re.findall(r"`(evlgen/[\w/]+\.py)`", PAGE)
    links = [f"docs/{link}" for link in re.findall(r"\]\(([^)#:]+)\)", PAGE)]
    assert not [path for path in [*files, *links] if not (ROOT / path).is_file()]


def test_eight_files_are_to_be_read():
    assert len(set(re.findall(r"\*\*`(evlgen/[\w/]+\.py)`\*\*", PAGE))) == 8
