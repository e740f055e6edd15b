"""The recipe of the bundled backbones still runs, shortened, and gives files of the layout that is
bundled."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from forks import Forks
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "evlgen" / "assets" / "shapes"
WEIGHTS = ("vision.safetensors", "language/model.safetensors")


@pytest.fixture(scope="module")
def made(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("backbones")
    script = ROOT / "run_scripts" / "make_shapes_backbones.sh"
    result = subprocess.run(
        ["bash", str(script), str(output), "12"],
        env={**os.environ, "PYTHON": forks.python},
        cwd=output,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return output


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_recipe_gives_the_tensors_that_are_bundled(made: Path, name: str):
    assert shapes_in(made / name) == shapes_in(BUNDLED / name)


@pytest.mark.slow
def test_the_recipe_gives_the_bundled_vocabulary(made: Path):
    new, bundled = (
        json.loads((folder / "language/tokenizer.json").read_text())["model"] for folder in (made, BUNDLED)
    )
    assert set(new["vocab"]) == set(bundled["vocab"])
    assert {tuple(m) for m in new["merges"]} == {tuple(m) for m in bundled["merges"]}


@pytest.mark.slow
def test_the_card_holds_the_numbers_of_the_run(made: Path):
    card = (made / "CARD.md").read_text()
    assert f"12 steps of {json.loads((made / 'vision.json').read_text())['batch_size']} images" in card
    assert not re.search(r"{\w+", card)


def test_bundled_files_stay_below_twelve_megabytes_in_all():
    assert sum(p.stat().st_size for p in BUNDLED.rglob("*") if p.is_file()) < 12e6


def test_the_bundled_card_says_how_long_and_how_well():
    card = (BUNDLED / "CARD.md").read_text()
    minutes = [float(m) for m in re.findall(r"\| ([\d.]+) \|$", card, flags=re.MULTILINE)]
    assert len(minutes) == 2
    assert 0 < sum(minutes) < 40
