"""Text processors: how a caption or a question is cleaned before it is tokenised. The rules are BLIP's."""

from __future__ import annotations

import re

from evlgen.common.registry import registry
from evlgen.config.constraints import PositiveInt
from evlgen.processors.base_processor import BaseProcessor

_PUNCTUATION = re.compile(r'[.!"()*#:;~]')


@registry.register_processor("blip_caption")
class BlipCaptionProcessor(BaseProcessor):
    """A caption in lower case, without punctuation, cut to ``max_words``, with ``prompt`` put before it.

    Every run of white space becomes one blank. (LAVIS folds runs of two and more and keeps a lone tab or line
    break; OPT reads a line break as the caption's end.) The prompt stays as written, trailing blank included.
    """

    def __init__(self, prompt: str = "", max_words: PositiveInt = 50) -> None:
        self.prompt = prompt
        self.max_words = max_words

    def __call__(self, item: str) -> str:
        words = _PUNCTUATION.sub(" ", item.lower()).split()
        return self.prompt + " ".join(words[: self.max_words])


@registry.register_processor("blip_question")
class BlipQuestionProcessor(BaseProcessor):
    """A question in lower case, without punctuation but for commas and question marks, cut to ``max_words``.

    As published, a deleted mark leaves no blank behind, and words are what single blanks separate.
    """

    def __init__(self, max_words: PositiveInt = 50) -> None:
        self.max_words = max_words

    def __call__(self, item: str) -> str:
        words = _PUNCTUATION.sub("", item.lower()).rstrip(" ").split(" ")
        return " ".join(words[: self.max_words])
