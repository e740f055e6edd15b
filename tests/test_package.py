"""The installed package carries its YAML files and weights, and works away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

USE = """
import evlgen, sys
from pathlib import Path
assert Path(evlgen.__file__).is_relative_to(sys.argv[1]), evlgen.__file__
from PIL import Image
from evlgen.datasets.shapes.world import draw, scene
model, vis, _ = evlgen.load_model_and_preprocess("evlgen_opt")
image = vis["eval"](Image.fromarray(draw(scene("test", 0)))).unsqueeze(0)
print(model.generate({"image": image}, num_beams=1))
from evlgen.common.config import Config
print(Config.load("projects/evlgen/coco_ft.yaml").model.language.name)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds the wheel from a copy of the sources, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "evlgen", source / "evlgen", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md"):
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


def test_the_installed_wheel_captions_and_finds_its_projects(wheel, tmp_path):
    target = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(install, check=True)
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
