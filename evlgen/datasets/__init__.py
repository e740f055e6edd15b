"""Datasets and their builders. Importing this package registers the built-in ones."""

from __future__ import annotations

from evlgen.datasets import (  # noqa: F401 (registers)
    caption_builders,
    conversation_dataset,
    flickr8k,
    question_builders,
    shapes_dataset,
    shapes_video_dataset,
    shapes_vqa_dataset,
    shard_builders,
    table_dataset,
)
from evlgen.datasets.base_builder import BaseDatasetBuilder
from evlgen.datasets.base_dataset import BaseDataset, Skipped

__all__ = ["BaseDataset", "BaseDatasetBuilder", "Skipped"]
