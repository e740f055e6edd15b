"""The tasks for questions: VQAv2 and OK-VQA, GQA, A-OKVQA, and questions about videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evlgen.batch import Batch
from evlgen.common.registry import registry
from evlgen.datasets.base_dataset import BaseDataset
from evlgen.models.base_model import BaseModel
from evlgen.models.protocols import RanksAnswers, offering
from evlgen.tasks.metrics.vqa_accuracy import normalized, vqa_accuracy
from evlgen.tasks.question_answering import QuestionAnsweringTask, accuracies, percent


@registry.register_task("vqa")
class VQATask(QuestionAnsweringTask):
    """Several people's answers to each question, scored as the VQA challenge does; see `vqa_accuracy`.

    Metrics: ``accuracy``, ``accuracy_yes_no``, ``accuracy_number``, ``accuracy_other``.
    """

    def score(
        self, results: Sequence[Mapping[str, Any]], dataset: BaseDataset
    ) -> tuple[dict[str, float], dict[str, Any]]:
        truths = self.answers_of(dataset)
        given = {r["question_id"]: r["answer"] for r in results if r["question_id"] in truths}
        values = {i: vqa_accuracy(answer, truths[i]) for i, answer in given.items()}
        self.sample_scores = ("accuracy", values)
        return accuracies(values, dataset)


class ExactMatchTask(QuestionAnsweringTask):
    """One right answer to each question, which is met or not. Metric: ``accuracy``."""

    def score(
        self, results: Sequence[Mapping[str, Any]], dataset: BaseDataset
    ) -> tuple[dict[str, float], dict[str, Any]]:
        truths = self.answers_of(dataset)
        given = {r["question_id"]: r["answer"] for r in results if r["question_id"] in truths}
        values = {i: float(self.is_met(a, truths[i])) for i, a in given.items()}
        self.sample_scores = ("accuracy", values)
        return accuracies(values, dataset)

    def is_met(self, answer: str, truths: Sequence[str]) -> bool:
        """Whether an answer is a right one."""
        raise NotImplementedError(f"{type(self).__name__} must define is_met(answer, truths)")


@registry.register_task("gqa")
class GQATask(ExactMatchTask):
    """Exact match of the answer as VQA normalises it with the right one as it is written, as LAVIS scores
    GQA. The normalised answers are uploaded, in the format of the GQA challenge."""

    def upload(self, results: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        return [{"questionId": str(r["question_id"]), "prediction": normalized(r["answer"])} for r in results]

    def is_met(self, answer: str, truths: Sequence[str]) -> bool:
        return normalized(answer) in truths


@registry.register_task("video_qa")
@registry.register_task("exact_match_qa")
class VideoQATask(ExactMatchTask):
    """Exact match of whole answers, whatever their case, blanks and last full stop: about videos (MSRVTT-QA
    and MSVD-QA; Xu et al., ACM MM 2017) and images (DAQUAR; Malinowski and Fritz, NIPS 2014). Number words
    stay words: so they are in these sets."""

    def is_met(self, answer: str, truths: Sequence[str]) -> bool:
        return _plain(answer) in map(_plain, truths)


@registry.register_task("aok_vqa")
class AOKVQATask(QuestionAnsweringTask):
    """A-OKVQA in both of its settings (Schwenk et al., ECCV 2022; github.com/allenai/aokvqa,
    ``evaluation/eval_predictions.py``).

    ``accuracy_multiple_choice``: the likeliest of a question's choices is the right one.
    ``accuracy_direct_answer``: min(1, n / 3) where n people wrote exactly this; by it, as in LAVIS, the best
    checkpoint is chosen. ``answers.json`` is what the leaderboard takes.
    """

    def valid_step(self, model: BaseModel, samples: Batch) -> list[dict[str, Any]]:
        """As of other tasks, and ``choice`` where the question has choices."""
        samples = model.encoded(samples)
        results = super().valid_step(model, samples)
        lists = samples.get("choices", [])
        if not any(lists):
            return results
        candidates = [choices or [""] for choices in lists]
        chosen = offering(model, RanksAnswers).rank_answers(samples, candidates, prompt=self.prompt)
        rows = zip(results, lists, chosen, strict=True)
        return [{**row, "choice": choice} if choices else row for row, choices, choice in rows]

    def upload(self, results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
        return {
            str(r["question_id"]): {
                "direct_answer": r["answer"],
                **({"multiple_choice": r["choice"]} if "choice" in r else {}),
            }
            for r in results
        }

    def score(
        self, results: Sequence[Mapping[str, Any]], dataset: BaseDataset
    ) -> tuple[dict[str, float], dict[str, Any]]:
        truths, right = self.answers_of(dataset), dataset.correct_choices()
        answers = {r["question_id"]: r["answer"] for r in results if r["question_id"] in truths}
        choices = {
            r["question_id"]: r["choice"] for r in results if r["question_id"] in right and "choice" in r
        }
        metrics, details = {}, {}
        if choices:
            metrics["accuracy_multiple_choice"] = percent(choice == right[i] for i, choice in choices.items())
            details["multiple_choice_questions"] = len(choices)
        if answers:
            agreed = (min(1.0, truths[i].count(answer) / 3) for i, answer in answers.items())
            metrics["accuracy_direct_answer"] = percent(agreed)
            details["direct_answer_questions"] = len(answers)
        if metrics:
            metrics["agg_metrics"] = list(metrics.values())[-1]
        return metrics, details


def _plain(answer: str) -> str:
    return " ".join(answer.lower().split()).removesuffix(".")
