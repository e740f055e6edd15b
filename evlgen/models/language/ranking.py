"""How likely each of several texts is after an image and a prompt.

What all texts of an image share, its soft prompts and its prompt, is read once where the model allows it.
With many texts, such as a data set's list of answers, only those with the likeliest first tokens are read to
their end (``rank_answers`` of LAVIS's ``blip_vqa``; Li et al., *BLIP*, 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from evlgen.models.language.prefixes import SharedPrefix

#: Texts of a batch that are read side by side: bounds the memory that their logits take.
TEXTS_AT_ONCE = 1024


class Reader(Protocol):
    """What has read the prompts of a batch and says how likely texts after them are.

    Attributes:
        logits: [B, vocabulary], of the first token after each prompt.
    """

    logits: Tensor

    def read(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Texts as tokens [B, R, T] and their lengths [B, R], both on the CPU -> their log-likelihoods [B,
        R], float32. What stands behind a text's end is of no account."""
        ...


def log_likelihoods(
    reader_of: Callable[[int, int], Reader],
    texts: Sequence[Sequence[Sequence[int]]],
    num_candidates: int | None = None,
    at_once: int = TEXTS_AT_ONCE,
) -> list[Tensor]:
    """The log-likelihood of each text after its prompt.

    Args:
        reader_of: from the most texts of a prompt that are read side by side, and the most tokens of one, to
            the reader that does it.
        texts: for each of B prompts the token ids of its texts, none of them empty.
        num_candidates: how many texts of a prompt are read, those with the likeliest first tokens; None: all.
        at_once: texts of the whole batch that are read side by side.

    Returns:
        B tensors, float32, on the CPU, with as many values as the prompt has texts; -inf for a text that was
        not read.
    """
    lengths = pad_sequence([torch.tensor([len(ids) for ids in of_one]) for of_one in texts], True)  # [B, K]
    flat = pad_sequence([torch.tensor(ids) for of_one in texts for ids in of_one], True)
    tokens = flat.new_zeros(*lengths.shape, flat.shape[1])  # [B, K, T]
    tokens[lengths > 0] = flat
    most = min(num_candidates or lengths.shape[1], lengths.shape[1])
    width = min(most, max(1, at_once // len(texts)))

    reader = reader_of(width, tokens.shape[2])
    first = likelihoods_of(reader.logits[:, None], tokens[:, :, 0]).masked_fill(lengths == 0, -torch.inf)
    scores = torch.full_like(first, -torch.inf)
    for places in first.topk(most).indices.split(width, dim=1):  # [B, R]
        ends = lengths.gather(1, places)
        chosen = tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))
        scores.scatter_(1, places, reader.read(chosen[:, :, : int(ends.max())], ends))
    scores = scores.masked_fill(lengths == 0, -torch.inf)
    return [row[: len(of_one)] for row, of_one in zip(scores, texts, strict=True)]


def likelihoods_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logits [B, R or 1, vocabulary] of tokens [B, R] -> the tokens' log-likelihoods [B, R], float32, on the
    CPU."""
    picked = logits.expand(-1, tokens.shape[1], -1).gather(2, tokens[:, :, None].to(logits.device)).squeeze(2)
    return (picked.float() - logits.float().logsumexp(2)).cpu()


class TreeReader:
    """A causal model that can read trees: the texts of an image are branches behind one prefix.

    Args:
        embeds: [B, P, C], soft prompts and prompt.
        mask: [B, P], on the CPU: 0 where ``embeds`` is padding.
        branches, length: texts side by side, and tokens of one, at most.
    """

    def __init__(
        self, model: PreTrainedModel, embeds: Tensor, mask: Tensor, branches: int, length: int
    ) -> None:
        self.prefix = SharedPrefix(model, embeds, mask, branches, length)
        self.logits = self.prefix.logits[:, 0]
        self.branches = branches

    def read(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        count = tokens.shape[1]
        tokens = F.pad(tokens, (0, 0, 0, self.branches - count))
        scores = likelihoods_of(self.logits[:, None], tokens[:, :, 0])[:, :count]
        self.prefix.rewind()
        for place in range(1, tokens.shape[2]):
            logits = self.prefix.read(tokens[:, :, place - 1].to(self.logits.device))
            found = likelihoods_of(logits, tokens[:, :, place])[:, :count]
            scores = scores + found.masked_fill(place >= lengths, 0.0)
        return scores


class RepeatingReader:
    """Any model: each text is read with the whole prompt before it.

    Args:
        first_logits: [B, vocabulary].
        losses: from the rows of the batch and a list of token ids for each to the texts' losses.
    """

    def __init__(self, first_logits: Tensor, losses: Callable[[list[int], list[list[int]]], Tensor]) -> None:
        self.logits = first_logits
        self.losses = losses

    def read(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        rows, columns = (lengths > 0).nonzero(as_tuple=True)
        texts = [tokens[i, j, : lengths[i, j]].tolist() for i, j in zip(rows, columns, strict=True)]
        scores = torch.full(lengths.shape, -torch.inf)
        scores[rows, columns] = -self.losses(rows.tolist(), texts).float().cpu()
        return scores
