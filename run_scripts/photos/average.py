"""The mean of the weights of two checkpoints of one model, as a third, with the first one's config.yaml.

Usage: python run_scripts/photos/average.py FIRST SECOND OUTPUT
A model and what it became by further training often have a mean that is better than both: Wortsman et al.,
"Robust fine-tuning of zero-shot models", CVPR 2022 (arXiv:2109.01903).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from evlgen.common.errors import EVLGenError
from evlgen.weights.checkpoints import is_checkpoint
from evlgen.weights.weights import read_weights


def weights_of(*folders: Path) -> list[dict[str, Tensor]]:
    """The weights of checkpoints of one model. Raises `SystemExit` where a folder is no checkpoint, or one of
    another model."""
    for folder in folders:
        if not is_checkpoint(folder):
            sys.exit(f"{folder} is not a checkpoint: it has no model.safetensors and config.yaml")
    try:
        found = [read_weights(folder / "model.safetensors") for folder in folders]
    except EVLGenError as error:
        sys.exit(str(error))
    for folder, weights in zip(folders, found, strict=True):
        if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in found[0].items()}:
            sys.exit(f"{folders[0]} and {folder} hold weights of different models")
    return found


def write(weights: dict[str, Tensor], like: Path, output: Path) -> None:
    """Writes a checkpoint with the config.yaml of another. Raises `SystemExit` where it cannot."""
    try:
        output.mkdir(parents=True)
        save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
        shutil.copyfile(like / "config.yaml", output / "config.yaml")
    except OSError as error:
        sys.exit(f"{output} cannot be made ({error.strerror}). Name another folder.")


def average(first: Path, second: Path, output: Path) -> None:
    """Writes the folder ``output``. Raises `SystemExit` as `weights_of` and `write`."""
    one, other = weights_of(first, second)
    mean = {name: ((w.float() + other[name].float()) / 2).to(w.dtype) for name, w in one.items()}
    write(mean, first, output)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    average(*map(Path, sys.argv[1:]))
