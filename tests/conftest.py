"""Fixtures shared by all tests: golden numbers of the published implementation, and real data where it is present."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """Small reference numbers of the published implementation, kept in the repository."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real photographs, clips and broken files beside the checkout; tests that need them skip where they are absent."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"real data for development is not at {folder / 'data'}")
    return folder
