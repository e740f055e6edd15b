"""Conversations: learn what the assistant says, write its last turn, compare it with what was said."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from evlgen.batch import Batch
from evlgen.common.errors import DataError
from evlgen.common.registry import registry
from evlgen.datasets.base_dataset import BaseDataset, image_to_show
from evlgen.files.io import write_atomically
from evlgen.models.base_model import BaseModel
from evlgen.models.protocols import HoldsConversations, offering
from evlgen.tasks.base_task import BaseTask, select
from evlgen.tasks.caption_sheet import caption_sheet
from evlgen.tasks.metrics import score_captions
from evlgen.tasks.metrics.vqa_accuracy import likened
from evlgen.tasks.question_answering import percent

logger = logging.getLogger(__name__)

SHOWN = 12  # answers in the sheet of images, half of which are written to the log


@registry.register_task("conversation")
class ConversationTask(BaseTask):
    """Trains on conversations (`evlgen.datasets.conversation_dataset`): what the assistant says is learned.

    In an evaluation the model writes the last turn of each conversation. ``accuracy`` is the percentage that
    equals one of its right answers after VQA's normalisation (by `likened`: the letter *A* stays a letter),
    ``CIDEr`` compares with all of them; where records have a ``source``, both are reported of each source.
    ``agg_metrics`` is their sum, CIDEr times 100. Result files: ``answers.json``, ``metrics.json``,
    ``answers.png``.
    """

    ASKS = True
    MAX_LEN = 128

    def to_learn(self, samples: Batch) -> Batch:
        """The samples as they are. Raises `DataError` where they are no conversations."""
        if "messages" not in samples and "segments" not in samples:
            raise DataError(
                "task conversation learns conversations, and these samples have none ('messages'). Train on "
                "a dataset of conversations, or set run.task: captioning."
            )
        return samples

    def held_out(self, samples: Batch, dataset: BaseDataset) -> Batch | None:
        """The conversations about one image, with their last answers."""
        if "messages" not in samples:
            return None
        known = self.references_of(dataset)
        rows = [
            row
            for row, (images, index) in enumerate(zip(samples["images"], samples["instance_id"], strict=True))
            if len(images) == 1 and int(index) in known
        ]
        if not rows:
            return None
        read: Batch = {
            "messages": samples["messages"],
            "images": samples["images"],
            "instance_id": samples["instance_id"],
        }
        found = select(read, rows)
        answers = [known[int(index)][0] for index in found["instance_id"]]
        pairs = zip(found["messages"], answers, strict=True)
        messages = [[*turns, {"role": "assistant", "content": answer}] for turns, answer in pairs]
        image_ids = [dataset.records[int(index)]["visual"] for index in found["instance_id"]]
        return {**found, "messages": messages, "image_id": image_ids}

    def not_answerable(self, model: BaseModel, samples: Batch) -> Mapping[int, str]:
        return model.not_answerable(samples, self.max_len) if "messages" in samples else {}

    def valid_step(self, model: BaseModel, samples: Batch) -> list[dict[str, Any]]:
        """``{"instance_id", "question", "answer"}`` for each sample of a batch."""
        self.check_keys(samples, ("messages", "instance_id"))
        answers = offering(model, HoldsConversations).answer_turns(
            samples, max_length=self.max_len, **self.generation_options(min_length="min_len")
        )
        return [
            {"instance_id": number, "question": _last_text(messages), "answer": answer}
            for number, messages, answer in zip(
                samples["instance_id"], samples["messages"], answers, strict=True
            )
        ]

    def after_evaluation(
        self, results: list[dict[str, Any]], dataset: BaseDataset, split: str, folder: Path
    ) -> dict[str, float]:
        """Writes and scores."""
        results = sorted(results, key=lambda r: int(r["instance_id"]))
        write_atomically(folder / "answers.json", json.dumps(results, ensure_ascii=False, indent=0))
        references = self.references_of(dataset)
        self._show(results, references, dataset, folder)
        answers: dict[int | str, str] = {int(r["instance_id"]): r["answer"] for r in results}
        answers = {index: answer for index, answer in answers.items() if index in references}
        if not self.run.report_metric or not answers:
            return {}
        metrics = _scores(answers, references)
        sources = dataset.domains()
        for source in sorted(set(sources.values())):
            own = {index: answer for index, answer in answers.items() if sources.get(index) == source}
            if own and len(own) < len(answers):
                metrics |= {f"{name}_{source}": value for name, value in _scores(own, references).items()}
        metrics["agg_metrics"] = metrics["accuracy"] + 100 * metrics["CIDEr"]
        write_atomically(folder / "metrics.json", json.dumps(metrics, indent=1))
        return metrics

    def _show(
        self,
        results: Sequence[Mapping[str, Any]],
        references: Mapping[Any, list[str]],
        dataset: BaseDataset,
        folder: Path,
    ) -> None:
        shown = results[:: max(1, len(results) // SHOWN)][:SHOWN]
        images: list[Image.Image] = []
        lines: list[tuple[str, str]] = []
        for row in shown:
            index = int(row["instance_id"])
            right = references.get(index, [""])[0]
            if len(lines) < SHOWN // 2:
                logger.info("  %s %s   (right: %s)", row["question"], row["answer"], right)
            image = image_to_show(dataset, index)
            if image is not None:
                images.append(image)
                lines.append((f"{row['question']} {row['answer']}", right))
        if images:
            caption_sheet(images, lines, folder / "answers.png")


def _scores(answers: Mapping[int | str, str], references: Mapping[Any, list[str]]) -> dict[str, float]:
    met = [likened(answer) in map(likened, references[index]) for index, answer in answers.items()]
    own = {index: references[index] for index in answers}
    return {"accuracy": percent(met), "CIDEr": score_captions(own, answers, ["cider"]).values["CIDEr"]}


def _last_text(messages: Sequence[Mapping[str, Any]]) -> str:
    content = messages[-1]["content"]
    parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return " ".join(" ".join(parts).split())
