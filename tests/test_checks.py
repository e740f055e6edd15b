"""What pyproject.toml asks of the code as a whole: style, types, and floors; none imports upwards."""

from __future__ import annotations

import subprocess
import sys

import grimp
import pytest

from evlgen.files.io import PACKAGE_ROOT

FLOORS = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
CHECKS = {
    "style": ["-m", "ruff", "check", "--quiet"],
    "types": ["-m", "mypy", "--no-error-summary"],
    "floors": ["-c", FLOORS],
}


@pytest.mark.parametrize("check", CHECKS)
def test_the_code_passes(check):
    found = subprocess.run(
        [sys.executable, *CHECKS[check]], cwd=PACKAGE_ROOT.parent, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_no_modules_import_each_other_in_a_circle():
    """Nor inside functions, nor for types."""
    graph = grimp.build_graph("evlgen", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    while free := [module for module, others in imports.items() if not others & imports.keys()]:
        for module in free:
            del imports[module]
    circles = {module for module in imports if module in graph.find_upstream_modules(module)}
    assert not {module: imports[module] & imports.keys() for module in circles}


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ("README.md", 150),
        ("examples/minimal.py", 150),
        ("evlgen/runners/runner.py", 250),
        ("evlgen/common/*.py", 700),
    ],
)
def test_what_a_newcomer_reads_stays_short(files, limit):
    root = PACKAGE_ROOT.parent
    assert 0 < sum(len(path.read_text(encoding="utf-8").splitlines()) for path in root.glob(files)) <= limit
