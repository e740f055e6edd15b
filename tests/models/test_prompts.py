"""Prompts with slots."""

from __future__ import annotations

import pytest

from evlgen.common.errors import ConfigError
from evlgen.models.prompts import ask, fill_ocr_slots

QUESTIONS = ["what is it?", "which colour?"]


def test_one_slot_takes_the_question():
    assert ask("Question: {} Short answer:", {"text_input": QUESTIONS}, 2) == [
        "Question: what is it? Short answer:",
        "Question: which colour? Short answer:",
    ]


def test_one_question_for_all_samples_and_no_prompt():
    assert ask("", {"text_input": "why?"}, 3) == ["why?"] * 3


def test_choices_come_second_with_letters():
    samples = {"text_input": QUESTIONS, "choices": [["a cat", "a dog"], ["red"]]}
    assert ask("Question: {} Options: {}. Short answer:", samples, 2) == [
        "Question: what is it? Options: (a) a cat (b) a dog. Short answer:",
        "Question: which colour? Options: (a) red. Short answer:",
    ]


def test_words_read_in_the_image_come_first_thirty_at_most():
    samples = {"text_input": QUESTIONS, "ocr_tokens": [["stop"], [str(i) for i in range(40)]]}
    first, second = ask("OCR tokens: {}. Question: {} Short answer:", samples, 2)
    assert first == "OCR tokens: stop. Question: what is it? Short answer:"
    assert second.startswith("OCR tokens: 0, 1, 2") and ", 29. Question" in second


def test_braces_in_questions_are_text():
    assert ask("Q: {} A:", {"text_input": ["{} or {x}?"]}, 1) == ["Q: {} or {x}? A:"]


@pytest.mark.parametrize("prompt", ["no slot", "{} {} {}", "{} {}"])
def test_prompts_that_do_not_fit_say_so(prompt):
    with pytest.raises(ConfigError, match=r"run\.prompt"):
        ask(prompt, {"text_input": QUESTIONS}, 2)


def test_more_choices_than_letters():
    samples = {"text_input": ["?"], "choices": [[f"c{i}" for i in range(28)]]}
    assert ask("{} {}", samples, 1)[0].endswith("(z) c25 (aa) c26 (ab) c27")


def test_prompts_to_continue_take_the_words_read():
    samples = {"ocr_tokens": [["stop"], ["go", "left"]]}
    assert fill_ocr_slots(["it says {}", "a sign"], samples) == ["it says stop", "a sign"]
    assert fill_ocr_slots(["a {}"], {}) == ["a {}"]


def test_another_number_of_questions_than_images():
    with pytest.raises(ConfigError, match="2 questions .* for 3 images"):
        ask("", {"text_input": QUESTIONS}, 3)
