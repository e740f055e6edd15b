"""Of several texts about an image the one that is most like the others.

The likeliest text is often one that few others are like: a detail that was guessed costs it little. What
many samples agree on is there more often. It is the choice of least expected loss (minimum Bayes risk: Kumar
and Byrne, NAACL 2004; by a model's own samples: Eikema and Aziz, EMNLP 2022), and likeness is by n-grams, as
captions are scored (consensus captions: Devlin et al., 2015).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

LONGEST = 4  # tokens of an n-gram, as of BLEU's and CIDEr's
#: What the texts are sampled with: nearer to the likeliest than the model's own distribution.
SAMPLING: dict[str, Any] = {"use_nucleus_sampling": True, "evenly": True, "temperature": 0.7, "top_p": 0.9}


def most_alike(texts: Sequence[Sequence[int]]) -> list[int]:
    """The places of texts, given as tokens, by how much each is like the others, the most alike first; of
    equals the first."""
    grams = [[_ngrams(text, n) for n in range(1, LONGEST + 1)] for text in texts]
    likeness = [0.0] * len(texts)
    for place, own in enumerate(grams):
        for other in range(place):
            found = _likeness(own, grams[other])
            likeness[place] += found
            likeness[other] += found
    return sorted(range(len(texts)), key=lambda place: -likeness[place])


def _likeness(one: Sequence[Counter], other: Sequence[Counter]) -> float:
    """The F-score of the n-grams that two texts share, summed over n."""
    total = 0.0
    for a, b in zip(one, other, strict=True):
        count = a.total() + b.total()
        total += 2 * (a & b).total() / count if count else 0.0
    return total


def _ngrams(text: Sequence[int], n: int) -> Counter:
    return Counter(tuple(text[start : start + n]) for start in range(len(text) - n + 1))
