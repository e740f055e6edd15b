"""Answers without looking: what the questions of a dataset give away.

A model that answers questions about images has to be well above these; see Agrawal et al., "Don't Just
Assume; Look and Answer", CVPR 2018 (arXiv:1712.00377).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeAlias, TypeVar

Id = TypeVar("Id")
Rule: TypeAlias = Callable[[str], Hashable]

# what a question is looked up by, from the most to the least; the last fits every question
_RULES: dict[str, Rule] = {
    "the same question": lambda question: _words(question),
    "the first two words": lambda question: _words(question)[:2],
    "any question": lambda question: (),
}


def blind_answers(
    learned: Iterable[tuple[str, Sequence[str]]], asked: Mapping[Id, str]
) -> dict[str, dict[Id, str]]:
    """The most frequent training answer to the same question, to questions with the same first two words,
    and to any question: by these names, the answer to each question asked. A question that was not seen in
    training is answered by its first two words, and those by any question; of equally frequent answers the
    first one seen is taken.

    Args:
        learned: training questions, each with its answers; at least one.
        asked: the questions, by their ids.
    """
    counts: dict[str, dict[Hashable, Counter[str]]] = {name: defaultdict(Counter) for name in _RULES}
    for question, answers in learned:
        for name, rule in _RULES.items():
            counts[name][rule(question)].update(answers)
    best = {
        name: {key: max(found, key=found.__getitem__) for key, found in keys.items() if found}
        for name, keys in counts.items()
    }
    names = list(_RULES)
    return {
        name: {key: _first(best, names[start:], question) for key, question in asked.items()}
        for start, name in enumerate(names)
    }


def _first(best: Mapping[str, Mapping[Hashable, str]], names: Sequence[str], question: str) -> str:
    known = (best[name].get(_RULES[name](question)) for name in names)
    return next(answer for answer in known if answer is not None)


def _words(question: str) -> tuple[str, ...]:
    return tuple(question.lower().rstrip(" ?").split())
