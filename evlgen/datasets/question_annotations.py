"""Reading questions and their answers, in the layouts they are published in.

A split may be in several files, in any order; what each holds is told by its content:

=============================================  ==============================================================
``[{"image" | "video", "question", ..}, ..]``  questions, as LAVIS lists them; ``answer`` is a text or a list
``{"questions": [..], "data_subtype"}``        questions of VQA (visualqa.org) and OK-VQA; images are COCO's
``{"annotations": [{"question_id", ..}]}``     their answers
``{id: {"imageId", "question", ..}}``          questions of GQA as Stanford publishes them
``["yes", ..]``, ``{"yes": 0, ..}``            the answers that ranking chooses from
=============================================  ==============================================================

A-OKVQA's records are read with LAVIS's ``image``, or as published, where the name of COCO's image follows
from ``image_id`` and ``split``. Those marked ``difficult_direct_answer`` have no answers where they are
scored: the publisher leaves them out of that score (allenai/aokvqa, evaluation/eval_predictions.py).
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evlgen.common.errors import DataError
from evlgen.datasets.annotations import (
    as_text,
    describe,
    is_id,
    known_as,
    number_of,
    open_annotation,
    read_annotation,
    text_problem,
)
from evlgen.datasets.base_dataset import BadRecord
from evlgen.datasets.compact_records import PackedRecords
from evlgen.datasets.records import sift

logger = logging.getLogger(__name__)

Id = int | str
Record = dict[str, Any]

_ANSWERS = ("answer", "direct_answers", "answers")  # where records have them; the second is A-OKVQA's


@dataclass(frozen=True)
class QuestionFiles:
    """What the files of one split hold.

    Attributes:
        records: ``visual`` (a file name), ``question``, ``question_id``, ``answers`` (a list, which may be
            empty), and where they are known ``image_id``, ``choices`` with ``correct_choice`` (its text),
            ``answer_type``, ``question_type``; a `BadRecord` in the place of each that makes no sample.
        answer_list: the answers that ranking chooses from.
    """

    records: Sequence[Record | BadRecord]
    answer_list: list[str]


def read_questions(
    paths: Sequence[str | os.PathLike], truth: str | os.PathLike | None = None, scored: bool = True
) -> QuestionFiles:
    """The questions of a split.

    Args:
        paths: its files.
        truth: one more file of answers, which count in place of the records' own.
        scored: whether the questions are to be answered and scored: ids must then differ and answers may be
            missing. Else they are to be learned: each needs an answer.

    Raises:
        DataError: a file has none of the layouts, or all of its records are bad; names file, record and what
            is wrong with it.
    """
    files: dict[str, list[tuple[str | os.PathLike, Any]]] = {}
    for path in paths:
        layout, content = _open(path)
        files.setdefault(layout, []).append((path, content))
    given: dict[Id, Record] = {}
    for path, content in files.get("answers", ()):
        given |= _given_answers(content, path)
    if truth is not None:
        given |= _read_truth(truth)
    return QuestionFiles(
        _read_files(files, _Rows(given, scored), ", ".join(map(str, paths))),
        [answer for path, content in files.get("answer list", ()) for answer in _answer_list(content)],
    )


def read_answer_list(path: str | os.PathLike) -> list[str]:
    """The answers that ranking chooses from: a JSON list of texts, or a mapping of texts to their numbers.

    Raises:
        DataError: another layout.
    """
    layout, content = _open(path)
    if layout != "answer list":
        raise DataError(f"answer list {path} must be a list of texts; it holds {layout}.")
    return _answer_list(content)


def _open(path: str | os.PathLike) -> tuple[str, Any]:
    """What a file holds, and its content. A list of questions comes as an iterator: it may be of millions."""
    content = open_annotation(path)
    if isinstance(content, Iterator):
        first = next(content, None)
        rows: Iterable[Any] = itertools.chain([] if first is None else [first], content)
        if not isinstance(first, str):
            return "questions", rows
        rows = list(rows)
        return "answer list" if all(isinstance(row, str) for row in rows) else "questions", rows
    if isinstance(content, Mapping) and content:
        if isinstance(content.get("questions"), list):
            return "official questions", content
        if isinstance(content.get("annotations"), list):
            return "answers", content
        if all(isinstance(value, Mapping) for value in content.values()):
            return "GQA's questions", content
        if all(isinstance(value, int) for value in content.values()):
            return "answer list", content
    raise DataError(
        f"annotation {path} must be a list of records with 'image' or 'video' and 'question', or one of the "
        f"layouts that VQA and GQA are published in; it is {describe(content)}."
    )


def _read_files(files: Mapping[str, Sequence[tuple[Any, Any]]], rows: _Rows, names: str) -> PackedRecords:
    """The questions of all files, one after the other. ``names``: of the files, for messages."""
    found = [sift(content, path, rows.parse) for path, content in files.get("questions", ())]
    for path, content in files.get("GQA's questions", ()):
        items: Iterable[Any] = ({"question_id": key, **row} for key, row in content.items())
        found.append(sift(items, path, rows.parse, "question"))
    for path, content in files.get("official questions", ()):
        # LAVIS names them beside its own list of the same questions, for the scorer
        items = new = [row for row in _official_rows(content) if not rows.know(row)]
        if new or not rows.seen:
            found.append(sift(items, path, rows.parse, "question"))
    if not found:
        raise DataError(f"{names}: no questions are in there, only answers.")
    return found[0] if len(found) == 1 else PackedRecords(itertools.chain.from_iterable(found))


def _official_rows(content: Mapping[str, Any]) -> Iterator[Any]:
    """The questions, with the names of COCO's images where they have none of their own."""
    subtype = content.get("data_subtype")
    for row in content["questions"]:
        number = number_of(row.get("image_id")) if isinstance(row, Mapping) else None
        named = "image" in row or "video" in row
        if subtype and isinstance(subtype, str) and number is not None and not named:
            row = {**row, "image": coco_2014_name(subtype, number)}
        yield row


@dataclass
class _Rows:
    """Rows of any layout in our words, as the files of one split have them.

    Args:
        given: answers that came in files of their own, by question id.
        scored: see `read_questions`.
        seen: the question ids so far.
    """

    given: Mapping[Id, Record]
    scored: bool
    seen: set[Id] = field(default_factory=set)
    number: int = 0

    def know(self, row: Any) -> bool:
        """Whether the question of a row has been read already."""
        key: Any = row.get("question_id") if isinstance(row, Mapping) else None
        return is_id(key) and known_as(key, self.seen) in self.seen

    def parse(self, row: Any, place: str) -> Iterator[Record]:
        """The record of a row, for `sift`. Raises `DataError` where it is none, or lacks what it is needed
        for."""
        number, self.number = self.number, self.number + 1
        record = _record(row, number)
        key, difficult = known_as(record["question_id"], self.given), record.pop("difficult", False)
        record["question_id"] = key
        record.update(self.given.get(key, {}))
        if not record["answers"] and self.given:
            raise DataError(f"question {key!r} has no answer among those given for others.", "no answer")
        if not self.scored and not any(map(str.strip, record["answers"])):
            raise DataError("it has no answer to learn.", "no answer")
        if self.scored and key in self.seen:
            raise DataError(f"the question_id {key!r} is there a second time.", "duplicate id")
        if self.scored and difficult:
            record["answers"] = []
        self.seen.add(key)
        yield record


def _read_truth(path: str | os.PathLike) -> dict[Id, Record]:
    content = read_annotation(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("annotations"), list):
        raise DataError(
            f"ground truth {path} must be {{'annotations': [{{'question_id', 'answers'}}, ..]}}; it is "
            f"{describe(content)}."
        )
    return _given_answers(content, path)


def _given_answers(content: Mapping[str, Any], path: str | os.PathLike) -> dict[Id, Record]:
    """``answers`` and the two types by question id, of VQA's annotations. OK-VQA's name their question types
    by a key of the file's ``question_types``. What has no id or no answers is left out with a warning.

    Raises:
        DataError: there is nothing else.
    """
    names = content.get("question_types")
    names = names if isinstance(names, Mapping) else {}
    found: dict[Id, Record] = {}
    bad = []
    for index, row in enumerate(content["annotations"]):
        try:
            question_id, answers = _given(row)
        except DataError as error:
            bad.append(f"annotation {index} of {path}: {error}")
            continue
        kinds = {key: str(row[key]) for key in ("answer_type", "question_type") if row.get(key)}
        found[question_id] = {"answers": answers, **{k: str(names.get(v, v)) for k, v in kinds.items()}}
    if not found:
        raise DataError(f"{bad[0]} So it is with all of them." if bad else f"{path} lists no annotations.")
    if bad:
        logger.warning("annotations that are left out: %d, such as %s", len(bad), bad[0])
    return found


def _given(row: Any) -> tuple[Id, list[str]]:
    """The question's id and the answers of an annotation. Raises `DataError` with what is wrong with it."""
    if isinstance(row, Mapping) and is_id(row.get("question_id")) and (answers := _answers_of(row)):
        return row["question_id"], answers
    raise DataError(
        f"it must have a 'question_id' and 'answers', [{{'answer': text}}, ..]; it is {describe(row)}."
    )


def _answer_list(content: Sequence[str] | Mapping[str, int]) -> list[str]:
    return sorted(content, key=content.__getitem__) if isinstance(content, Mapping) else list(content)


def coco_2014_name(subtype: str, image_id: int) -> str:
    """COCO's image in the naming of 2014 and 2015: ``val2014/COCO_val2014_000000000042.jpg``. The images
    of ``test-dev2015`` are among those of ``test2015``."""
    folder = subtype.replace("test-dev", "test")
    return f"{folder}/COCO_{folder}_{image_id:012d}.jpg"


def coco_2017_name(split: str, image_id: int) -> str:
    """COCO's image in the naming of 2017, which A-OKVQA takes: ``val2017/000000000042.jpg``."""
    return f"{split}2017/{image_id:012d}.jpg"


def _record(row: Any, number: int) -> Record:
    """A row in our words. Raises `DataError` with what is wrong with it."""
    if not isinstance(row, Mapping):
        raise DataError(
            f"it must be a mapping with 'image' and 'question', not {describe(row)}.", "bad record"
        )
    record: Record = {"visual": _visual_of(row), "question": _question_of(row), "answers": _answers_of(row)}
    record["question_id"] = row.get("question_id", number)
    if not is_id(record["question_id"]):
        raise DataError(f"it has the question id {describe(record['question_id'])}.", "bad record")
    if is_id(row.get("image_id", row.get("imageId"))):
        record["image_id"] = row.get("image_id", row.get("imageId"))
    for key in ("answer_type", "question_type"):
        if isinstance(row.get(key), str):
            record[key] = row[key]
    kinds = row.get("types")
    if isinstance(kinds, Mapping) and isinstance(kinds.get("structural"), str):  # GQA's: verify, choose, ..
        record["question_type"] = kinds["structural"]
    if row.get("choices") is not None:
        record |= _choices_of(row)
    if row.get("difficult_direct_answer") is True:
        record["difficult"] = True
    return record


def _visual_of(row: Mapping[str, Any]) -> str:
    key = "video" if "video" in row else "image"
    visual, image_id = row.get(key), row.get("image_id")
    if key not in row and isinstance(row.get("imageId"), str | int):
        visual = f"{row['imageId']}.jpg"
    elif key not in row and (number := number_of(image_id)) is not None and isinstance(row.get("split"), str):
        visual = coco_2017_name(row["split"], number)
    elif key not in row:
        coco = "; COCO's follows from the file's 'data_subtype', such as val2014" * ("image_id" in row)
        raise DataError(f"it has no 'image' and no 'video'{coco}; it is {describe(row)}.", "bad record")
    if not isinstance(visual, str) or not visual or text_problem(visual):
        raise DataError(f"it must have a file name as '{key}', not {describe(visual)}.", "bad record")
    return visual


def _question_of(row: Mapping[str, Any]) -> str:
    if "question" not in row:
        raise DataError(f"it has no 'question'; it is {describe(row)}.", "bad record")
    _check_text(row["question"], "'question'")
    if not row["question"].strip():
        raise DataError("it has an empty question.", "empty question")
    return row["question"]


def _answers_of(row: Mapping[str, Any]) -> list[str]:
    """Texts, of one text or number, a list of them, or a list of ``{"answer": text}``; none where there are
    none."""
    given: Any = next((row[key] for key in _ANSWERS if row.get(key) is not None), [])
    given = given if isinstance(given, list) else [given]
    answers = [as_text(item.get("answer") if isinstance(item, Mapping) else item) for item in given]
    for answer in answers:
        _check_text(answer, "an answer")
    return answers


def _choices_of(row: Mapping[str, Any]) -> Record:
    choices, right = row["choices"], row.get("correct_choice_idx")
    if not isinstance(choices, list) or not choices:
        raise DataError(f"it must have a list of texts as 'choices', not {describe(choices)}.", "bad record")
    choices = [as_text(choice) for choice in choices]
    for choice in choices:
        _check_text(choice, "a choice")
    if right is None:
        return {"choices": choices}
    if not isinstance(right, int) or not 0 <= right < len(choices):
        raise DataError(
            f"it has {len(choices)} choices and the right one is {describe(right)}.", "bad record"
        )
    return {"choices": choices, "correct_choice": choices[right]}


def _check_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"it must have text as {what}, not {describe(value)}.", "bad record")
    if problem := text_problem(value):
        raise DataError(f"it holds {problem} in {what}: {describe(value)}.", "bad record")
