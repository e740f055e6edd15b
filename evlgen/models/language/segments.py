"""A sample as a sequence of segments: text that is read, text that is learned, images and videos.

A caption is an image, its prompt, which is read, and the caption, which is learned; a question has its answer
in the caption's place; a conversation goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100  # label of positions that are not learned


class Read(NamedTuple):
    """Text of a sample that is read and not learned."""

    text: str


class Learn(NamedTuple):
    """Text of a sample that is learned.

    Attributes:
        end: whether it ends there, so that generation would: its end token is learned too.
    """

    text: str
    end: bool = True


class Visual(NamedTuple):
    """The place of the sample's next image or video."""


Part = Read | Learn | Visual


class Segment(NamedTuple):
    """A part of a sample in tokens.

    Attributes:
        ids: its tokens.
        learned: whether they are learned.
        is_visual: whether it is the place of an image or a video instead, whose soft prompts stand there.
    """

    ids: list[int]
    learned: bool = False
    is_visual: bool = False


VISUAL = Segment([], is_visual=True)


class Tokens(NamedTuple):
    """A sample with one image, as a caption and a question are: the tokens before the soft prompts, after
    them, and those that are learned after these."""

    before: list[int]
    read: list[int]
    learned: list[int]


Row = Tokens | Sequence[Segment]
#: Of K images: [K, M, C], or K tensors [M, C] of any lengths.
SoftPrompts = Tensor | Sequence[Tensor]


def segments(row: Row) -> Sequence[Segment]:
    """The segments of a sample."""
    if isinstance(row, Tokens):
        return Segment(row.before), VISUAL, Segment(row.read), Segment(row.learned, learned=True)
    return row


def num_visuals(row: Row) -> int:
    """How many images and videos a sample has."""
    return sum(segment.is_visual for segment in segments(row))


def num_soft_of(soft_prompts: SoftPrompts) -> list[int]:
    """The number of soft prompts of each image."""
    if isinstance(soft_prompts, Tensor):
        return [soft_prompts.shape[1]] * len(soft_prompts)
    return [len(prompts) for prompts in soft_prompts]


def by_image(prompts: Tensor, num_soft: Sequence[int]) -> SoftPrompts:
    """The soft prompts [P, C] of several images, one behind another, apart."""
    if len({*num_soft}) > 1:
        return prompts.split([*num_soft])
    return prompts.view(len(num_soft), num_soft[0] if num_soft else 0, prompts.shape[1])


def chosen(soft_prompts: SoftPrompts, places: list[int]) -> SoftPrompts:
    """The soft prompts of some of the images, in this order."""
    if isinstance(soft_prompts, Tensor):
        if places == [*range(len(soft_prompts))]:
            return soft_prompts
        return soft_prompts[torch.tensor(places).to(soft_prompts.device, non_blocking=True)]
    return [soft_prompts[place] for place in places]


def num_positions(row: Row, num_soft: Sequence[int]) -> int:
    """The positions of a sample, given the soft prompts of each of its images."""
    return sum(len(segment.ids) for segment in segments(row)) + sum(num_soft)


def has_learned(row: Row) -> bool:
    """Whether there is a token to learn."""
    return any(segment.learned and segment.ids for segment in segments(row))


def cut(row: Row, num_soft: Sequence[int], limit: int) -> list[Segment]:
    """A sample without what lies beyond ``limit`` positions. An image that would be cut is left out whole.

    Args:
        num_soft: soft prompts of each of its images.
    """
    kept: list[Segment] = []
    room, lengths = limit, iter(num_soft)
    for segment in segments(row):
        length = next(lengths) if segment.is_visual else len(segment.ids)
        if length > room:
            return kept if segment.is_visual else [*kept, segment._replace(ids=segment.ids[:room])]
        kept.append(segment)
        room -= length
    return kept


class Layout(NamedTuple):
    """A batch of B sequences of at most L positions; all tensors are on the CPU.

    Attributes:
        ids: [B, L], tokens; any where soft prompts or padding stand.
        mask: [B, L], 0 for padding.
        labels: [B, L], the tokens that are learned, `IGNORED` elsewhere.
        places: [2, P], row and column of each soft prompt, in the order of the images.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    places: Tensor


def lay_out(
    rows: Iterable[Row],
    num_soft: Sequence[int],
    pad_token: int,
    padding_side: str,
    width_of: Callable[[int], int] | None = None,
) -> Layout:
    """Samples side by side.

    Args:
        rows: B samples.
        num_soft: soft prompts of each of their images, in the order in which these stand in the samples.
        padding_side: ``right`` or ``left``.
        width_of: from the longest sample's positions to L; None: the same.
    """
    lengths = iter(num_soft)
    ids, labels, starts = [], [], []  # of each sample; of each image, its row and first column
    for number, row in enumerate(rows):
        own: list[int] = []
        learned: list[int] = []
        for segment in segments(row):
            if segment.is_visual:
                length = next(lengths)
                starts.append((number, len(own), length))
                own += [pad_token] * length
                learned += [IGNORED] * length
            else:
                own += segment.ids
                learned += segment.ids if segment.learned else [IGNORED] * len(segment.ids)
        learned[:1] = [IGNORED] * len(learned[:1])  # nothing stands before it that it could be predicted from
        ids.append(torch.tensor(own, dtype=torch.long))
        labels.append(torch.tensor(learned, dtype=torch.long))
    mask = pad_sequence([torch.ones_like(row) for row in ids], True, 0, padding_side)
    missing = width_of(mask.shape[1]) - mask.shape[1] if width_of else 0
    padding = (0, missing) if padding_side == "right" else (missing, 0)
    mask = F.pad(mask, padding)
    places = [
        torch.tensor([[row] * m, range(start, start + m)], dtype=torch.long).view(2, m)
        for row, start, m in starts
    ]
    place = torch.cat(places, 1) if places else torch.empty(2, 0, dtype=torch.long)
    if padding_side == "left":
        place[1] += (mask == 0).sum(1)[place[0]]
    return Layout(
        F.pad(pad_sequence(ids, True, pad_token, padding_side), padding, value=pad_token),
        mask,
        F.pad(pad_sequence(labels, True, IGNORED, padding_side), padding, value=IGNORED),
        place,
    )
