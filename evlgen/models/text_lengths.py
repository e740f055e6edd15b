"""How long texts are to a model, by its own rules and before its weights are read."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

_NO_LIMIT = 1 << 30
_LIMITS = ("max_txt_len", "max_output_txt_len")


class TextLength(NamedTuple):
    """A text as a model has it.

    Attributes:
        read: tokens of the prompt or question before what is learned, nothing cut off.
        learned: tokens to learn, their end included; 0 where a text is only read.
        is_cut: whether the model's limits cut something off.
        is_lost: whether they leave nothing to learn but, at best, the end.
    """

    read: int
    learned: int
    is_cut: bool = False
    is_lost: bool = False


class TextReader(Protocol):
    """What makes tokens of texts, up to its ``max_txt_len`` (and ``max_output_txt_len``, if it has one)."""

    def to_learn(self, text_in: list[str], text_out: list[str] | None) -> Sequence[Any]:
        """What is ``read`` and ``learned`` of each text: objects with these two lists of tokens."""

    def to_read(self, prompts: list[str]) -> Sequence[Any]:
        """What is ``read`` of each prompt: objects with this list of tokens."""


class TextLengths:
    """Texts measured in tokens.

    Args:
        reader: of the texts, with the model's limits.
    """

    UNIT: ClassVar[str] = "tokens"

    def __init__(self, reader: TextReader) -> None:
        self.limits = {f"model.{key}": getattr(reader, key) for key in _LIMITS if hasattr(reader, key)}
        if len(set(self.limits.values())) == 1:
            self.limits = dict(list(self.limits.items())[:1])
        self._cut, self._whole = reader, copy.copy(reader)
        for key in _LIMITS:
            if hasattr(reader, key):
                setattr(self._whole, key, _NO_LIMIT)

    def learned(self, text_in: list[str], text_out: list[str] | None = None) -> list[TextLength]:
        """The lengths of texts in training; see `LanguageModel.loss`."""
        pairs = zip(
            self._whole.to_learn(text_in, text_out), self._cut.to_learn(text_in, text_out), strict=True
        )
        return [
            TextLength(
                len(whole.read),
                len(whole.learned),
                is_cut=len(cut.read) + len(cut.learned) < len(whole.read) + len(whole.learned),
                is_lost=all(token == whole.learned[-1] for token in cut.learned),  # the end is the last
            )
            for whole, cut in pairs
        ]

    def asked(self, prompts: list[str]) -> list[TextLength]:
        """The lengths of texts that the model is to continue."""
        pairs = zip(self._whole.to_read(prompts), self._cut.to_read(prompts), strict=True)
        return [TextLength(len(w.read), 0, is_cut=len(cut.read) < len(w.read)) for w, cut in pairs]


class WordLengths:
    """Texts measured in words, where there is no tokenizer: nothing is known of limits then."""

    UNIT: ClassVar[str] = "words"

    def __init__(self) -> None:
        self.limits: dict[str, int] = {}

    def learned(self, text_in: list[str], text_out: list[str] | None = None) -> list[TextLength]:
        """See `TextLengths.learned`."""
        if text_out is None:
            return [TextLength(0, _words(text)) for text in text_in]
        return [TextLength(_words(a), _words(b)) for a, b in zip(text_in, text_out, strict=True)]

    def asked(self, prompts: list[str]) -> list[TextLength]:
        """See `TextLengths.asked`."""
        return [TextLength(_words(prompt), 0) for prompt in prompts]


def _words(text: str) -> int:
    return len(text.split())
