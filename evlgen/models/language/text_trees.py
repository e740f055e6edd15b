"""Samples to learn from as trees, several in a row: what texts share stands there once, and few positions are
padding.

A tree is a trunk (soft prompts, and what all texts of an image read before they differ), then branches, one
for each text, that see the trunk and themselves only; a sample with one text is a trunk alone. Trees stand
one behind the other in a row, without a view of each other. With five captions to an image a decoder reads
half as many positions as it does where each caption has soft prompts and a row of its own, and computes the
same.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from evlgen.models.language.segments import Row, Segment, Tokens, num_visuals, segments

_PADDING = -1
_TRUNK = 0
_FEWER = 1.12  # of one number of rows that is tried to the next


class Tree(NamedTuple):
    """A tree of n positions.

    Attributes:
        segments: its tokens and the places of its images, trunk and branches one after the other.
        positions: [n], the place of each in its own text.
        branches: [n], the branch each belongs to; 0: the trunk.
        places: of each token that is learned, where in the tree it is predicted.
        targets: those tokens.
        texts: the text each of them belongs to.
    """

    segments: list[Segment]
    positions: list[int]
    branches: list[int]
    places: list[int]
    targets: list[int]
    texts: list[int]


class Forest(NamedTuple):
    """A batch of B rows of at most L positions, with trees; all tensors are on the CPU.

    Attributes:
        rows: the segments of each row.
        images: the number of each image, in the order in which they stand in the rows.
        positions: [B, L], the place of each token in its own text.
        visible: [B, L, L], which positions (last dimension) a position sees.
        places: [2, n], row and column where each token that is learned is predicted.
        targets: [n], those tokens.
        texts: [n], the text each belongs to.
    """

    rows: list[list[Segment]]
    images: list[int]
    positions: Tensor
    visible: Tensor
    places: Tensor
    targets: Tensor
    texts: Tensor


def single_trees(samples: Sequence[Row], num_soft: Sequence[int]) -> list[Tree]:
    """Each sample as a tree without branches.

    Args:
        num_soft: soft prompts of each image of all samples, in their order.
    """
    lengths = iter(num_soft)
    trees = []
    for number, row in enumerate(samples):
        places: list[int] = []
        targets: list[int] = []
        length = 0
        for segment in segments(row):
            count = next(lengths) if segment.is_visual else len(segment.ids)
            if segment.learned:
                is_first = length == 0  # nothing stands before it that it could be predicted from
                places += range(length - 1 + is_first, length + count - 1)
                targets += segment.ids[is_first:]
            length += count
        texts = [number] * len(targets)
        trees.append(Tree([*segments(row)], [*range(length)], [_TRUNK] * length, places, targets, texts))
    return trees


def text_trees(samples: Sequence[Tokens], num_texts: Sequence[int], num_soft: int) -> list[Tree]:
    """The trees of N texts.

    Args:
        samples: N texts; those of one image have the same tokens before the soft prompts.
        num_texts: how many of them each of the B images has.
        num_soft: M, soft prompts of an image.
    """
    remaining = enumerate(samples)
    return [_tree(list(islice(remaining, count)), num_soft) for count in num_texts]


def _tree(group: Sequence[tuple[int, Tokens]], num_soft: int) -> Tree:
    shared = _shared(group)
    trunk = len(shared.before) + num_soft + len(shared.read)
    tree = Tree([*segments(shared)], [*range(trunk)], [_TRUNK] * trunk, [], [], [])
    for branch, (text, sample) in enumerate(group, start=_TRUNK + 1):
        read = sample.read[len(shared.read) :]
        length = len(read) + len(sample.learned)
        start = len(tree.positions) - 1  # a token is predicted one position before it stands
        tree.places.extend(start + place if place else trunk - 1 for place in range(len(read), length))
        tree.targets.extend(sample.learned)
        tree.texts.extend([text] * len(sample.learned))
        tree.segments.extend([Segment(read), Segment(sample.learned)])
        tree.positions.extend(range(trunk, trunk + length))
        tree.branches.extend([branch] * length)
    return tree


def _shared(group: Sequence[tuple[int, Tokens]]) -> Tokens:
    """What the texts of an image have in common: all they read, or none of it."""
    if not group:
        return Tokens([], [], [])
    first = group[0][1]
    same = all(sample.read == first.read for _, sample in group)
    return Tokens(first.before, first.read if same else [], [])


def forest(trees: Sequence[Tree], rows: Sequence[Sequence[int]]) -> Forest:
    """Trees in rows.

    Args:
        rows: the trees of each row, by their numbers.
    """
    positions, owners, branches, places = [], [], [], []
    for number, row in enumerate(rows):
        start = 0
        for tree in row:
            places += [(number, start + place) for place in trees[tree].places]
            start += len(trees[tree].positions)
        positions.append(_joined(trees[tree].positions for tree in row))
        branches.append(_joined(trees[tree].branches for tree in row))
        owners.append(_joined([tree] * len(trees[tree].positions) for tree in row))
    numbers = iter(range(sum(map(num_visuals, (tree.segments for tree in trees)))))
    images = [list(islice(numbers, num_visuals(tree.segments))) for tree in trees]
    order = [tree for row in rows for tree in row]
    owner, branch = pad_sequence(owners, True, _PADDING), pad_sequence(branches, True, _TRUNK)  # [B, L]
    same = branch[:, :, None] == branch[:, None]
    return Forest(
        [[segment for tree in row for segment in trees[tree].segments] for row in rows],
        [image for tree in order for image in images[tree]],
        pad_sequence(positions, True, 0),
        ((owner[:, :, None] == owner[:, None]) & (same | (branch == _TRUNK)[:, None])).tril(),
        torch.tensor(places, dtype=torch.long).view(-1, 2).T,
        _joined(trees[tree].targets for tree in order),
        _joined(trees[tree].texts for tree in order),
    )


def _joined(lists: Iterable[list[int]]) -> Tensor:
    return torch.tensor([entry for entries in lists for entry in entries], dtype=torch.long)


def packed(lengths: Sequence[int], channels: int) -> list[list[int]]:
    """Which samples stand in one row, so that reading all rows costs least.

    Longer rows have less padding, and each of their positions is compared with more others. A position in a
    row of L is taken to cost 2 ``channels`` + L: attention then weighs three times its multiplications, about
    what it takes on a CPU (SmolLM2-135M was fastest with 32 captions in rows of 100 to 130 positions).

    Args:
        lengths: positions of each sample.
        channels: width C of the model.
    """
    best = [[place] for place in range(len(lengths))]
    widest = max(lengths, default=0)
    least = len(best) * widest * (2 * channels + widest)
    count = int(len(best) / _FEWER)
    while count:
        rows, width = _even_rows(lengths, count)
        cost = count * width * (2 * channels + width)
        if cost < least:
            best, least = rows, cost
        count = int(count / _FEWER)
    return best


def _even_rows(lengths: Sequence[int], count: int) -> tuple[list[list[int]], int]:
    """``count`` rows of about equal length, and the longest's: the longest sample first, each into the row
    that is the shortest so far."""
    heap: list[tuple[int, int]] = [(0, row) for row in range(count)]
    rows: list[list[int]] = [[] for _ in heap]
    for sample in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        length, row = heap[0]
        rows[row].append(sample)
        heapq.heapreplace(heap, (length + lengths[sample], row))
    return rows, max(heap)[0]
