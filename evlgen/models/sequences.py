"""Samples that are sequences of texts and images, or conversations, as a language model reads them: rows of
segments. See `VLM.forward` for their keys."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

from evlgen.batch import Batch
from evlgen.common.errors import DataError
from evlgen.models.language import LanguageModel
from evlgen.models.language.segments import (
    Row,
    SoftPrompts,
    chosen,
    cut,
    has_learned,
    num_positions,
    num_soft_of,
    num_visuals,
)
from evlgen.processors.turns import check_turns, read_turns

logger = logging.getLogger(__name__)


def is_sequence(samples: Batch) -> bool:
    """Whether samples are sequences of texts and images, or conversations."""
    return "messages" in samples or "segments" in samples


def has_image(samples: Batch) -> bool:
    """Whether each sample has one image (or video)."""
    return "image" in samples or "visual_tokens" in samples


def rows_to_learn(
    language: LanguageModel, samples: Batch, soft_prompts: SoftPrompts, limit: int
) -> tuple[list[Row], SoftPrompts]:
    """Samples to learn, without what is beyond ``limit`` positions, and the soft prompts that stand in them.

    Args:
        soft_prompts: of all images of the samples, in their order.

    Raises:
        DataError: a sample has more places of images than images, or fewer; and see `check_turns`.
    """
    num_soft = num_soft_of(soft_prompts)
    rows: list[Row] = []
    kept: list[int] = []
    first = 0
    for number in range(num_sequences(samples)):
        whole = _row(language, samples, number)
        end = first + num_visuals(whole)
        row = cut(whole, num_soft[first:end], limit)
        rows.append(row)
        kept += range(first, first + num_visuals(row))
        first = end
    return rows, _kept(soft_prompts, kept)


def rows_to_continue(
    language: LanguageModel, samples: Batch, soft_prompts: SoftPrompts, room: int
) -> tuple[list[Row], SoftPrompts]:
    """As `rows_to_learn`, of samples behind which the assistant's next turn begins. Conversations lose their
    oldest turns, so that it has ``room`` positions."""
    num_soft = num_soft_of(soft_prompts)
    rows: list[Row] = []
    kept: list[int] = []
    first = 0
    for number in range(num_sequences(samples)):
        whole = _row(language, samples, number, answers_next=True)
        end = first + num_visuals(whole)
        row, own, start = _recent(language, samples, number, whole, num_soft[first:end], room)
        if start:
            logger.warning("a conversation is too long: its turns before turn %d are left out", start + 1)
        rows.append(row)
        kept += [first + place for place in own]
        first = end
    return rows, _kept(soft_prompts, kept)


def not_learnable(
    language: LanguageModel, samples: Batch, num_soft_prompts: Callable[[Tensor], int], limit: int
) -> dict[int, str]:
    """See `BaseModel.not_learnable`.

    Args:
        num_soft_prompts: of an image [3, H, W] or a video [3, T, H, W].
    """
    found = {}
    for number in range(num_sequences(samples)):
        try:
            row = _row(language, samples, number)
        except DataError as error:
            found[number] = str(error)
            continue
        if not has_learned(cut(row, _num_soft(samples, number, num_soft_prompts), limit)):
            found[number] = f"nothing of an answer is within the {limit} positions of model.max_sequence_len"
    return found


def not_answerable(
    language: LanguageModel, samples: Batch, num_soft_prompts: Callable[[Tensor], int], room: int
) -> dict[int, str]:
    """See `BaseModel.not_answerable`; arguments as of `not_learnable` and `rows_to_continue`."""
    found = {}
    most = language.max_positions
    for number in range(num_sequences(samples)):
        num_soft = _num_soft(samples, number, num_soft_prompts)
        try:
            whole = _row(language, samples, number, answers_next=True)
            row, own, _ = _recent(language, samples, number, whole, num_soft, room)
        except DataError as error:
            found[number] = str(error)
            continue
        if most and num_positions(row, [num_soft[place] for place in own]) + room > most:
            found[number] = f"its question leaves no room for {room} tokens in the language model's {most}"
    return found


def _num_soft(samples: Batch, number: int, num_soft_prompts: Callable[[Tensor], int]) -> list[int]:
    """The soft prompts of each image of a sample."""
    if images := samples.get("images"):
        return [num_soft_prompts(image) for image in images[number]]
    if not has_image(samples):
        return []
    return [num_soft_prompts(samples["image" if "image" in samples else "visual_tokens"][number])]


def num_sequences(samples: Batch) -> int:
    return len(samples["segments"] if "segments" in samples else samples["messages"])


def _row(language: LanguageModel, samples: Batch, number: int, answers_next: bool = False) -> Row:
    """A sample, whole."""
    if "segments" in samples:
        row = language.row_of_parts(samples["segments"][number])
    else:
        turns = read_turns(samples["messages"][number])
        check_turns(turns, learns=not answers_next)
        row = language.row_of_turns(turns, answers_next)
    given = len(samples["images"][number]) if "images" in samples else int(has_image(samples))
    if (places := num_visuals(row)) != given:
        raise DataError(
            f"a sample has {places} places of images and {given} images: there must be one for each.",
            "images without places" if given > places else "places without images",
        )
    return row


def _recent(
    language: LanguageModel, samples: Batch, number: int, row: Row, num_soft: list[int], room: int
) -> tuple[Row, list[int], int]:
    """A conversation without its oldest turns, but for the system's, so that ``room`` positions are left
    behind it; which of its images are in the rest; and how many turns stand before that, the system's among
    them, 0 where none is left out."""
    most = language.max_positions
    turns = read_turns(samples["messages"][number]) if "messages" in samples else []
    counts = [len(turn.visuals) for turn in turns]
    first = start = sum(turn.role == "system" for turn in turns[:1])
    left_out = 0
    kept = list(range(len(num_soft)))
    while most and num_positions(row, [num_soft[i] for i in kept]) + room > most:
        later = [i for i in range(first + 1, len(turns)) if turns[i].role == "user"]
        if not later:
            break  # the last question alone: generation names what is too long
        first = left_out = later[0]
        row = language.row_of_turns([*turns[:start], *turns[first:]], True)
        kept = [*range(sum(counts[:start])), *range(sum(counts[:first]), sum(counts))]
    return row, kept, left_out


def _kept(soft_prompts: SoftPrompts, places: list[int]) -> SoftPrompts:
    return soft_prompts if len(places) == len(soft_prompts) else chosen(soft_prompts, places)
