"""The table and the figure of benchmarks/photos.md, of the comparisons that benchmarks/photos.sh made.

python benchmarks/photos.py FOLDER [--figure FILE.png]     (FOLDER: output/photos_compare)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLUMNS = "weights, soft prompts, captions/s, captions, loss, worth of the image, METEOR, CIDEr".split(", ")
PANELS = {"image_worth": "worth of the image, nats per token", "CIDEr": "CIDEr"}


def finished_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """The finished run of each comparison of one configuration and one seed, by its folder's name."""
    found = {}
    for path in sorted(folder.glob("*/report.json")):
        (configuration,) = json.loads(path.read_text(encoding="utf-8"))["configurations"]
        (run,) = configuration["runs"]
        if run["status"] == "finished":
            found[path.parent.name] = run
    return dict(sorted(found.items(), key=lambda item: -item[1]["final"]["CIDEr"]))


def row(name: str, run: dict[str, Any]) -> str:
    use, final = run["image_use"], run["final"]
    worth = " / ".join(f"{point['image_worth']:.2f}" for point in [*of_last_stage(run)[:-1], use])
    cells = [
        f"{run['trainable_parameters'] / 1e6:.1f} M",
        str(run["soft_prompts"]),
        f"{run['samples_per_s']:.1f}",
        f"{run['samples']:,}",
        f"{use['eval_loss']:.2f}",
        worth,
        f"{final['METEOR']:.3f}" if "METEOR" in final else "",  # it needs Java
        f"{final['CIDEr']:.3f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def of_last_stage(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluations of what writes captions with the language model."""
    return [point for point in run["curve"] if point["stage"] == run["curve"][-1]["stage"]]


def draw(runs: dict[str, dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (key, label) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for name, run in runs.items():
            points = [(p["seconds"], p[key]) for p in of_last_stage(run) if p.get(key) is not None]
            axis.plot(*zip(*points, strict=True), "o-", ms=4, label=name)
        axis.set_xlim(left=0)
        axis.set_xlabel("seconds of training")
        axis.set_ylabel(label)
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    runs = finished_runs(args.folder)
    print(f"| | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name, run in runs.items():
        print(row(name, run))
    if args.figure is not None:
        draw(runs).savefig(args.figure, dpi=110)


if __name__ == "__main__":
    main()
