"""What a compared run notes besides its log: how large the model is, what it took, and captions to show."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evlgen.comparison.stages import DONE_FILE, FACTS_FILE, SHOWN_FILE
from evlgen.files.io import atomic_file, write_atomically
from evlgen.loaders.data import evenly_spread
from evlgen.runners.runner import Runner
from evlgen.tasks.base_task import BaseTask

PICTURES = "pictures"
NUM_SHOWN = 12
_LARGEST = 224  # pixels of a picture in the report


def observed(runner_class: type[Runner], folder: Path) -> type[Runner]:
    """The runner, made to note into ``folder``:

    - ``facts.json``: ``trainable_parameters``, ``total_parameters``, ``soft_prompts`` of a picture,
      ``peak_rss_bytes``, ``peak_gpu_bytes``, ``device``, and what the order of the ``data`` depends on;
    - ``shown.json`` and ``pictures/``: texts of the latest evaluation, spread evenly over it;
    - ``done.json``, when it has trained to the end.
    """

    class Observed(runner_class):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._note(**model_size(self.model), device=device_name(self.accelerator.device))
            connector = getattr(self.model, "connector", None)
            if isinstance(connector, nn.Module):
                _call_once(connector, lambda out: self._note(soft_prompts=int(out.shape[1])))
            _watch_results(self.task, folder)

        def train(self) -> dict[str, dict[str, float]]:
            try:
                scores = super().train()
            finally:
                self._note(**peak_memory(_read(folder / FACTS_FILE)))
            effort = dataclasses.asdict(self.state.effort)
            write_atomically(folder / DONE_FILE, json.dumps({"iterations": self.state.iteration, **effort}))
            return scores

        def _set_up_training(self) -> None:
            super()._set_up_training()
            self._note(data={**self.state.data, "ratios": self.run.train_dataset_ratios})

        def _note(self, **facts: Any) -> None:
            path = folder / FACTS_FILE
            write_atomically(path, json.dumps({**_read(path), **facts}, indent=1))

    return Observed


def model_size(model: nn.Module) -> dict[str, int]:
    """How many weights are trained, and how many there are."""
    weights = list(model.parameters())
    return {
        "trainable_parameters": sum(p.numel() for p in weights if p.requires_grad),
        "total_parameters": sum(p.numel() for p in weights),
    }


def peak_memory(before: Mapping[str, Any]) -> dict[str, int | None]:
    """The most this process ever had resident and on the GPU, or what an earlier process of the same run had,
    where that is more."""
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    found = {"peak_rss_bytes": peak_resident(), "peak_gpu_bytes": gpu}
    return {key: max((v for v in (now, before.get(key)) if v), default=None) for key, now in found.items()}


def peak_resident() -> int:
    """Most bytes this process has had resident; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage gives those of the parent at its fork, where they are more
        line = next((x for x in status.read_text().splitlines() if x.startswith("VmHWM:")), None)
        if line is not None:
            return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def device_name(device: torch.device) -> str:
    """``cpu``, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _call_once(module: nn.Module, note: Any) -> None:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        handle.remove()
        if isinstance(output, torch.Tensor) and output.ndim == 3:
            note(output)

    handle = module.register_forward_hook(hook)


def _watch_results(task: BaseTask, folder: Path) -> None:
    """Keeps texts of each evaluation of a task, with their pictures."""
    original = task.after_evaluation

    def after_evaluation(results: list[dict[str, Any]], dataset: Any, split: str, target: Path) -> Any:
        metrics = original(results, dataset, split, target)
        write_shown(results, dataset, folder)
        return metrics

    task.after_evaluation = after_evaluation


def write_shown(results: Sequence[Mapping[str, Any]], dataset: Any, folder: Path) -> None:
    """Writes ``shown.json``: ``id``, ``text``, ``reference`` and ``picture`` (a file) of some results."""
    rows = [row for row in results if text_of(row) is not None]
    rows.sort(key=lambda row: (len(str(row.get("instance_id"))), str(row.get("instance_id"))))
    references = dataset.references() if hasattr(dataset, "references") else {}
    shown = []
    for number, index in enumerate(evenly_spread(len(rows), NUM_SHOWN)):
        row = rows[index]
        key = row.get("image_id", row.get("question_id", row.get("instance_id")))
        entry = {"id": key, "text": text_of(row), "reference": next(iter(references.get(key) or [""]))}
        picture = _picture(dataset, row)
        if picture is not None:
            picture.thumbnail((_LARGEST, _LARGEST))
            with atomic_file(folder / PICTURES / f"{number}.png", "wb") as file:
                picture.save(file, format="PNG")
            entry["picture"] = f"{PICTURES}/{number}.png"
        shown.append(entry)
    write_atomically(folder / SHOWN_FILE, json.dumps(shown, indent=1, ensure_ascii=False, default=str))


def text_of(row: Mapping[str, Any]) -> str | None:
    """What a model wrote, in a task's result; None where that is no text."""
    return next((row[key] for key in ("caption", "answer", "text") if isinstance(row.get(key), str)), None)


def _picture(dataset: Any, row: Mapping[str, Any]) -> Any:
    number = str(row.get("instance_id", ""))
    if not number.isdigit() or not hasattr(dataset, "picture"):
        return None
    picture = dataset.picture(int(number))
    return None if picture is None else picture.convert("RGB")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
