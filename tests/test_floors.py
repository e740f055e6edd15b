"""The floors of the package: pyproject.toml lists them, and nothing imports upwards."""

from __future__ import annotations

from importlinter.cli import lint_imports

from evlgen.files.io import PACKAGE_ROOT


def test_nothing_imports_upwards(capsys, monkeypatch):
    monkeypatch.chdir(PACKAGE_ROOT.parent)
    code = lint_imports(config_filename="pyproject.toml", no_cache=True)
    assert code == 0, capsys.readouterr().out
