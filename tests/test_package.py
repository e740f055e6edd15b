"""The installed package carries its YAML files and weights, and works away from the checkout."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

USE = """
import builtins, importlib, pkgutil, sys
import_module = builtins.__import__


def import_on_windows(name, globals=None, *rest, **named):
    if name in {"fcntl", "grp", "pty", "pwd", "resource", "termios"}:
        if (globals or {}).get("__name__", "").startswith("evlgen"):
            raise ModuleNotFoundError(f"No module named '{name}'")
    return import_module(name, globals, *rest, **named)


builtins.__import__ = import_on_windows
import evlgen
for module in pkgutil.walk_packages(evlgen.__path__, "evlgen."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from pathlib import Path
assert Path(evlgen.__file__).is_relative_to(sys.argv[1]), evlgen.__file__
from PIL import Image
from evlgen.datasets.shapes.world import draw, scene
model, vis, _ = evlgen.load_model_and_preprocess("evlgen_opt")
image = vis["eval"](Image.fromarray(draw(scene("test", 0)))).unsqueeze(0)
print(model.generate({"image": image}, num_beams=1))
from evlgen.config.config import Config
print(Config.load("projects/evlgen/coco_ft.yaml").model.language.name)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds the wheel from a copy of the sources, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "evlgen", source / "evlgen", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True)
    return next(folder.glob("*.whl"))


def test_every_yaml_and_asset_is_in_the_wheel(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    data = [
        p
        for kind in ("configs", "projects", "assets")
        for p in (ROOT / "evlgen" / kind).rglob("*")
        if p.is_file()
    ]
    assert len(data) > 10
    assert [str(p) for p in data if p.relative_to(ROOT).as_posix() not in inside] == []


def test_bundled_weights_stay_small(wheel):
    weights = [i for i in zipfile.ZipFile(wheel).infolist() if "/assets/" in i.filename]
    assert 1e6 < sum(i.file_size for i in weights) < 12e6


def test_the_installed_wheel_imports_without_unix_modules_captions_and_finds_its_projects(wheel, tmp_path):
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    environment = {**os.environ, "PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USE, str(target)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    caption, language = done.stdout.strip().splitlines()[-2:]
    assert len(caption) > 8 and language == "facebook/opt-2.7b"


# what another package imports when it is there, and why it is needed
NOT_IMPORTED = {
    "bitsandbytes": "transformers, for quantised weights",
    "eva-decord": "it is imported as decord",
    "gguf": "transformers, for GGUF files",
    "sentencepiece": "transformers, for LLaMA's and T5's tokenizers",
    "tensorboard": "torch.utils.tensorboard",
}


def test_declared_and_imported_packages_are_the_same():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [
        line
        for name, of in project["optional-dependencies"].items()
        if name not in ("docs", "tests")
        for line in of
    ]
    declared = {_normal(re.match(r"[\w.-]+", line)[0]) for line in project["dependencies"] + extras}
    found = set()
    for path in (ROOT / "evlgen").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    found -= {"evlgen", *sys.stdlib_module_names}
    packages = importlib.metadata.packages_distributions()
    imported = {_normal(package) for name in found for package in packages.get(name, [name])}
    assert imported | NOT_IMPORTED.keys() == declared


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
