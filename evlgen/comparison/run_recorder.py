"""What a compared run notes besides its log: how large the model is, what it took, and captions to show."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evlgen.comparison.stages import DONE_FILE, FACTS_FILE, SHOWN_FILE
from evlgen.files.io import write_atomically
from evlgen.loaders.data import evenly_spread
from evlgen.models.protocols import HasConnector, offers
from evlgen.runners.facts import device_name, model_size, peak_memory
from evlgen.runners.listener import Evaluation, Listener, TrainingRun
from evlgen.runners.sample_captions import (
    NUM_SHOWN,
    id_of,
    reference_of,
    save_image,
    shown_rows,
    text_of,
)

IMAGES = "pictures"


class RunRecorder(Listener):
    """Notes into ``folder``:

    - ``facts.json``: ``trainable_parameters``, ``total_parameters``, ``soft_prompts`` of an image,
      ``peak_rss_bytes``, ``peak_gpu_bytes``, ``device``, and what the order of the ``data`` depends on;
    - ``shown.json`` and ``pictures/``: texts of the latest evaluation, spread evenly over it;
    - ``done.json``, when it has trained to the end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def before_training(self, runner: TrainingRun) -> None:
        self._note(**model_size(runner.model), device=device_name(runner.accelerator.device))
        self._note(data={**runner.state.data, "ratios": runner.run.train_dataset_ratios})
        if offers(runner.model, HasConnector):
            _call_once(runner.model.connector, lambda out: self._note(soft_prompts=int(out.shape[1])))

    def after_evaluation(self, runner: TrainingRun, evaluation: Evaluation) -> None:
        if runner.accelerator.is_main_process:
            references = runner.task.references_of(evaluation.dataset)
            write_shown(evaluation.results, evaluation.dataset, references, self.folder)

    def end(self, runner: TrainingRun, is_complete: bool) -> None:
        self._note(**peak_memory(_read(self.folder / FACTS_FILE)))
        if is_complete:
            effort = dataclasses.asdict(runner.state.effort)
            done = {"iterations": runner.state.iteration, **effort}
            write_atomically(self.folder / DONE_FILE, json.dumps(done))

    def _note(self, **facts: Any) -> None:
        path = self.folder / FACTS_FILE
        write_atomically(path, json.dumps({**_read(path), **facts}, indent=1))


def _call_once(module: nn.Module, note: Any) -> None:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        handle.remove()
        if isinstance(output, torch.Tensor) and output.ndim == 3:
            note(output)

    handle = module.register_forward_hook(hook)


def write_shown(
    results: Sequence[Mapping[str, Any]],
    dataset: Any,
    references: Mapping[Any, Sequence[str]],
    folder: Path,
) -> None:
    """Writes ``shown.json``: ``id``, ``text``, ``reference`` and ``picture`` (a file) of some results."""
    rows = shown_rows(results)
    shown = []
    for number, index in enumerate(evenly_spread(len(rows), NUM_SHOWN)):
        row, name = rows[index], f"{IMAGES}/{number}.png"
        entry = {"id": id_of(row), "text": text_of(row), "reference": reference_of(row, references)}
        (folder / name).unlink(missing_ok=True)  # another evaluation may show another image here
        if save_image(row, dataset, folder / name) is not None:
            entry["picture"] = name
        shown.append(entry)
    write_atomically(folder / SHOWN_FILE, json.dumps(shown, indent=1, ensure_ascii=False, default=str))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
