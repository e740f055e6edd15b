"""What a runner asks of a task. `evlgen.tasks.base_task.BaseTask` is the base class of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from evlgen.batch import Batch
from evlgen.datasets.base_dataset import BaseDataset
from evlgen.models.base_model import BaseModel
from evlgen.runners.distribution import Distribution


class Task(Protocol):
    """See `evlgen.tasks.base_task.BaseTask`, which documents each method."""

    def before_training(self, datasets: Mapping[str, BaseDataset], distribution: Distribution) -> None: ...

    def check_split(self, model: BaseModel, dataset: BaseDataset, split: str) -> None: ...

    def to_learn(self, samples: Batch) -> Batch: ...

    def train_step(self, model: nn.Module, samples: Batch) -> dict[str, Any]: ...

    def before_evaluation(self, dataset: BaseDataset, split: str) -> None: ...

    def held_out(self, samples: Batch, dataset: BaseDataset) -> Batch | None: ...

    def references_of(self, dataset: BaseDataset) -> Mapping[int | str, list[str]]: ...

    def not_answerable(self, model: BaseModel, samples: Batch) -> Mapping[int, str]: ...

    def valid_step(self, model: BaseModel, samples: Batch) -> list[dict[str, Any]]: ...

    def finish_evaluation(
        self, model: BaseModel, results: list[dict[str, Any]], dataset: BaseDataset
    ) -> list[dict[str, Any]]: ...

    def after_evaluation(
        self, results: list[dict[str, Any]], dataset: BaseDataset, split: str, folder: Path
    ) -> dict[str, float]: ...
