"""The contract of tasks: what is trained, what is generated, and how it is scored."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from evlgen.batch import Batch
from evlgen.common.errors import DataError
from evlgen.config.run_config import CAPTION_LEN, RunConfig
from evlgen.models.base_model import BaseModel

if TYPE_CHECKING:
    from evlgen.datasets.base_dataset import BaseDataset
    from evlgen.runners.distribution import Distribution

logger = logging.getLogger(__name__)


def select(samples: Batch, indices: list[int]) -> Batch:
    """The samples of a batch with these indices."""
    values: Mapping[str, Any] = samples
    chosen = {
        key: value[indices] if isinstance(value, Tensor) else [value[i] for i in indices]
        for key, value in values.items()
    }
    return cast(Batch, chosen)


class BaseTask:
    """One way to train and evaluate a model. The runner loops; a task says what happens to a batch.

    Args:
        run: the ``run`` section.
    """

    ASKS = False  # whether the samples' own texts are read before those to write
    WRITES = True  # whether an evaluation generates texts
    LEARNS_WRITING = False  # whether training generates the texts that it learns
    MAX_LEN = CAPTION_LEN  # tokens generated at most where ``run.max_len`` is not set

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        #: Of the latest evaluation: a metric, and each sample's value by its image's (question's) id.
        self.sample_scores: tuple[str, Mapping[Any, float]] = ("", {})
        self._referenced: BaseDataset | None = None
        self._references: Mapping[int | str, list[str]] = {}
        self.max_len = run.max_len or self.MAX_LEN

    def generation_options(self, **names: str) -> dict[str, Any]:
        """What ``run`` sets of generation, for a model's `generate`. What it does not set is left to the
        model, whose architecture has its own defaults.

        Args:
            names: the model's name of a setting -> its name in ``run``, where they differ.
        """
        keys = {key: key for key in ("num_beams", "length_penalty", "repetition_penalty")} | names
        found = {name: getattr(self.run, key) for name, key in keys.items()}
        return {name: value for name, value in found.items() if value is not None}

    def before_training(self, datasets: Mapping[str, BaseDataset], distribution: Distribution) -> None:
        """Called once before the first `train_step`, on every process.

        Args:
            datasets: those trained on, by the name that ``samples["dataset"]`` has for each sample.
            distribution: how the model is spread; `Distribution.writing` is where a step may generate.
        """

    def check_split(self, model: BaseModel, dataset: BaseDataset, split: str) -> None:
        """Called before training with each split that is to be evaluated. Raises `ConfigError` where that
        cannot be: an evaluation would find out after an epoch."""

    def train_step(self, model: nn.Module, samples: Batch) -> dict[str, Any]:
        """The losses of a batch; ``loss`` is what is minimised, the others are logged."""
        return model(self.to_learn(samples))

    def to_learn(self, samples: Batch) -> Batch:
        """The samples of a batch as the model's `forward` reads them. Where some have a list of texts
        (``captions_together``), those of all become one list, with ``num_texts``.

        Raises:
            DataError: they lack what this task learns.
        """
        texts: Sequence[str | list[str]] = samples.get("text_input", [])
        if not any(isinstance(of_one, list) for of_one in texts):
            return samples
        lists = [of_one if isinstance(of_one, list) else [of_one] for of_one in texts]
        flat = [text for of_one in lists for text in of_one]
        return {**samples, "text_input": flat, "num_texts": [len(of_one) for of_one in lists]}

    def prompts(self, samples: Batch) -> list[str]:
        """The samples' own texts that the model is given to continue; empty where it is given none."""
        return []

    def before_evaluation(self, dataset: BaseDataset, split: str) -> None:
        """Called before the first `valid_step` of a split, on every process."""

    def held_out(self, samples: Batch, dataset: BaseDataset) -> Batch | None:
        """Those samples of an evaluation to which people wrote a text, with it, as `to_learn` gives those of
        training: what `evlgen.runners.image_use` measures. None where there are none."""
        known = self.references_of(dataset)
        written = {i: known.get(image_id) for i, image_id in enumerate(samples.get("image_id", []))}
        texts = {i: of_one[0] for i, of_one in written.items() if of_one}
        if not texts:
            return None
        process = getattr(dataset, "text_processor", None) or (lambda text: text)
        return self.to_learn(
            {**select(samples, list(texts)), "text_input": [process(text) for text in texts.values()]}
        )

    def references_of(self, dataset: BaseDataset) -> Mapping[int | str, list[str]]:
        """`BaseDataset.references`, read once."""
        if self._referenced is not dataset:
            self._referenced, self._references = dataset, dataset.references()
        return self._references

    def not_answerable(self, model: BaseModel, samples: Batch) -> Mapping[int, str]:
        """The samples of a batch that `valid_step` could write nothing for, and why: they are skipped."""
        return {}

    def valid_step(self, model: BaseModel, samples: Batch) -> list[dict[str, Any]]:
        """One JSON-able result for each sample of a batch."""
        raise NotImplementedError(f"{type(self).__name__} must define valid_step(model, samples)")

    def finish_evaluation(
        self, model: BaseModel, results: list[dict[str, Any]], dataset: BaseDataset
    ) -> list[dict[str, Any]]:
        """Called after the last `valid_step` of a split, on every process, with the results it has so far:
        for what needs the model and all samples. Returns the results of this process."""
        return results

    def after_evaluation(
        self, results: list[dict[str, Any]], dataset: BaseDataset, split: str, folder: Path
    ) -> dict[str, float]:
        """Writes the results of a split into ``folder`` and scores them.

        Returns:
            metrics by name; ``agg_metrics`` is what the best checkpoint is chosen by (higher is better).
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define after_evaluation(results, dataset, split, folder)"
        )

    def check_keys(self, samples: Mapping[str, Any], keys: Iterable[str]) -> None:
        """Raises `DataError` where a batch lacks what this task scores by."""
        for key in keys:
            if key not in samples:
                raise DataError(
                    f"task '{self.run.task}' scores by '{key}', which the dataset's samples have not "
                    f"(they have {', '.join(samples)}). Its load_sample, or load_text, must give it."
                )

    def warn_if_incomplete(self, results: Sized, dataset: Sized, path: Path) -> None:
        """Warns where a file to upload lacks samples that were skipped."""
        in_test = self.run.max_eval_samples or len(dataset)
        limits = (min(len(dataset), n) for n in (in_test, self.run.max_valid_samples or in_test))
        asked = min((n for n in limits if n >= len(results)), default=len(results))
        if missing := asked - len(results):
            logger.warning(
                "%s lacks %d of %d samples, which were skipped: a leaderboard may refuse it",
                path,
                missing,
                asked,
            )
