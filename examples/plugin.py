"""A task, a dataset and a connector of one's own, in one file. Train them with

    python train.py --cfg-path examples/plugin.yaml

The YAML names this file under ``plugins:``; ``--plugins examples/plugin.py`` does the same from the command
line. What the constructors below take is what the YAML may say: a misspelt key or a wrong type is named
before anything is loaded.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from evlgen import registry
from evlgen.config.schema import PositiveInt
from evlgen.datasets import BaseDataset, BaseDatasetBuilder
from evlgen.models.connectors import Connector, ConnectorInputs
from evlgen.tasks import CaptioningTask

COLOURS = {"red": (214, 40, 40), "green": (50, 160, 70), "blue": (40, 90, 210), "yellow": (235, 205, 50)}


@registry.register_connector("grid_pool")
class GridPool(Connector):
    """Averages the patches over a coarse grid; one linear layer makes soft prompts of the averages.

    Args:
        grid: side of the grid: grid x grid soft prompts.
    """

    def __init__(self, inputs: ConnectorInputs, grid: PositiveInt = 2) -> None:
        super().__init__()
        self.grid, self.num_prefix_tokens = grid, inputs.num_prefix_tokens
        self.side = math.isqrt(inputs.num_tokens - inputs.num_prefix_tokens)
        self.norm = nn.LayerNorm(inputs.vision_dim)
        self.proj = nn.Linear(inputs.vision_dim, inputs.language_dim)
        nn.init.normal_(self.proj.weight, std=inputs.embedding_rms / math.sqrt(inputs.vision_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        patches = (
            tokens[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, (self.side, self.side))
        )  # [B, C, h, w]
        pooled = (
            nn.functional.adaptive_avg_pool2d(patches, self.grid).flatten(2).transpose(1, 2)
        )  # [B, grid^2, C]
        return self.proj(self.norm(pooled))

    def num_soft_prompts(self, num_tokens: int) -> int:
        return self.grid**2


class PlainColours(BaseDataset):
    """Images of one colour, ``a large red square``."""

    def __init__(self, size: int, first: int, vis_processor, text_processor) -> None:
        super().__init__(
            [list(COLOURS)[(first + i) % len(COLOURS)] for i in range(size)], vis_processor, text_processor
        )

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (64, 64), COLOURS[self.records[index]])

    def load_sample(self, index: int) -> dict:
        return {
            "image": self.vis_processor(self.image(index)),
            "text_input": self.text_processor(self.references()[index][0]),
            "image_id": index,
            "instance_id": str(index),
        }

    def references(self) -> dict[int, list[str]]:
        return {i: [f"a large {colour} square"] for i, colour in enumerate(self.records)}


@registry.register_builder("plain_colours")
class PlainColoursBuilder(BaseDatasetBuilder):
    """Builds `PlainColours`.

    Args:
        train_size: images to train on.
    """

    splits = ["train", "test"]

    def __init__(
        self,
        name: str,
        cache_root: Path,
        vis_processor: dict,
        text_processor: dict,
        train_size: PositiveInt = 64,
    ) -> None:
        super().__init__(name, cache_root, vis_processor, text_processor)
        self.train_size = train_size

    def build_split(self, split: str) -> PlainColours:
        size = self.train_size if split == "train" else len(COLOURS)
        return PlainColours(size, split == "test", self.vis_processor(split), self.text_processor(split))


@registry.register_task("captioning_exact")
class ExactCaptioning(CaptioningTask):
    """Captioning that also counts captions equal to a reference, and chooses checkpoints by that."""

    def after_evaluation(
        self, results: list[dict], dataset: BaseDataset, split: str, folder: Path
    ) -> dict[str, float]:
        metrics = super().after_evaluation(results, dataset, split, folder)
        references = dataset.references()
        exact = [float(r["caption"] in references[r["image_id"]]) for r in results]
        share = torch.tensor(exact).mean().item()
        return {**metrics, "exact": share, "agg_metrics": share}
