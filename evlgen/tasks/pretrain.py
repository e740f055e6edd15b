"""Pretraining on images or video and their texts: the model's own loss is trained, and nothing is scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from evlgen.batch import Batch
from evlgen.common.registry import registry
from evlgen.models.base_model import BaseModel
from evlgen.tasks.base_task import BaseTask


@registry.register_task("video_text_pretrain")
@registry.register_task("image_text_pretrain")
class ImageTextPretrainTask(BaseTask):
    """Trains and scores nothing, as in LAVIS (`lavis/tasks/image_text_pretrain.py`), and as
    ``video_text_pretrain`` on video. Without
    ``run.valid_splits`` there is no validation; `CaptioningTask` is the task that has one."""

    WRITES = False

    def valid_step(self, model: BaseModel, samples: Batch) -> list[dict[str, Any]]:
        """No results."""
        return []

    def after_evaluation(
        self, results: list[dict[str, Any]], dataset: Dataset, split: str, folder: Path
    ) -> dict[str, float]:
        """No metrics."""
        return {}
