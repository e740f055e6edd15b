"""Measures in every evaluation how much the model uses its images."""

from __future__ import annotations

from functools import partial

from evlgen.batch import Batch
from evlgen.runners.image_use import ImageUseMeter
from evlgen.runners.listener import Evaluation, Listener, TrainingRun


class ImageUseWatch(Listener):
    """Measures `ImageUse` in every evaluation; `Evaluation.image_use` has it."""

    def before_evaluation(self, runner: TrainingRun, evaluation: Evaluation) -> None:
        self._meter = ImageUseMeter(runner.run.image_use_samples)

    def before_answers(self, runner: TrainingRun, evaluation: Evaluation, samples: Batch) -> Batch:
        held_out = partial(runner.task.held_out, dataset=evaluation.dataset)
        return self._meter.measure(runner.model, samples, held_out)

    def after_evaluation(self, runner: TrainingRun, evaluation: Evaluation) -> None:
        evaluation.image_use = self._meter.over_processes()
