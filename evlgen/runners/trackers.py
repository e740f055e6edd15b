"""Numbers and captions of a run for TensorBoard, W&B, MLflow or Comet, through accelerate's trackers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import random
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from evlgen.common.errors import ConfigError, TrainingError
from evlgen.common.safe_text import message, printable
from evlgen.files.io import write_atomically
from evlgen.files.json_io import read_json
from evlgen.runners.listener import Evaluation, Listener, TrainingRun
from evlgen.runners.training_state import kept_random_state

logger = logging.getLogger(__name__)

RUNS_FILE = "trackers.json"  # tracker -> the run's id there
PROJECT = "evlgen"
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "comet_ml": "comet_ml"}
_OFFLINE = {
    "wandb": "WANDB_MODE=offline in the environment keeps it on this machine; `wandb sync` uploads it.",
    "mlflow": "MLFLOW_TRACKING_URI in the environment says where it goes, such as file:///home/me/mlruns.",
    "comet_ml": "COMET_START_ONLINE=0 in the environment keeps it on this machine.",
}


def check_trackers(names: Iterable[str]) -> None:
    """Raises `ConfigError` for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise ConfigError(
                f"run.trackers: {name} needs the package {_PACKAGES[name]}, which is not installed: "
                f"pip install {_PACKAGES[name]}."
            )


class Trackers(Listener):
    """Sends what ``log.jsonl`` has, and the images of `SampleCaptions` with what is written about them.

    A run that is resumed goes on with the same run there: ``trackers.json`` in its folder keeps the ids. A
    tracker that fails later is left out from then on; training goes on.

    Args:
        names: of ``run.trackers``.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(dict.fromkeys(names))
        self._open: dict[str, GeneralTracker] | None = None
        self._step = 0  # of the last record: a test is of no iteration

    def before_training(self, runner: TrainingRun) -> None:
        self._start(runner, runner.state.iteration)

    def after_record(self, runner: TrainingRun, record: Mapping[str, Any]) -> None:
        self._start(runner)
        self._step = record["iteration"] or self._step
        prefix = record["type"] if record["type"] == "train" else record["split"]
        values = {f"{prefix}/{name}": v for name, v in record.items() if isinstance(v, float)}
        self._each(lambda name, tracker: tracker.log(values, step=self._step))

    def after_evaluation(self, runner: TrainingRun, evaluation: Evaluation) -> None:
        if not runner.accelerator.is_main_process or not evaluation.samples:
            return
        self._start(runner)
        step = self._step if evaluation.state is None else evaluation.state.iteration
        shown = (evaluation.key, evaluation.samples, runner.folder, step)
        self._each(lambda name, tracker: _SHOW[name](tracker, *shown))

    def end(self, runner: TrainingRun, is_complete: bool) -> None:
        self._each(lambda name, tracker: tracker.finish())
        self._open, runner.accelerator.trackers = None, []

    def _start(self, runner: TrainingRun, iteration: int = 0) -> None:
        if not self.names or self._open is not None or not runner.accelerator.is_main_process:
            return
        self._open, path = {}, runner.folder / RUNS_FILE
        known = read_json(path, TrainingError, "list of trackers") if path.exists() else {}
        with _fresh_random_state():
            for name in self.names:
                try:
                    tracker = _begin(name, runner, known.get(name), iteration)
                except Exception as error:
                    remedy = _OFFLINE.get(name, "")
                    raise TrainingError(
                        f"run.trackers: {name} does not start ({type(error).__name__}: {message(error)}). "
                        f"{remedy}"
                    ) from error
                self._open[name] = tracker
                known[name] = _RUN_ID[name](tracker)
        write_atomically(path, json.dumps(known, indent=1))
        runner.accelerator.trackers = list(self._open.values())  # `Accelerator.end_training` ends them

    def _each(self, action: Callable[[str, GeneralTracker], Any]) -> None:
        at_work = self._open or {}
        for name, tracker in list(at_work.items()):
            try:
                with _fresh_random_state():
                    action(name, tracker)
            except Exception as error:  # whatever it is: the run's own log has the numbers
                del at_work[name]
                logger.warning("%s failed and gets nothing from here on: %s", name, message(error))


@contextlib.contextmanager
def _fresh_random_state() -> Iterator[None]:
    """Within the block Python's random numbers are not those of the run's seed, and after it they are again.

    Names that a tracker draws (Comet's of its archives) would be the same in every run of a seed.
    """
    with kept_random_state():
        random.seed()
        yield


def _begin(name: str, runner: TrainingRun, run_id: str | None, iteration: int) -> GeneralTracker:
    """A tracker at work: on its run of before where that is known."""
    folder, cls = runner.folder, LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        tracker = cls("tensorboard", folder, purge_step=iteration + 1)
    elif name == "wandb":
        run_id, project = run_id or uuid.uuid4().hex[:12], os.environ.get("WANDB_PROJECT", PROJECT)
        tracker = cls(project, id=run_id, resume="allow", name=folder.name, dir=str(folder))
    elif name == "mlflow":
        tracker = cls(PROJECT, run_id=run_id, run_name=folder.name)
    else:
        import comet_ml

        # With a key, what was kept offline before and after a resumption is one experiment once uploaded.
        tracker = cls(
            os.environ.get("COMET_PROJECT_NAME", PROJECT),
            experiment_key=run_id or uuid.uuid4().hex,
            experiment_config=comet_ml.ExperimentConfig(
                name=folder.name,
                offline_directory=os.environ.get("COMET_OFFLINE_DIRECTORY", str(folder / "comet")),
            ),
        )
    if hasattr(tracker, "start"):  # accelerate of before 1.8 starts it at once
        tracker.start()
    if run_id is None or name == "wandb":  # MLflow's parameters stay as they were first
        if name != "tensorboard":  # which makes a run of its own of them
            tracker.store_init_configuration(_flat(runner.config))
    return tracker


_RUN_ID: dict[str, Callable[[Any], str]] = {
    "tensorboard": lambda tracker: "",
    "wandb": lambda tracker: tracker.run.id,
    "mlflow": lambda tracker: tracker.active_run.info.run_id,
    "comet_ml": lambda tracker: tracker.writer.get_key(),
}


def _flat(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The configuration as key path -> scalar or text."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            out |= _flat(value, name)
        else:
            out[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return out


# ---- images with their captions ----


def _caption(row: Mapping[str, Any]) -> str:
    question = f"{row['question']} " if "question" in row else ""
    return printable(f"{question}{row['text']}")


def _show_in_tensorboard(tracker: Any, key: str, rows: list[dict[str, Any]], folder: Path, step: int) -> None:
    import numpy as np
    from PIL import Image

    for number, row in enumerate(rows):
        tag = f"{key}/{number:02d}"
        if "image" in row:
            with Image.open(folder / row["image"]) as image:
                tracker.writer.add_image(tag, np.asarray(image), step, dataformats="HWC")
        tracker.writer.add_text(tag, f"    {_caption(row)}", step)  # Markdown shows what is indented as it is
    tracker.writer.flush()


def _show_in_wandb(tracker: Any, key: str, rows: list[dict[str, Any]], folder: Path, step: int) -> None:
    import wandb

    images = [
        wandb.Image(str(folder / row["image"]), caption=_caption(row)) for row in rows if "image" in row
    ]
    if images:
        tracker.run.log({f"{key}/captions": images}, step=step)


def _show_in_mlflow(tracker: Any, key: str, rows: list[dict[str, Any]], folder: Path, step: int) -> None:
    import mlflow

    place = f"captions/{key.replace('/', '_')}"
    mlflow.log_dict({"captions": rows}, f"{place}/step_{step:08d}.json")
    for row in rows:
        if "image" in row:
            mlflow.log_artifact(str(folder / row["image"]), place)


def _show_in_comet(tracker: Any, key: str, rows: list[dict[str, Any]], folder: Path, step: int) -> None:
    for row in rows:
        if "image" in row:
            tracker.writer.log_image(str(folder / row["image"]), name=f"{key}: {_caption(row)}", step=step)


_SHOW: dict[str, Callable[..., None]] = {
    "tensorboard": _show_in_tensorboard,
    "wandb": _show_in_wandb,
    "mlflow": _show_in_mlflow,
    "comet_ml": _show_in_comet,
}
