"""What tasks for questions share: learn the answers, give one to each question, compare it with people's."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evlgen.batch import Batch
from evlgen.common.errors import ConfigError, DataError
from evlgen.config.run_config import ANSWER_LEN, RunConfig
from evlgen.datasets.base_dataset import BaseDataset, image_to_show
from evlgen.files.io import write_atomically
from evlgen.models.base_model import BaseModel
from evlgen.models.prompts import ask, check_slots
from evlgen.models.protocols import AnswersQuestions, RanksAnswers, offering
from evlgen.tasks.base_task import BaseTask, select
from evlgen.tasks.caption_sheet import caption_sheet
from evlgen.tasks.lemmatizer import load_lemmatizer

logger = logging.getLogger(__name__)

_NOT_IN_NAMES = re.compile(r"[\W_]+")  # of metrics; letters of any script are

SHOWN = 12  # answers in the sheet of images, half of which are written to the log


class QuestionAnsweringTask(BaseTask):
    """Base of the tasks for questions about images or videos. A subclass defines `score`, and `upload` where
    a leaderboard wants another format.

    Questions are put as ``run.prompt`` says, in training as in evaluation. ``run.inference_method: generate``
    writes the answers, ``rank`` takes the likeliest of the dataset's ``answer_list()``.

    Result files: ``answers.json``, ready for upload; ``metrics.json``; and ``answers.png``, a sheet of
    images with questions and answers. All scores are in percent. Questions whose image could not be read
    are not scored.

    Raises:
        ConfigError: ``run.prompt`` has no slot for the question; ``run.apply_lemmatizer`` without spaCy;
            ``run.min_len`` is more than answers have.
    """

    ASKS = True
    MAX_LEN = ANSWER_LEN

    def __init__(self, run: RunConfig) -> None:
        super().__init__(run)
        if (run.min_len or 0) > self.max_len:
            raise ConfigError(
                f"run.min_len: is {run.min_len}, more than max_len, {self.max_len} for answers."
            )
        self.prompt = run.prompt or ""
        check_slots(self.prompt)
        self.lemmatizer = load_lemmatizer() if run.apply_lemmatizer else None
        self.candidates: list[str] = []
        self._answered: BaseDataset | None = None
        self._answers: Mapping[int | str, list[str]] = {}

    # ---- training

    def prompts(self, samples: Batch) -> list[str]:
        return ask(self.prompt, samples, len(samples["text_input"]))

    def to_learn(self, samples: Batch) -> Batch:
        """The samples as `VLM.forward` reads them, whose loss is that of answers after their questions.

        Of one answer for each question (``text_output``) it is the mean over the tokens of all. Of several
        that weigh differently (``answers``, ``weights``; ``train_answers: all``) it is, as in LAVIS's
        ``blip_vqa``, the sum over answers of weight times the negated log-likelihood of the whole answer,
        divided by the number of questions.

        Raises:
            DataError: they have no answers.
        """
        questions = self.prompts(samples)
        if "answers" not in samples:
            if "text_output" not in samples:
                raise DataError(
                    f"task {self.run.task} learns answers to questions, and these samples have none. Train "
                    "on a dataset of questions, such as coco_vqa, or set run.task: captioning."
                )
            return {**samples, "text_input": questions}
        counts = [len(answers) for answers in samples["answers"]]
        learned: Batch = {
            **samples,
            "text_input": [q for q, count in zip(questions, counts, strict=True) for _ in range(count)],
            "text_output": [answer for answers in samples["answers"] for answer in answers],
            "text_weights": [weight for weights in samples["weights"] for weight in weights],
            "num_texts": counts,
        }
        del learned["answers"], learned["weights"]
        return learned

    # ---- evaluation

    def check_split(self, model: BaseModel, dataset: BaseDataset, split: str) -> None:
        self.before_evaluation(dataset, split)

    def before_evaluation(self, dataset: BaseDataset, split: str) -> None:
        """Reads the list of answers that are ranked. Raises `ConfigError` where there is none."""
        if self.run.inference_method != "rank":
            return
        self.candidates = list(dict.fromkeys(dataset.answer_list()))
        if not self.candidates:
            raise ConfigError(
                f"run.inference_method: rank chooses from a list of answers, and split '{split}' has none. "
                "Give the dataset an answer_list, or set run.inference_method: generate."
            )

    def held_out(self, samples: Batch, dataset: BaseDataset) -> Batch | None:
        """The questions that people answered, with the commonest answer of each."""
        answers, truths = {}, self.answers_of(dataset)
        for i, question_id in enumerate(samples.get("question_id", [])):
            people = [" ".join(answer.split()) for answer in truths.get(question_id, [])]
            if people := [answer for answer in people if answer]:
                answers[i] = max(people, key=people.count)
        if not answers:
            return None
        asked = select(samples, list(answers))
        return {**asked, "text_input": self.prompts(asked), "text_output": list(answers.values())}

    def answers_of(self, dataset: BaseDataset) -> Mapping[int | str, list[str]]:
        """`BaseDataset.answers`, read once."""
        if self._answered is not dataset:
            self._answered, self._answers = dataset, dataset.answers()
        return self._answers

    def valid_step(self, model: BaseModel, samples: Batch) -> list[dict[str, Any]]:
        """``{"question_id", "answer", "question", "instance_id"}`` for each sample of a batch."""
        self.check_keys(samples, ("question_id", "instance_id", "text_input"))
        answers = self.answer(model, samples)
        ids = zip(samples["question_id"], samples["instance_id"], strict=True)
        return [
            {"question_id": i, "answer": answer, "question": question, "instance_id": n}
            for (i, n), question, answer in zip(ids, samples["text_input"], answers, strict=True)
        ]

    def answer(self, model: BaseModel, samples: Batch) -> list[str]:
        """An answer to each question. Raises `ConfigError` where the model answers none."""
        run = self.run
        if run.inference_method == "rank":
            return offering(model, RanksAnswers).rank_answers(
                samples, self.candidates, prompt=self.prompt, num_candidates=run.num_ans_candidates
            )
        answers = offering(model, AnswersQuestions).predict_answers(
            samples, max_len=self.max_len, prompt=self.prompt, **self.generation_options(min_len="min_len")
        )
        return answers if self.lemmatizer is None else self.lemmatizer(answers)

    def after_evaluation(
        self, results: list[dict[str, Any]], dataset: BaseDataset, split: str, folder: Path
    ) -> dict[str, float]:
        """Writes and scores. What is told by kinds of questions is in ``metrics.json`` alone."""
        # as the dataset has them, on any number of ranks
        results = sorted(results, key=lambda r: int(r["instance_id"]))
        _write(folder / "answers.json", self.upload(results), indent=0)
        self.warn_if_incomplete(results, dataset, folder / "answers.json")
        self._show(results, dataset, folder)
        self.sample_scores = ("", {})
        if not self.run.report_metric or not results:
            return {}
        metrics, details = self.score(results, dataset)
        if not metrics:
            logger.warning("%s has no answers of people: the model's are written, not scored", split)
            return {}
        _write(folder / "metrics.json", {**metrics, **details}, indent=1)
        return metrics

    def upload(self, results: Sequence[Mapping[str, Any]]) -> Any:
        """What ``answers.json`` holds, from the results in the order of the dataset: here the format of the
        VQA challenge."""
        return [{"question_id": r["question_id"], "answer": r["answer"]} for r in results]

    def score(
        self, results: Sequence[Mapping[str, Any]], dataset: BaseDataset
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """The metrics, ``agg_metrics`` among them, and what else ``metrics.json`` tells; no metrics where the
        dataset knows no answers."""
        raise NotImplementedError(f"{type(self).__name__} must define score(results, dataset)")

    def _show(self, results: Sequence[Mapping[str, Any]], dataset: BaseDataset, folder: Path) -> None:
        step = max(1, len(results) // SHOWN)
        shown = results[::step][:SHOWN]
        truths, choices = self.answers_of(dataset), dataset.correct_choices()
        lines = []
        for row in shown:
            people = truths.get(row["question_id"]) or [choices.get(row["question_id"], "")]
            commonest = max(people, key=people.count)
            lines.append((f"{row['question']} {row['answer']}", commonest))
        for written, truth in lines[: SHOWN // 2]:
            logger.info("  %s   (people: %s)", written, truth)
        images = [image_to_show(dataset, int(row["instance_id"])) for row in shown]
        caption_sheet(images, lines, folder / "answers.png")


def _write(path: Path, content: Any, indent: int) -> None:
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=indent))


def accuracies(
    values: Mapping[int | str, float], dataset: BaseDataset
) -> tuple[dict[str, float], dict[str, Any]]:
    """From each question's accuracy (0 to 1), by id, what `QuestionAnsweringTask.score` gives: ``accuracy``
    and ``agg_metrics``, the mean in percent; ``accuracy_<kind>`` of each kind of answer; and as details
    ``accuracy_by_question_type`` and how many ``questions`` were scored."""
    if not values:
        return {}, {}
    mean = percent(values.values())
    by_answer = means_by_kind(values, dataset.answer_types())
    metrics = {
        "accuracy": mean,
        **{f"accuracy_{_NOT_IN_NAMES.sub('_', kind.lower())}": v for kind, v in by_answer.items()},
        "agg_metrics": mean,
    }
    by_question = means_by_kind(values, dataset.question_types())
    details = {"accuracy_by_question_type": by_question} if by_question else {}
    return metrics, {**details, "questions": len(values)}


def means_by_kind(values: Mapping[int | str, float], kinds: Mapping[int | str, str]) -> dict[str, float]:
    """The mean in percent of the values of each kind, the kinds in alphabetical order."""
    groups: dict[str, list[float]] = {}
    for key, value in values.items():
        if kinds.get(key):  # the empty text is no kind
            groups.setdefault(kinds[key], []).append(value)
    return {kind: percent(groups[kind]) for kind in sorted(groups)}


def percent(values: Any) -> float:
    """The mean of some values from 0 to 1, times 100."""
    values = list(values)
    return 100 * sum(values) / len(values)
