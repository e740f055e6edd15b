"""When a run's checkpoints are saved."""

from __future__ import annotations

from evlgen.runners.listener import Listener, Step, TrainingRun


class Checkpointing(Listener):
    """Saves every ``run.save_every`` iterations, after each (inner) epoch, and where a run is stopped."""

    def before_update(self, runner: TrainingRun) -> None:
        runner.checkpointer.wait_for_copy()

    def after_step(self, runner: TrainingRun, step: Step) -> None:
        every = runner.run.save_every
        if every and runner.state.iteration % every < step.iterations:
            self._save(runner)

    def after_epoch(self, runner: TrainingRun) -> None:
        self._save(runner)

    def after_validation(self, runner: TrainingRun, is_best: bool) -> None:
        runner.checkpointer.end_epoch(runner.state, is_best)

    def before_stop(self, runner: TrainingRun) -> None:
        self._save(runner)
        runner.checkpointer.wait()
        runner.checkpointer.raise_problem()

    def after_training(self, runner: TrainingRun) -> None:
        runner.checkpointer.raise_problem()

    def _save(self, runner: TrainingRun) -> None:
        if runner.checkpointer.saved_iteration != runner.state.iteration:
            own = {"skipped": runner.skipped.to_json()}
            runner.checkpointer.save(runner.model, runner.optimizer, runner.state, own)
