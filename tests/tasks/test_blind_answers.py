"""Answers without looking at the image."""

from __future__ import annotations

from evlgen.tasks.metrics.blind_answers import blind_answers

LEARNED = [
    ("what is it?", ["cat"]),
    ("what is it ?", ["dog", "dog"]),
    ("what is under the table?", ["cat", "cat"]),
    ("where is it?", ["here"]),
]


def test_the_most_frequent_answer_by_ever_less_of_the_question():
    asked = {1: "What is it?", 2: "what is that?", 3: "who?"}
    assert blind_answers(LEARNED, asked) == {
        "the same question": {1: "dog", 2: "cat", 3: "cat"},
        "the first two words": {1: "cat", 2: "cat", 3: "cat"},
        "any question": {1: "cat", 2: "cat", 3: "cat"},
    }


def test_of_equally_frequent_answers_the_first_is_taken():
    found = blind_answers([("who is it?", ["b"]), ("who is it?", ["a"])], {7: "who is it?"})
    assert all(answers == {7: "b"} for answers in found.values())
