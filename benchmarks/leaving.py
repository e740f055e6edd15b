"""Captions a second of processor time where images whose texts have ended leave the batch, against the same
batch that stays whole; the bundled Shapes model, whose texts end at different lengths.

    python benchmarks/leaving.py [--batch 64] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from harness import check_equal
from PIL import Image

from evlgen import load_model_and_preprocess
from evlgen.common.logs import quiet_libraries
from evlgen.datasets.shapes.world import draw, scene
from evlgen.models.language import generation

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1},
    "beam 5": {"num_beams": 5},
    "sampled": {"use_nucleus_sampling": True},
}
WHOLE, LEAVING = -1.0, generation._STAY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    model, processors, _ = load_model_and_preprocess("evlgen_opt", "shapes")
    images = [Image.fromarray(draw(scene("test", number))) for number in range(args.batch)]
    samples = {"image": torch.stack([processors["eval"](image) for image in images])}
    for name, options in WAYS.items():
        seconds: dict[float, list[float]] = {WHOLE: [], LEAVING: []}
        texts: dict[float, list[str]] = {}
        for number in range(1 + args.rounds):
            for stay in seconds if number % 2 else reversed(seconds):
                generation._STAY = stay
                torch.manual_seed(number)
                started = time.process_time()  # of this process: what else the machine does is not in it
                texts[stay] = model.generate(samples, max_length=40, **options)
                if number:
                    seconds[stay].append(time.process_time() - started)
            check_equal(texts[WHOLE], texts[LEAVING], 0.0)
        whole, leaving = (args.batch / statistics.median(seconds[stay]) for stay in (WHOLE, LEAVING))
        print(
            f"{name:<8} {leaving:6.1f} against {whole:6.1f} captions/s, ratio {leaving / whole:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
