"""The protocol of listeners: what is called as a run goes on, the package's own parts and those of users."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from evlgen.batch import Batch
from evlgen.common.registry import registry
from evlgen.config.schema import check_section
from evlgen.runners.training_state import TrainingState

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from evlgen.common.lr_schedules import Schedule
    from evlgen.config.run_config import RunConfig
    from evlgen.datasets.base_dataset import BaseDataset
    from evlgen.loaders.batch_plan import BatchPlan
    from evlgen.loaders.interruption import StopRequest
    from evlgen.loaders.mixed_plan import MixedPlan
    from evlgen.models.base_model import BaseModel
    from evlgen.runners.batches import TrainingBatches
    from evlgen.runners.checkpointer import Checkpointer
    from evlgen.runners.distribution import Distribution
    from evlgen.runners.image_use import ImageUse
    from evlgen.runners.lengths import Epochs
    from evlgen.runners.skipped import SkippedSamples
    from evlgen.runners.task import Task
    from evlgen.runners.weight_average import WeightAverage


@dataclass
class Step:
    """One optimizer step.

    Attributes:
        iterations: batches of this process that it is of.
        samples: how many were trained on, on all processes; 0 where none could be read.
        losses: means over all processes: ``loss`` and what else the task gives; empty where there were no
            samples.
        learning_rate: of the step.
        grad_norm: before clipping.
        is_finite: whether loss and gradient are; else the weights did not change.
        seen: of this process: each batch's loss and sample ids.
    """

    iterations: int
    samples: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    learning_rate: float = 0.0
    grad_norm: float = 0.0
    is_finite: bool = False
    seen: list[tuple[Tensor, list[str]]] = field(default_factory=list)


@dataclass
class Evaluation:
    """The evaluation of a split, as far as it is.

    Attributes:
        key: the split's name, ``dataset/split`` where there are several datasets.
        state: of the run that is being validated; None for a test.
        results: one for each sample, in no order; of all processes once all are there.
        metrics: by name.
        skipped: how many samples were skipped, by cause.
        seconds: what it took.
        image_use: None where it could not be measured.
        samples: some of the results for people, on the main process; see `SampleCaptions`.
    """

    key: str
    split: str
    dataset: BaseDataset
    state: TrainingState | None
    results: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    image_use: ImageUse | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What a validation is called in folders and logs; empty for a test."""
        return "" if self.state is None else f"epoch{self.state.epoch + 1}"

    @property
    def name(self) -> str:
        """Of its folder in ``result/``."""
        return "_".join(x for x in (self.key.replace("/", "_"), self.label) if x)

    @property
    def title(self) -> str:
        """What messages call it."""
        return " ".join(x for x in (self.key, self.label) if x)


class TrainingRun(Protocol):
    """What listeners, and the parts of the loop, see of a `Runner`.

    Attributes:
        run: the ``run`` section.
        folder: where the run writes.
        config: the whole configuration as plain values.
        datasets: dataset name -> split name -> dataset.
        trained: the weights with gradients, in the model's order, as the epoch began.
        average: of the weights, where there is one.
        clock: when the time of training was last counted, in seconds.
        kept_tokens: evaluated datasets that show visual tokens, by the evaluation's key and number of
            samples.
    """

    run: RunConfig
    task: Task
    model: BaseModel
    datasets: dict[str, dict[str, BaseDataset]]
    folder: Path
    config: dict[str, Any]
    accelerator: Accelerator
    distribution: Distribution
    length: Epochs
    plan: BatchPlan | MixedPlan
    batches: TrainingBatches
    schedule: Schedule
    optimizer: Optimizer
    trained: list[Parameter]
    average: WeightAverage | None
    state: TrainingState
    skipped: SkippedSamples
    checkpointer: Checkpointer
    stop: StopRequest
    listeners: list[Listener]
    clock: float
    kept_tokens: dict[tuple[str, int], BaseDataset]

    @property
    def log(self) -> ShowsProgress: ...

    def notify(self, event: str, *arguments: Any) -> None:
        """Calls a method of all listeners."""

    def where(self) -> str:
        """How far training is, for messages."""

    def count_time(self) -> None:
        """Adds the time since `clock` to that of training."""


class ShowsProgress(Protocol):
    """Shows how far a loop is."""

    def progress(self, batches: Any, label: str) -> Any: ...


class Listener:
    """Is called as a run goes on. A listener of your own overrides what it needs:

    .. code-block:: python

        @registry.register_listener("print_loss")
        class PrintLoss(Listener):
            def __init__(self, every: int = 10) -> None:
                self.every = every

            def after_step(self, runner, step):
                if step.is_finite and runner.state.iteration % self.every == 0:
                    print(runner.where(), step.losses["loss"])

    and is named in ``run.listeners``, as ``[print_loss]`` or ``[{name: print_loss, every: 5}]``: the
    parameters of its constructor are its settings.

    Every process calls all methods but `after_record`, in the same order. Files are for the one whose
    ``runner.accelerator.is_main_process`` is true. What a listener takes counts as training time. A run can
    be repeated to the bit only with listeners that draw no random numbers and leave weights as they are. An
    exception raised here ends the run.
    """

    def before_training(self, runner: TrainingRun) -> None:
        """All is set up, a resumed run where it stopped: ``runner.state``, ``model``, ``optimizer``,
        ``folder``."""

    def before_epoch(self, runner: TrainingRun) -> None:
        """The (rest of the inner) epoch that ``runner.state`` is in begins."""

    def before_update(self, runner: TrainingRun) -> None:
        """The weights are about to change."""

    def after_step(self, runner: TrainingRun, step: Step) -> None:
        """An optimizer step is done; ``runner.state.iteration`` counts its batches."""

    def after_record(self, runner: TrainingRun, record: dict[str, Any]) -> None:
        """A line of ``log.jsonl`` is written, of training (every ``run.log_freq`` iterations) or of an
        evaluation. The main process alone calls this."""

    def after_epoch(self, runner: TrainingRun) -> None:
        """An (inner) epoch is trained, and not yet validated."""

    def before_evaluation(self, runner: TrainingRun, evaluation: Evaluation) -> None:
        """A split is about to be evaluated, the model in eval mode."""

    def before_answers(self, runner: TrainingRun, evaluation: Evaluation, samples: Batch) -> Batch | None:
        """A batch of an evaluation is about to be answered. Returns the samples to answer, or None for the
        same."""

    def after_evaluation(self, runner: TrainingRun, evaluation: Evaluation) -> None:
        """A split is evaluated; its metrics are known."""

    def after_validation(self, runner: TrainingRun, is_best: bool) -> None:
        """The epoch is validated, and ``runner.state.epoch`` counts it."""

    def before_stop(self, runner: TrainingRun) -> None:
        """The run stops since somebody asked for it, between two steps."""

    def after_training(self, runner: TrainingRun) -> None:
        """All epochs are trained and validated; the test is to come."""

    def end(self, runner: TrainingRun, is_complete: bool) -> None:
        """`Runner.train` ends, tests included; or it was interrupted or failed."""


@contextlib.contextmanager
def ending_noted(runner: TrainingRun) -> Iterator[None]:
    """Calls `Listener.end` of all listeners however the block ends."""

    def end(listener: Listener, kind: type | None, *error: object) -> None:
        listener.end(runner, kind is None)

    with contextlib.ExitStack() as stack:
        for listener in reversed(runner.listeners):
            stack.push(partial(end, listener))
        yield


def make_listeners(sections: Sequence[str | dict[str, Any]]) -> list[Listener]:
    """The listeners of ``run.listeners``.

    Raises:
        RegistryError: a name that is not registered.
        ConfigError: settings that a listener does not have.
    """
    listeners = []
    for number, section in enumerate(sections):
        settings = {"name": section} if isinstance(section, str) else dict(section)
        cls = registry.get_listener_class(settings.pop("name", None))
        listeners.append(cls(**check_section(settings, cls, f"run.listeners[{number}]")))
    return listeners
