"""README, docs and what surrounds them: short, linked right, and true to the code they speak of."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from evlgen.commands import COMMANDS
from evlgen.config.yaml_io import read_yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")], key=lambda p: p.as_posix()
)
CODE = re.compile(r"^```.*?^```", re.S | re.M)


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ +(.*)$", CODE.sub("", page.read_text("utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_readme_is_read_in_three_minutes():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    lost = []
    for target, anchor in re.findall(r"\]\(([^)\s:#]*)(#[^)\s]*)?\)", CODE.sub("", page.read_text("utf-8"))):
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor[1:] not in _anchors(path)):
            lost.append(target + anchor)
    assert lost == []


def test_commands_and_project_files_in_the_pages_exist():
    text = "\n".join(page.read_text("utf-8") for page in PAGES if page.name != "CHANGELOG.md")
    projects = set(re.findall(r"projects/[\w/.-]+\.yaml", text))
    assert len(projects) > 10
    assert [name for name in sorted(projects) if not (ROOT / "evlgen" / name).is_file()] == []
    assert set(re.findall(r"^(?:\$ )?python -m evlgen (\w+)", text, re.M)) <= set(COMMANDS)
    scripts = set(re.findall(r"\b(?:bash|python) ((?:run_scripts|benchmarks|docs)/[\w/]+\.(?:sh|py))", text))
    assert [name for name in sorted(scripts) if not (ROOT / name).is_file()] == []


def test_python_in_the_readme_gives_what_it_shows():
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.S | re.M)
    example = doctest.DocTestParser().get_doctest(block, {}, "README.md", "README.md", 0)
    assert example.examples
    output: list[str] = []
    results = doctest.DocTestRunner().run(example, out=output.append)
    assert results.failed == 0, "".join(output)


def test_messages_under_troubleshooting_are_those_of_the_code():
    literals = [
        "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else node.value
        for path in (ROOT / "evlgen").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    text = "\n".join(literals)
    headings = re.findall(r"^### (.*)$", (ROOT / "docs" / "troubleshooting.md").read_text("utf-8"), re.M)
    messages = [message for heading in headings for message in re.findall(r"`([^`]+)`", heading)]
    assert len(messages) > 15
    of_libraries = {"torch.OutOfMemoryError: CUDA out of memory"}
    assert [m for m in messages if m not in of_libraries and m.replace("nan", "{}") not in text] == []


def test_versions_of_python_are_the_same_everywhere():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    versions = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text("utf-8"))
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python"] == versions
    assert project["requires-python"] == f">={versions[0]}"
    citation = read_yaml(ROOT / "CITATION.cff")
    assert (str(citation["version"]), citation["license"]) == (project["version"], project["license"])
    for path in [*ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"), ROOT / ".pre-commit-config.yaml"]:
        assert yaml.safe_load(path.read_text("utf-8")), path


def test_the_site_is_built_without_a_warning(tmp_path):
    missing = [name for name in ("mkdocs", "material", "mkdocstrings") if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f'{", ".join(missing)} not installed: pip install -e ".[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8"))
    assert {path.name for path in ROOT.glob("docs/*.md")} <= set(listed)
    assert "num_soft_prompts" in (tmp_path / "api" / "index.html").read_text("utf-8")
    assert (tmp_path / "overview.svg").is_file() and (tmp_path / "benchmarks" / "claims.png").is_file()
