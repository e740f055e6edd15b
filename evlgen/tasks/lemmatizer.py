"""Answers in the base forms of their words, as BLIP-2's published scores on OK-VQA have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from evlgen.common.errors import ConfigError

PIPELINE = "en_core_web_sm"
_REMEDY = "Or set it to false: answers are then scored as they are written."


class Lemmatizer:
    """Nouns and verbs become their lemmas, all other words stay (``_lemmatize`` of LAVIS's ``blip2_t5``).

    Args:
        pipeline: from texts to spaCy's documents, such as ``spacy.load("en_core_web_sm").pipe``.
    """

    def __init__(self, pipeline: Callable[[Sequence[str]], Iterable[Any]]) -> None:
        self.pipeline = pipeline

    def __call__(self, answers: Sequence[str]) -> list[str]:
        """The answers, their tokens joined by blanks."""
        return [
            " ".join(token.lemma_ if token.pos_ in ("NOUN", "VERB") else token.text for token in document)
            for document in self.pipeline(answers)
        ]


def load_lemmatizer() -> Lemmatizer:
    """A lemmatizer by spaCy's small English pipeline.

    Raises:
        ConfigError: spaCy or the pipeline is not installed.
    """
    try:
        import spacy
    except ImportError as error:
        raise ConfigError(
            'run.apply_lemmatizer needs spaCy: pip install "evlgen[lemmatizer]" && python -m spacy download '
            f"{PIPELINE}. {_REMEDY}"
        ) from error
    try:
        return Lemmatizer(spacy.load(PIPELINE).pipe)
    except OSError as error:
        raise ConfigError(
            f"run.apply_lemmatizer needs spaCy's English pipeline: python -m spacy download {PIPELINE}. "
            f"{_REMEDY}"
        ) from error
