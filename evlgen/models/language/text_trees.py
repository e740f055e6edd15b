"""Several texts behind one image's soft prompts, read in one row: what they share stands there once.

A row is a tree: the trunk (soft prompts, and what all texts read before they differ), then the branches, one
for each text, that see the trunk and themselves only. With five captions to an image a decoder reads half as
many positions as it does where each caption has soft prompts of its own, and computes the same.
"""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from evlgen.models.language.segments import Tokens

_PADDING = -1


class TextTrees(NamedTuple):
    """A batch of B trees of L positions at most; all tensors are on the CPU.

    Attributes:
        rows: the tokens of each tree, trunk and branches one after the other; nothing is ``learned``.
        positions: [B, L], the place of each token in its own text.
        visible: [B, L, L], which positions (last dimension) a position sees.
        places: [2, n], row and column where each token that is learned is predicted.
        targets: [n], those tokens.
        texts: [n], the text each belongs to.
    """

    rows: list[Tokens]
    positions: Tensor
    visible: Tensor
    places: Tensor
    targets: Tensor
    texts: Tensor


def text_trees(samples: list[Tokens], num_texts: list[int], num_soft: int) -> TextTrees:
    """The trees of N texts.

    Args:
        samples: N texts; those of one image have the same tokens before the soft prompts.
        num_texts: how many of them each of the B images has.
        num_soft: M, soft prompts of an image.
    """
    rows, positions, owners = [], [], []
    places: list[tuple[int, int]] = []
    targets: list[int] = []
    texts: list[int] = []
    remaining = enumerate(samples)
    for row, count in enumerate(num_texts):
        group = list(islice(remaining, count))
        shared = _shared(group)
        trunk = len(shared.before) + num_soft + len(shared.read)
        columns, owner, ids = list(range(trunk)), [0] * trunk, list(shared.read)
        for branch, (text, sample) in enumerate(group, start=1):
            own = [*sample.read[len(shared.read) :], *sample.learned]
            first = len(own) - len(sample.learned)  # the first token that is learned
            for place in range(first, len(own)):
                # a token is predicted one position before it stands: of a branch's first, at the trunk's end
                places.append((row, len(columns) + place - 1 if place else trunk - 1))
                texts.append(text)
            targets += sample.learned
            columns_of = range(trunk, trunk + len(own))
            columns, owner, ids = columns + list(columns_of), owner + [branch] * len(own), ids + own
        rows.append(Tokens(shared.before, ids, []))
        positions.append(torch.tensor(columns))
        owners.append(torch.tensor(owner))
    owned = pad_sequence(owners, True, _PADDING)  # [B, L]
    length = owned.shape[1]
    behind = torch.ones(length, length, dtype=torch.bool).tril()
    same = owned[:, :, None] == owned[:, None]
    return TextTrees(
        rows,
        pad_sequence(positions, True, 0),
        behind & (same | (owned == 0)[:, None]),
        torch.tensor(places, dtype=torch.long).view(-1, 2).T,
        torch.tensor(targets, dtype=torch.long),
        torch.tensor(texts, dtype=torch.long),
    )


def _shared(group: list[tuple[int, Tokens]]) -> Tokens:
    """What the texts of an image have in common: all they read, or none of it."""
    if not group:
        return Tokens([], [], [])
    first = group[0][1]
    same = all(sample.read == first.read for _, sample in group)
    return Tokens(first.before, first.read if same else [], [])
