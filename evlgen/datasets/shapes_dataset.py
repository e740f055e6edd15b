"""The Shapes world as a captioning dataset: every image is drawn when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.config.constraints import PositiveInt
from evlgen.config.dataset_config import DatasetConfig
from evlgen.datasets.base_builder import BaseDatasetBuilder, role_of
from evlgen.datasets.base_dataset import BaseDataset, about_positions
from evlgen.datasets.shapes.captions import captions as write_captions
from evlgen.datasets.shapes.checker import check
from evlgen.datasets.shapes.world import SPLITS, draw, scene
from evlgen.processors.base_processor import BaseProcessor


class ShapesCaptionDataset(BaseDataset):
    """One sample per scene: ``image`` float32 [3, H, W], ``image_id`` (the scene's index), ``instance_id``;
    in training also ``text_input``, one of the scene's five captions, chosen by torch's global generator.

    Args:
        split: train, val or test.
        size: how many scenes.
        seed: of the world; another seed gives other scenes.
        vis_processor: Pillow image -> tensor.
        text_processor: caption -> text to learn; without one, samples have no ``text_input``.
    """

    def __init__(
        self,
        split: str,
        size: int,
        seed: int,
        vis_processor: BaseProcessor,
        text_processor: BaseProcessor | None = None,
    ) -> None:
        super().__init__(range(size), vis_processor, text_processor)
        self.split = split
        self.seed = seed

    def load_visual(self, index: int) -> torch.Tensor:
        return self.vis_processor(self.image(index))

    def load_text(self, index: int) -> dict[str, Any]:
        number = self.records[index]
        sample = {"image_id": number, "instance_id": str(number)}
        if self.text_processor is not None:
            texts = self.captions_of(number)
            sample["text_input"] = self.text_processor(texts[int(torch.randint(len(texts), ()))])
        return sample

    def visual_source(self, index: int) -> str:
        return f"shapes/{self.seed}/{self.split}/{self.records[index]}"

    def size(self, index: int) -> int:
        """See `MediaDataset.size`."""
        return about_positions(self.captions_of(self.records[index]))

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(draw(scene(self.split, self.records[index], self.seed)))

    def extra_metrics(self, captions: Mapping[int | str, str]) -> dict[str, float]:
        """``true_captions``: the share of captions that state nothing wrong and leave no shape out."""
        right = [self.is_true(text, int(number)) for number, text in captions.items()]
        return {"true_captions": sum(right) / len(right)} if right else {}

    def references(self) -> dict[int | str, list[str]]:
        """All five captions of every scene."""
        return {number: self.captions_of(number) for number in self.records}

    def captions_of(self, number: int) -> list[str]:
        """The five captions of a scene, by its index."""
        return write_captions(scene(self.split, number, self.seed))

    def is_true(self, caption: str, number: int) -> bool:
        """Whether a caption states nothing wrong about a scene and leaves no shape out."""
        return check(caption, scene(self.split, number, self.seed)).true


@dataclass(frozen=True, kw_only=True)
class ShapesConfig(DatasetConfig):
    """The section of a dataset of the Shapes world.

    Args:
        train_size, val_size, test_size: samples of each split. No scene is in two splits.
        seed: of the world.
        data_type: what the scenes are shown as, which the builder has decided.
        dataset_card: a page about the dataset; nothing reads it.
    """

    train_size: PositiveInt = 20000
    val_size: PositiveInt = 500
    test_size: PositiveInt = 500
    seed: int = 0
    data_type: Literal["images", "videos"] | None = None
    dataset_card: str | None = None


@registry.register_builder("shapes_caption")
class ShapesCaptionBuilder(BaseDatasetBuilder):
    """Captioned scenes of the Shapes world. Nothing is read from disk, so nothing can be missing.

    Raises:
        ConfigError: ``data_type`` is not what the class shows.
    """

    CONFIG = ShapesConfig
    config: ShapesConfig

    DEFAULT_CONFIG = "configs/datasets/shapes_caption.yaml"
    DATA_TYPE = "images"
    dataset_class: type[ShapesCaptionDataset] = ShapesCaptionDataset

    def __init__(self, name: str, cache_root: str | Path, *section: Any, **values: Any) -> None:
        super().__init__(name, cache_root, *section, **values)
        if (given := self.config.data_type) not in (None, self.DATA_TYPE):
            raise ConfigError(f"datasets.{name}.data_type: must be {self.DATA_TYPE}, not {given}.")
        self.sizes = {split: getattr(self.config, f"{split}_size") for split in SPLITS}
        self.seed = self.config.seed

    @property
    def splits(self) -> list[str]:
        return list(SPLITS)

    def build_split(self, split: str) -> BaseDataset:
        text_processor = self.text_processor(split) if role_of(split) == "train" else None
        return self.dataset_class(
            split, self.sizes[split], self.seed, self.vis_processor(split), text_processor
        )
