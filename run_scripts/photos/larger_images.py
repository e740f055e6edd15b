"""A checkpoint's weights for larger images; and with what another one has learned that began where it began.

Usage: python run_scripts/photos/larger_images.py CHECKPOINT GRID LARGER OUTPUT [LATER EARLIER]

CHECKPOINT: a folder, whose TomeFormer read GRID x GRID visual tokens (7, of 224 pixels)
LARGER:     it shall read LARGER x LARGER (9, of 288 pixels): its positions are stretched over that grid
LATER, EARLIER: CHECKPOINT began from EARLIER, and so did LATER: the difference is added (task arithmetic:
            Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv:2212.04089)

OUTPUT has CHECKPOINT's config.yaml; model.vision.image_size and model.connector.r are the project file's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.nn.functional as F
from average import weights_of, write
from torch import Tensor

POSITIONS = "connector.positions.weight"


def stretched(table: Tensor, grid: int, larger: int) -> Tensor:
    """The first rows of [positions, C], those of a grid, over a larger grid."""
    known = table[: grid**2].float().T.reshape(1, -1, grid, grid)
    wanted = F.interpolate(known, size=(larger, larger), mode="bilinear", align_corners=True)
    found = table.clone()
    found[: larger**2] = wanted.flatten(2)[0].T.to(table.dtype)
    return found


def main(checkpoint: str, grid: str, larger: str, output: str, *later_and_earlier: str) -> None:
    weights, *others = weights_of(*map(Path, (checkpoint, *later_and_earlier)))
    rows = len(weights.get(POSITIONS, ()))
    if not rows:
        sys.exit(f"{checkpoint} has no {POSITIONS}: its connector is not a TomeFormer")
    if not all(side.isdecimal() and 0 < int(side) ** 2 <= rows for side in (grid, larger)):
        sys.exit(
            f"GRID and LARGER are whole numbers whose squares are at most {rows}, not {grid} and {larger}"
        )
    for name, value in weights.items() if others else ():
        # a variance of model.soft_prompts must stay positive
        if value.is_floating_point() and not name.endswith("variance"):
            new, old = (other[name].float() for other in others)
            weights[name] = (value.float() + new - old).to(value.dtype)
    weights[POSITIONS] = stretched(weights[POSITIONS], int(grid), int(larger))
    write(weights, Path(checkpoint), Path(output))


if __name__ == "__main__":
    if len(sys.argv) not in (5, 7):
        sys.exit(__doc__)
    main(*sys.argv[1:])
