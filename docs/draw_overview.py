"""Draws docs/overview.svg: frozen encoder, connector that merges tokens, frozen language model.

python docs/draw_overview.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from evlgen.datasets.shapes.world import draw, scene

FROZEN, TRAINED, INK, SOFT = "#dfe7f1", "#ffe0b8", "#22303f", "#66727f"
GROUPS = ["#2a9d5c", "#5b7fd4", "#d9822b", "#a558b5", "#b9c0c8"]


def draw_overview(path: Path) -> None:
    """Writes the figure in the format of the path's suffix; the same bytes every time."""
    plt.rcParams.update({"svg.hashsalt": "evlgen", "font.size": 10, "text.color": INK})
    figure = plt.figure(figsize=(10, 2.9), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 100), ylim=(3.5, 32.5))
    axes.axis("off")

    axes.imshow(draw(scene("test", 1)), extent=(2, 14, 12, 24), zorder=2, interpolation="nearest")
    for place in range(1, 4):
        axes.plot([2 + 3 * place] * 2, [12, 24], color="white", lw=1, zorder=3)
        axes.plot([2, 14], [12 + 3 * place] * 2, color="white", lw=1, zorder=3)
    axes.text(8, 9.6, "image in patches", ha="center", color=SOFT)

    _box(axes, 18, 14, "vision encoder", "frozen", FROZEN)
    _box(axes, 37, 34, "connector: TomeFormer", "trained: the only part that is", TRAINED)
    _box(axes, 76, 14, "language model", "frozen", FROZEN)

    axes.text(25, 18, "EVA-CLIP,\nCLIP,\nany timm model", ha="center", va="center", fontsize=9)
    axes.text(83, 18, "OPT, Vicuna, T5,\nany causal model", ha="center", va="center", fontsize=9)

    columns = [(39.5, 16), (48, 12), (56.5, 8), (65, 5)]  # left edge, tokens drawn
    for number, (left, count) in enumerate(columns):
        height = 14 / columns[0][1]
        for token in range(count):
            colour = GROUPS[token * len(GROUPS) // count]
            size = (left, 18 + (count / 2 - token - 1) * height)
            axes.add_patch(Rectangle(size, 3.4, height * 0.8, color=colour, lw=0, zorder=3))
        if number:
            before, previous = columns[number - 1]
            for edge in (-1, 1):
                heights = [18 + edge * previous / 2 * height, 18 + edge * count / 2 * height]
                axes.plot([before + 3.8, left - 0.4], heights, color=SOFT, lw=0.8, ls=":", zorder=3)
    axes.text(41.2, 9, "257 visual\ntokens", ha="center", va="center", fontsize=9)
    axes.text(54, 9, "each layer merges\nsimilar tokens", ha="center", va="center", color=SOFT, fontsize=9)
    axes.text(66.9, 9, "29 soft\nprompts", ha="center", va="center", fontsize=9)

    for start, end in ((14.4, 17.6), (32.4, 36.6), (71.4, 75.6), (90.4, 92.6)):
        arrow = FancyArrowPatch((start, 18), (end, 18), arrowstyle="-|>", mutation_scale=12, color=INK)
        axes.add_patch(arrow)
    axes.text(
        93, 18, "a green\nsquare\nabove\nanother\ngreen\nsquare", va="center", fontsize=9, style="italic"
    )
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
    plt.close(figure)


def _box(axes: plt.Axes, left: float, width: float, title: str, note: str, colour: str) -> None:
    shape = FancyBboxPatch((left + 0.6, 6), width - 1.2, 24, boxstyle="round,pad=0.6", fc=colour, ec="none")
    axes.add_patch(shape)
    middle = left + width / 2
    axes.text(middle, 28.2, title, ha="center", weight="bold")
    axes.text(middle, 25.9, note, ha="center", fontsize=9, color=SOFT)


if __name__ == "__main__":
    draw_overview(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("overview.svg")))
