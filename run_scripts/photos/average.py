"""The mean of the weights of two checkpoints of one model, as a third, with the first one's config.yaml.

Usage: python run_scripts/photos/average.py FIRST SECOND OUTPUT
A model and what it became by further training often have a mean that is better than both: Wortsman et al.,
"Robust fine-tuning of zero-shot models", CVPR 2022 (arXiv:2109.01903).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def average(first: Path, second: Path, output: Path) -> None:
    """Writes the folder ``output``. Raises `SystemExit` where the two hold different weights."""
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    if {name: w.shape for name, w in one.items()} != {name: w.shape for name, w in other.items()}:
        sys.exit(f"{first} and {second} hold weights of different models")
    mean = {name: ((w.float() + other[name].float()) / 2).to(w.dtype) for name, w in one.items()}
    output.mkdir(parents=True)
    save_file(mean, output / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(first / "config.yaml", output / "config.yaml")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    average(*map(Path, sys.argv[1:]))
