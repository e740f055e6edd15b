"""Draws how runs came to use their images: what the image is worth, and the common part of the soft prompts.

    python benchmarks/image_use.py NAME=RUN_FOLDER [NAME=RUN_FOLDER ...] --output docs/image_use.png

RUN_FOLDER is the folder that a training wrote to (``output/flickr8k_lite/latest``). The runs drawn in
docs/training-on-real-parts.md, and their commands, are listed there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
PANELS = {
    "image_worth": "worth of the image, nats per token",
    "eval_loss": "loss in eval mode, nats per token",
    "common_fraction": "common part of the soft prompts",
}


def evaluations(folder: Path) -> list[dict[str, float]]:
    """The evaluations of a run in which the use of images was measured."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["type"] == "evaluation"]
    return [record for record in records if "image_worth" in record and record["iteration"] is not None]


def draw(runs: dict[str, Path]) -> Figure:
    figure = Figure(figsize=(4.2 * len(PANELS), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (key, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for (name, folder), colour in zip(runs.items(), COLOURS * len(runs), strict=False):
            points = evaluations(folder)
            axis.plot(
                [p["iteration"] for p in points],
                [p[key] for p in points],
                "o-",
                color=colour,
                label=name,
                ms=4,
            )
        axis.set_xlabel("iterations")
        axis.set_ylabel(label)
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN_FOLDER")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    runs = {name: Path(folder) for name, _, folder in (run.partition("=") for run in args.runs)}
    for name, folder in runs.items():
        last = evaluations(folder)[-1]
        shown = "  ".join(f"{key} {last[key]:.3f}" for key in (*PANELS, "exchanged_loss", "train_loss"))
        print(f"{name}: iteration {last['iteration']}  {shown}")
    draw(runs).savefig(args.output, dpi=130)


if __name__ == "__main__":
    main()
