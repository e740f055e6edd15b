"""Step time of ours and of the textbook as the work grows: batch, tokens in, r, length of the text.

    python benchmarks/scaling.py [--rounds 3] [--plot benchmarks/scaling.png]

One thing changes at a time; the rest stays at batch 4, 257 tokens, r = 19 and 16 text tokens. float32 on a
CPU. Prints a table in Markdown and draws the same numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from harness import Comparison, check_equal, compare
from step import OurStep, TextbookStep, write_weights
from textbook import Sizes

from evlgen.common.logs import quiet_libraries

VALUES = {
    "batch": [1, 2, 4, 8],
    "tokens in": [65, 145, 257, 401],
    "r": [0, 8, 16, 19],
    "text tokens": [8, 16, 32, 64],
}
USUAL = {"batch": 4, "tokens in": 257, "r": 19, "text tokens": 16}
PATCH = 14


def samples(batch: int, tokens: int, text_tokens: int) -> dict[str, Any]:
    """A batch whose every text has so many tokens, with its start and its newline."""
    side = PATCH * round((tokens - 1) ** 0.5)
    image = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    return {"image": image, "text_input": [" red" * (text_tokens - 2)] * batch}


def points(folder: Path, rounds: int) -> Iterator[tuple[str, int, Comparison]]:
    """What is changed, to what, and both times there."""
    for tokens in VALUES["tokens in"]:
        image_size = PATCH * round((tokens - 1) ** 0.5)
        sizes = Sizes(image_size=image_size, max_txt_len=max(VALUES["text tokens"]))
        write_weights(sizes, folder)
        check = [
            make(dataclasses.replace(sizes, dropout=0.0), folder, "fp32") for make in (OurStep, TextbookStep)
        ]
        ours, textbook = (make(sizes, folder, "fp32") for make in (OurStep, TextbookStep))
        for what, values in VALUES.items():
            if tokens == USUAL["tokens in"] or what == "tokens in":
                for value in values if what != "tokens in" else [tokens]:
                    setting = {**USUAL, "tokens in": tokens, what: value}
                    given = samples(setting["batch"], tokens, setting["text tokens"])
                    for step in (*check, ours, textbook):
                        set_r(step, setting["r"])
                    one, two = (step.check(given)[0] for step in check)
                    check_equal(one, two, 1e-5)
                    yield (
                        what,
                        value,
                        compare(partial(ours, given), partial(textbook, given), rounds, 1, tolerance=None),
                    )


def set_r(step: OurStep | TextbookStep, r: int) -> None:
    """Merges so many pairs in every layer from now on."""
    if isinstance(step, OurStep):
        step.model.connector.r = [r] * len(step.model.connector.r)
    else:
        step.model.VLconnector.r = r


def draw(found: dict[str, list[tuple[int, Comparison]]], path: Path) -> None:
    """One panel for each thing that changes."""
    figure, axes = plt.subplots(1, len(found), figsize=(13, 3.4), sharey=True, layout="constrained")
    for axis, (what, measured) in zip(axes, found.items(), strict=True):
        values = [value for value, _ in measured]
        for name, side in (("textbook", "other"), ("ours", "ours")):
            sides = [getattr(comparison, side) for _, comparison in measured]
            medians = [one.median for one in sides]
            lows = [one.median - min(one.seconds) for one in sides]
            highs = [max(one.seconds) - one.median for one in sides]
            axis.errorbar(values, medians, (lows, highs), marker="o", capsize=3, label=name)
        axis.set_xlabel(what)
        axis.set_xticks(values)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds per step")
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_name("scaling.png"))
    args = parser.parse_args()
    quiet_libraries()
    found: dict[str, list[tuple[int, Comparison]]] = {what: [] for what in VALUES}
    with tempfile.TemporaryDirectory() as name:
        for what, value, comparison in points(Path(name), args.rounds):
            found[what].append((value, comparison))
            print(
                f"{what} {value}: {comparison.ours.median:.2f} s, {comparison.ratio:.2f} of the textbook",
                flush=True,
            )
    print("\n| what | value | ours, s | textbook, s | ratio |\n|---|---|---|---|---|")
    for what, measured in found.items():
        for value, comparison in measured:
            ours, other = comparison.ours.median, comparison.other.median
            print(f"| {what} | {value} | {ours:.2f} | {other:.2f} | {comparison.ratio:.2f} |")
    draw(found, args.plot)


if __name__ == "__main__":
    main()
