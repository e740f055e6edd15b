"""Captions and questions, cleaned by BLIP's rules."""

from __future__ import annotations

import pytest

from evlgen.common.errors import ConfigError
from evlgen.processors import build_processor


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A large white airplane and a person on a lot.", "a large white airplane and a person on a lot"),
        ("  Two   dogs;one (black) \n", "two dogs one black"),
        ('He said: "STOP!" ~ #now*', "he said stop now"),
        ("it's a well-known man, isn't it?", "it's a well-known man, isn't it?"),
        ("first line\nsecond\tline", "first line second line"),
        ("", ""),
        ("...", ""),
    ],
)
def test_caption_rules(raw: str, clean: str) -> None:
    assert build_processor({"name": "blip_caption"})(raw) == clean


def test_caption_is_cut_before_the_prompt_is_put_in_front() -> None:
    processor = build_processor({"name": "blip_caption", "prompt": "a photo of ", "max_words": 3})
    assert processor("One two. three four") == "a photo of one two three"


def test_captions_are_cut_at_fifty_words_unless_told_otherwise() -> None:
    assert build_processor({"name": "blip_caption"})("word " * 80) == " ".join(["word"] * 50)
    assert build_processor({"name": "blip_question"})("word " * 80) == " ".join(["word"] * 50)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("What color is the man's hat?", "what color is the man's hat?"),
        ("Is this A.M. or P.M.?  ", "is this am or pm?"),
        ("red;blue", "redblue"),
        (" is  it?", " is  it?"),
    ],
)
def test_question_rules_delete_punctuation_and_keep_inner_blanks(raw: str, clean: str) -> None:
    assert build_processor({"name": "blip_question"})(raw) == clean


def test_question_has_no_prompt() -> None:
    with pytest.raises(ConfigError, match="prompt"):
        build_processor({"name": "blip_question", "prompt": "Question:"})
