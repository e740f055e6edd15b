"""What pyproject.toml asks of the code as a whole: style, types, and floors; none imports upwards."""

from __future__ import annotations

import subprocess
import sys

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
