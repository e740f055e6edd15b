"""Questions about images of the Shapes world, balanced so that whoever has not seen the image can only
guess.

What is asked is what `captions.questions` asks, which the bundled language model has read answers to, in
more than one wording. A kind of question is drawn first, each as likely as the next, then a scene in which it
can be asked. Within a kind every answer is as likely as the next: colours, shapes, sizes and places are so by
the way scenes are drawn, yes and no come in pairs, and numbers are drawn before the scene.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass
from functools import lru_cache

from evlgen.datasets.shapes.captions import NUMBERS
from evlgen.datasets.shapes.captions import questions as questions_about
from evlgen.datasets.shapes.world import COLOURS, COLUMNS, KINDS, ROWS, SIZES, Scene, scene

# Kind -> how `captions.questions` words it, and the wordings that are asked, of the same groups.
_WORDINGS = {
    "number": (r"how many (.+) are there\?", ("how many {} are there?", "how many {} are in the picture?")),
    "colour": (
        r"what colour is the (\w+)\?",
        ("what colour is the {}?", "what is the colour of the {}?", "what colour does the {} have?"),
    ),
    "shape": (r"what shape is (\w+)\?", ("what shape is {}?", "what is the shape that is {}?")),
    "size": (r"is the (\w+) large or small\?", ("is the {} large or small?", "is the {} small or large?")),
    "place": (r"where is the (\w+)\?", ("where is the {}?", "where is the {} in the picture?")),
    "presence": (r"is there (an? .+)\?", ("is there {}?", "is there {} in the picture?")),
    "relation": (r"is the (\w+) (.+) the (\w+)\?", ("is the {} {} the {}?",)),
}
QUESTION_KINDS = tuple(_WORDINGS)
_PLACES = (
    "in the middle",
    *(f"{row} {column}" for row in ROWS for column in COLUMNS if "middle" not in (row, column)),
)
ANSWERS = (
    *NUMBERS.values(),
    *COLOURS,
    *KINDS,
    *SIZES,
    *_PLACES,
    *("top", "bottom", "left", "right"),
    "yes",
    "no",
)
_PARTS_COUNTED = ("one", "two")  # three of a kind or colour are too rare
_STRIDE = 8  # scenes between the first two that questions with neighbouring numbers look at


@dataclass(frozen=True)
class Question:
    """A question, its one right answer, the kind of question and the scene it is about."""

    text: str
    answer: str
    kind: str
    scene: Scene


@lru_cache(maxsize=16)  # a sample's image and its question ask for the same one in turn
def question(split: str, index: int, seed: int = 0) -> Question:
    """The question number ``index`` of a split, about a scene of that split.

    Raises:
        DataError: there is no such split, or the index is negative.
    """
    rng = random.Random(f"vqa/{seed}/{split}/{index}")
    kind = rng.choice(QUESTION_KINDS)
    of_all = rng.random() < 0.5
    number = rng.choice(tuple(NUMBERS.values()) if of_all else _PARTS_COUNTED)
    scenes = (scene(split, i, seed) for i in itertools.count(index * _STRIDE))
    here, asked = next((s, found) for s in scenes if (found := _asked(s, kind, of_all, number)))
    words, answer = rng.choice(asked)
    return Question(rng.choice(_WORDINGS[kind][1]).format(*words), answer, kind, here)


def _asked(here: Scene, kind: str, of_all: bool, number: str) -> list[tuple[tuple[str, ...], str]]:
    """The questions of a kind about a scene: what fills their wordings, and their answers. Of numbers only
    those with the answer ``number``, about all shapes or about some."""
    pairs = [(re.fullmatch(_WORDINGS[kind][0], text), answer) for text, answer in questions_about(here)]
    found = [(match.groups(), answer) for match, answer in pairs if match]
    if kind != "number":
        return found
    return [
        (words, answer) for words, answer in found if (words == ("shapes",)) == of_all and answer == number
    ]
