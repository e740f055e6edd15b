"""Images of the Shapes world per second on one core, and captioned samples as training reads them.

python benchmarks/shapes_world.py
"""

from __future__ import annotations

import time

import torch

from evlgen.datasets.shapes.captions import captions
from evlgen.datasets.shapes.world import draw, scene
from evlgen.datasets.shapes_dataset import ShapesCaptionDataset
from evlgen.processors import build_processor


def rate(work, count: int = 3000) -> float:
    """Calls of ``work(i)`` per second: the median of five rounds."""
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        for i in range(count):
            work(i)
        rates.append(count / (time.perf_counter() - start))
    return sorted(rates)[2]


def main() -> None:
    torch.set_num_threads(1)
    scenes = [scene("train", i) for i in range(3000)]
    images, texts = (
        build_processor({"name": "blip_image_eval", "image_size": 64}),
        build_processor({"name": "blip_caption"}),
    )
    dataset = ShapesCaptionDataset("train", 3000, 0, images, texts)
    print(f"scene           {rate(lambda i: scene('train', i)):8.0f} /s")
    print(f"draw            {rate(lambda i: draw(scenes[i])):8.0f} /s")
    print(f"scene and draw  {rate(lambda i: draw(scene('train', i))):8.0f} /s")
    print(f"five captions   {rate(lambda i: captions(scenes[i])):8.0f} /s")
    print(f"whole samples   {rate(lambda i: dataset[i]):8.0f} /s")


if __name__ == "__main__":
    main()
