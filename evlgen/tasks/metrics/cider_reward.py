"""CIDEr-D of single captions against a fixed corpus: what captions are rewarded with while a model learns.

pycocoevalcap's scorer takes document frequencies from the very captions it scores against; here they are
those of a whole corpus, counted once. With that corpus's own images, values are pycocoevalcap's.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from evlgen.common.errors import DataError
from evlgen.tasks.metrics.ptb_tokenizer import tokenize_lines

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # of the penalty on a difference in length
SCALE = 10.0  # the three as in Vedantam et al., CVPR 2015, and COCO's evaluation

Words = tuple[str, ...]


class _Vector(NamedTuple):
    """A caption's n-grams, for each n from 1: their tf-idf weights, the norm of these; and its length."""

    weights: list[dict[Words, float]]
    norms: list[float]
    length: int


class CiderReward:
    """Rewards captions by the captions that people wrote about the same images.

    Captions are cut into tokens by `ptb_tokenizer`, on both sides.

    Args:
        references: image -> what people wrote about it; the corpus of the document frequencies, in which a
            image is a document.

    Raises:
        DataError: fewer than two images, among which no word tells one from another.
    """

    def __init__(self, references: Mapping[Hashable, Sequence[str]]) -> None:
        if len(references) < 2:
            raise DataError(
                f"CIDEr needs the captions of at least two images, and there are {len(references)}: with "
                "fewer every reward is 0."
            )
        lines = iter(tokenize_lines([line for lines in references.values() for line in lines]))
        self._references = {image: [next(lines) for _ in own] for image, own in references.items()}
        counts: Counter[Words] = Counter()
        for own in self._references.values():
            counts.update({gram for line in own for gram in _ngrams(line)})
        # what is in no image counts as what is in one, so the many that are in one need no place
        self._log_frequencies = {gram: math.log(count) for gram, count in counts.items() if count > 1}
        self._log_images = math.log(len(references))

    def __contains__(self, image: Hashable) -> bool:
        return bool(self._references.get(image))

    def __call__(self, images: Sequence[Hashable], captions: Sequence[Sequence[str]]) -> list[list[float]]:
        """The CIDEr-D of each image's captions, 10 at most.

        Args:
            images: among those of the references.
            captions: for each image any number.
        """
        lines = iter(tokenize_lines([line for own in captions for line in own]))
        vector = functools.cache(self._vector)  # an image may be there twice, and samples are often alike
        rewards = []
        for image, own in zip(images, captions, strict=True):
            references = [vector(line) for line in self._references[image]]
            score = functools.cache(lambda line, of=references: self._score(vector(line), of))
            rewards.append([score(next(lines)) for _ in own])
        return rewards

    def _vector(self, line: str) -> _Vector:
        weights: list[dict[Words, float]] = [{} for _ in range(LONGEST)]
        length = 0
        for gram, count in Counter(_ngrams(line)).items():
            rarity = self._log_images - self._log_frequencies.get(gram, 0.0)
            weights[len(gram) - 1][gram] = count * rarity
            length += count * (len(gram) == 2)  # pycocoevalcap counts pairs of words
        norms = [math.sqrt(sum(weight * weight for weight in own.values())) for own in weights]
        return _Vector(weights, norms, length)

    @staticmethod
    def _score(candidate: _Vector, references: Sequence[_Vector]) -> float:
        total = sum(_similarity(candidate, reference) for reference in references)
        return SCALE * total / len(references)


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    """Mean over n of the cosine of the n-grams' weights, those of the candidate clipped to the reference's,
    with a penalty on the difference in length: Vedantam et al., CVPR 2015, section 8 ("CIDEr-D")."""
    total = 0.0
    for own, theirs, norm, other_norm in zip(
        candidate.weights, reference.weights, candidate.norms, reference.norms, strict=True
    ):
        if norm and other_norm:
            shared = (
                min(weight, theirs[gram]) * theirs[gram] for gram, weight in own.items() if gram in theirs
            )
            total += sum(shared) / (norm * other_norm)
    difference = candidate.length - reference.length
    return total / LONGEST * math.exp(-(difference**2) / (2 * SIGMA**2))


def _ngrams(line: str) -> list[Words]:
    """All runs of 1 to 4 tokens in a line of tokens, with repetitions."""
    words = line.split()
    return [tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1)]
