"""The notebooks of examples/ run from their first cell to their last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first_captioner", "comparing_connectors"])
def test_a_notebook_runs_to_its_end(name, tmp_path):
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    script = tmp_path / f"{name}.py"
    script.write_text("\n\n".join(code), encoding="utf-8")
    paths = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"ITERATIONS": "3", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "output").is_dir()
