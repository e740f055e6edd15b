"""What a model writes about the same samples over training, and about those it does best and worst on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evlgen.datasets.base_dataset import image_to_show
from evlgen.files.io import atomic_file
from evlgen.loaders.data import evenly_spread
from evlgen.runners.listener import Evaluation, Listener, TrainingRun

SAMPLES_FILE = "samples.jsonl"
IMAGES = "samples"  # the folder of their images
NUM_SHOWN = 12
NUM_EXTREME = 4  # of the best, and of the worst
_LARGEST = 224  # pixels of an image


class SampleCaptions(Listener):
    """Adds a line to ``samples.jsonl`` at each evaluation: ``samples``, spread evenly over the split, and the
    ``best`` and ``worst`` by the task's ``sample_scores``; each with ``id``, ``text``, ``reference``,
    ``score`` and ``image``, a file that the run's folder keeps once."""

    def after_evaluation(self, runner: TrainingRun, evaluation: Evaluation) -> None:
        if not runner.accelerator.is_main_process:
            return
        rows = shown_rows(evaluation.results)
        metric, scores = getattr(runner.task, "sample_scores", ("", {}))
        ranked = sorted((row for row in rows if id_of(row) in scores), key=lambda row: -scores[id_of(row)])
        count = min(NUM_EXTREME, len(ranked) // 2)
        picked = {
            "samples": [rows[index] for index in evenly_spread(len(rows), NUM_SHOWN)],
            "best": ranked[:count],
            "worst": ranked[len(ranked) - count :][::-1],
        }
        references = runner.task.references_of(evaluation.dataset)
        entries = {
            name: [self._entry(row, runner, evaluation, scores, references) for row in part]
            for name, part in picked.items()
        }
        evaluation.samples = entries["samples"]
        state = evaluation.state
        record = {
            "type": "evaluation",
            "split": evaluation.key,
            "label": evaluation.label,
            "iteration": None if state is None else state.iteration,
            "metric": metric,
            **entries,
        }
        if rows:
            with open(runner.folder / SAMPLES_FILE, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(json.dumps(record, default=str) + "\n")

    def _entry(
        self,
        row: Mapping[str, Any],
        runner: TrainingRun,
        evaluation: Evaluation,
        scores: Mapping[Any, float],
        references: Mapping[Any, Sequence[str]],
    ) -> dict[str, Any]:
        name = f"{evaluation.key.replace('/', '_')}_{row.get('instance_id', '')}.png"
        image = save_image(row, evaluation.dataset, runner.folder / IMAGES / name)
        score = scores.get(id_of(row))
        return {
            "id": id_of(row),
            "text": text_of(row),
            "reference": reference_of(row, references),
            **({} if "question" not in row else {"question": row["question"]}),
            **({} if score is None else {"score": float(score)}),
            **({} if image is None else {"image": f"{IMAGES}/{name}"}),
        }


def shown_rows(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The results that have a text, in the order of the dataset."""
    rows = [row for row in results if text_of(row) is not None]
    return sorted(rows, key=lambda row: (len(str(row.get("instance_id"))), str(row.get("instance_id"))))


def text_of(row: Mapping[str, Any]) -> str | None:
    """What a model wrote, in a task's result; None where that is no text."""
    return next((row[key] for key in ("caption", "answer", "text") if isinstance(row.get(key), str)), None)


def id_of(row: Mapping[str, Any]) -> Any:
    """What a result's sample is known by."""
    return row.get("image_id", row.get("question_id", row.get("instance_id")))


def reference_of(row: Mapping[str, Any], references: Mapping[Any, Sequence[str]]) -> str:
    """A text of people about a result's sample, of those by its id; empty where there is none."""
    return next(iter(references.get(id_of(row)) or [""]))


def save_image(row: Mapping[str, Any], dataset: Any, path: Path) -> Path | None:
    """Writes the image of a result's sample (of a video, a frame) as a small PNG file, unless it is there.
    None where the dataset has none to show."""
    number = str(row.get("instance_id", ""))
    if not number.isdigit() or not hasattr(dataset, "image"):
        return None
    if path.exists():
        return path
    image = image_to_show(dataset, int(number))
    if image is None:
        return None
    image = image.convert("RGB")
    image.thumbnail((_LARGEST, _LARGEST))
    with atomic_file(path, "wb") as file:
        image.save(file, format="PNG")
    return path
