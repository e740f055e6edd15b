"""How long texts are to a model, by its own rules and before its weights are read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from evlgen.models.protocols import offering
from evlgen.processors.turns import Turn, read_turns

if TYPE_CHECKING:
    from evlgen.models.language.segments import Row

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


class TurnReader(Protocol):
    """What makes tokens of conversations."""

    def row_of_turns(self, turns: Sequence[Turn], answers_next: bool = False) -> Row:
        """The segments of a conversation."""


class TextLengths:
    """Texts measured in tokens.

    Args:
        reader: of the texts, with the model's limits.
        num_soft: from the shape of an image or video to the number of its soft prompts.
        max_positions: of a conversation.
    """

    UNIT: ClassVar[str] = "tokens"

    def __init__(
        self,
        reader: TextReader,
        num_soft: Callable[[Sequence[int]], int] | None = None,
        max_positions: int | None = None,
    ) -> None:
        self._num_soft, self._max_positions = num_soft, max_positions
        self.turn_limits = {} if max_positions is None else {"model.max_sequence_len": max_positions}
        limits = {key: vars(reader)[key] for key in _LIMITS if key in vars(reader)}
        self.limits = {f"model.{key}": limit for key, limit in limits.items()}
        if len(set(self.limits.values())) == 1:
            self.limits = dict(list(self.limits.items())[:1])
        self._cut, self._whole = reader, copy.copy(reader)
        vars(self._whole).update(dict.fromkeys(limits, _NO_LIMIT))

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

    def of_turns(self, messages: Sequence[Any], shapes: Sequence[Sequence[int]], learns: bool) -> TextLength:
        """The length of a conversation in positions, those of its soft prompts counted as read.

        Args:
            shapes: of its images and videos.
            learns: whether its answers are learned; else the last one is to be written.

        Raises:
            DataError: the model's chat template does not take it.
        """
        from evlgen.models.language.segments import cut, has_learned, segments

        row = offering(self._whole, TurnReader).row_of_turns(read_turns(messages), answers_next=not learns)
        counts = [1 if self._num_soft is None else self._num_soft(shape) for shape in shapes]
        parts = segments(row)
        learned = sum(len(part.ids) for part in parts if part.learned) if learns else 0
        total = sum(len(part.ids) for part in parts) + sum(counts)
        limit = total if self._max_positions is None else self._max_positions
        is_lost = learns and not has_learned(cut(row, counts, limit))
        return TextLength(total - learned, learned, is_cut=total > limit, is_lost=is_lost)


class WordLengths:
    """Texts measured in words, where there is no tokenizer: nothing is known of limits then."""

    UNIT: ClassVar[str] = "words"

    def __init__(self) -> None:
        self.limits: dict[str, int] = {}
        self.turn_limits: dict[str, int] = {}

    def learned(self, text_in: list[str], text_out: list[str] | None = None) -> list[TextLength]:
        """See `TextLengths.learned`."""
        if text_out is None:
            return [TextLength(0, _words(text)) for text in text_in]
        return [TextLength(_words(a), _words(b)) for a, b in zip(text_in, text_out, strict=True)]

    def asked(self, prompts: list[str]) -> list[TextLength]:
        """See `TextLengths.asked`."""
        return [TextLength(_words(prompt), 0) for prompt in prompts]

    def of_turns(self, messages: Sequence[Any], shapes: Sequence[Sequence[int]], learns: bool) -> TextLength:
        """See `TextLengths.of_turns`; images are not counted."""
        counts = {True: 0, False: 0}
        for turn in read_turns(messages):
            counts[learns and turn.role == "assistant"] += _words(turn.text)
        return TextLength(counts[False], counts[True])


def _words(text: str) -> int:
    return len(text.split())
