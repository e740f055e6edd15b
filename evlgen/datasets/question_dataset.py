"""Questions about images and videos, to learn their answers and to be asked them.

Training sees one sample per question, with one of its answers or with all; scoring one per question, without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from evlgen.datasets.base_dataset import BadRecord, MediaDataset
from evlgen.datasets.media import Media
from evlgen.datasets.records import good
from evlgen.processors.base_processor import BaseProcessor

Id = int | str


class QuestionMediaDataset(MediaDataset):
    """What both uses of questions share: see `QuestionDataset` and `QuestionEvalDataset`.

    Args:
        records: of `read_questions`.
        media: where images or videos are read.
        vis_processor: what ``media`` opens -> tensor.
        text_processor: question -> the question as the model is asked it.
    """

    text_processor: BaseProcessor

    def answers(self) -> dict[Id, list[str]]:
        given = self._by_question("answers").items()  # a test's hidden answers may be empty texts
        return {key: answers for key, answers in given if any(map(str.strip, answers))}

    def questions(self) -> dict[Id, str]:
        """The questions as they are written, by id."""
        return self._by_question("question")

    def questions_with_answers(self) -> list[tuple[str, list[str]]]:
        """The questions that have answers, with these."""
        records = good(self.records)
        return [(record["question"], record["answers"]) for record in records if record.get("answers")]

    def answer_types(self) -> dict[Id, str]:
        return self._by_question("answer_type")

    def question_types(self) -> dict[Id, str]:
        return self._by_question("question_type")

    def _by_question(self, key: str) -> dict[Id, Any]:
        """What records have under a key, by question id."""
        return {record["question_id"]: record[key] for record in good(self.records) if key in record}


class QuestionDataset(QuestionMediaDataset):
    """One sample per question: ``image`` float32 [3, H, W] or [3, T, H, W], ``text_input`` (the question),
    ``question_id``, ``instance_id``, and as ``train_answers`` has it

    - ``sample``: ``text_output``, one of its answers, drawn by torch's global generator as often as people
      gave it;
    - ``all``: ``answers``, each once, and ``weights``, the share of people who gave it, as LAVIS has them
      (lavis/datasets/datasets/coco_vqa_datasets.py).

    Answers are learned as they are written but for white space: OPT reads a line break as an answer's end.

    Args:
        records, media, vis_processor, text_processor: see `QuestionMediaDataset`.
        train_answers: see above.
        answer_weight: what the weights of a question's answers sum to.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any] | BadRecord],
        media: Media,
        vis_processor: BaseProcessor,
        text_processor: BaseProcessor,
        train_answers: Literal["sample", "all"] = "sample",
        answer_weight: float = 1.0,
    ) -> None:
        super().__init__(records, media, vis_processor, text_processor)
        self.train_answers = train_answers
        self.answer_weight = answer_weight

    def load_text(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        answers = [" ".join(answer.split()) for answer in record["answers"]]
        return {
            "text_input": self.text_processor(record["question"]),
            **self._to_learn([answer for answer in answers if answer]),
            "question_id": record["question_id"],
            "instance_id": str(index),
        }

    def _to_learn(self, answers: list[str]) -> dict[str, Any]:
        if self.train_answers == "sample":
            return {"text_output": answers[int(torch.randint(len(answers), ()))]}
        counts = Counter(answers)
        weights = [self.answer_weight * count / len(answers) for count in counts.values()]
        return {"answers": list(counts), "weights": weights}


class QuestionEvalDataset(QuestionMediaDataset):
    """One sample per question: ``image``, ``text_input`` (the question), ``question_id``, ``image_id`` (the
    file's name where the annotation has none), ``instance_id``, and ``choices`` where the annotation has
    them.

    Args:
        records, media, vis_processor, text_processor: see `QuestionMediaDataset`.
        answer_list: gives the answers that ranking chooses from; called when they are asked for.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any] | BadRecord],
        media: Media,
        vis_processor: BaseProcessor,
        text_processor: BaseProcessor,
        answer_list: Callable[[], list[str]] = list,
    ) -> None:
        super().__init__(records, media, vis_processor, text_processor)
        self._answer_list = answer_list
        self._has_choices = any("choices" in record for record in good(self.records))

    def load_text(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        sample = {
            "text_input": self.text_processor(record["question"]),
            "question_id": record["question_id"],
            "image_id": record.get("image_id", record["visual"]),
            "instance_id": str(index),
        }
        # the same keys in every sample of a dataset: a batch has those of its first
        return sample | ({"choices": record.get("choices", [])} if self._has_choices else {})

    def correct_choices(self) -> dict[Id, str]:
        return self._by_question("correct_choice")

    def answer_list(self) -> list[str]:
        """Raises `DataError` where the list is named and cannot be read."""
        return self._answer_list()
