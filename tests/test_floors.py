"""The floors of the package: pyproject.toml lists them, and nothing imports upwards."""

from __future__ import annotations

import subprocess
import sys

from evlgen.files.io import PACKAGE_ROOT

# in a process of its own: it sets up the log
CHECK = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def test_nothing_imports_upwards():
    found = subprocess.run(
        [sys.executable, "-c", CHECK], cwd=PACKAGE_ROOT.parent, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout
