"""The accuracy of answers as the VQA challenge computes it, to the letter where ten people answered.

Antol et al., *VQA: Visual Question Answering*, ICCV 2015; the rules are those of the published evaluation
(github.com/GT-Vision-Lab/VQA, ``PythonEvaluationTools/vqaEvaluation/vqaEval.py``), its slips included, since
every published number has them:

- What a model answers is normalised: punctuation, number words, articles, contractions. What people answered
  has its punctuation treated alone, and that only where they do not all say the same; so *the cat* or *two*
  among people's answers is met by nothing.
- A mark of punctuation becomes a blank; but nothing where a blank stands beside such a mark, and all marks
  become nothing where a comma stands between digits.
- Full stops go, but for those before a digit; 32 of them at most.
- *none* becomes *0*, as *zero* does.

VQAv2 and OK-VQA have ten answers to every question. With another number they are of a dataset of one's own,
which no published number is of: people's answers are then normalised as the model's is, so that who answers
*Two* where *two* is right is right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBER_WORDS = {
    "none": "0",
    **{
        word: str(number)
        for number, word in enumerate(
            ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
        )
    },
}
ARTICLES = frozenset({"a", "an", "the"})
PEOPLE = 10  # who answered each question of the challenge
MOST_STOPS = 32  # the published code gives flags (re.UNICODE, 32) where `sub` takes a count

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_STOP = re.compile(r"\.(?!\d)")

# A word -> the word with the apostrophes that it lacks. The list has words in capitals besides, which nothing
# that was made lower case before can meet.
_FULL_FORMS = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock
    oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
    something'd something'll that's there'd there're there's they'd they'll they're they've wasn't we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've
    why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_TWO_PLACES = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've
"""


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _FULL_FORMS.split()}
    for word in _TWO_PLACES.split():
        start, middle, end = word.split("'")
        table[f"{start}{middle}'{end}"] = table[f"{start}'{middle}{end}"] = word
    return {
        **table,
        **{"twas": "'twas", "somebody'd": "somebodyd"},
        **dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at"),
        **dict.fromkeys(("yall'll", "y'allll"), "y'all'll"),
        **dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've"),
    }


CONTRACTIONS = _contractions()


def without_punctuation(text: str) -> str:
    """What is done to people's answers too."""
    out = text
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        closes_up = in_number or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if closes_up else " ")
    return _STOP.sub("", out, count=MOST_STOPS)


def normalized(answer: str) -> str:
    """A model's answer as it is compared: lower case, number words up to ten as digits, no articles, the
    apostrophes of contractions in their places."""
    text = without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
    words = [NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def likened(answer: str) -> str:
    """As `normalized`; but an answer of nothing but articles keeps them (*A.* is *a*), and one of nothing but
    punctuation is itself."""
    plain = answer.strip().lower()
    return normalized(answer) or without_punctuation(plain).strip() or plain


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """How far people agree with an answer, from 0 to 1: min(1, n / 3) where n of nine people gave the same
    answer, the mean over the ten choices of nine from ten.

    With fewer or more than ten people likewise, each left out once, and answers compared as `likened`; with
    three people or fewer all the others are enough for 1, and of one person the answer itself.

    Raises:
        ValueError: nobody answered.
    """
    if not truths:
        raise ValueError("an answer is compared with at least one person's")
    if len(truths) != PEOPLE:
        answer, truths = likened(answer), [likened(truth) for truth in truths]
    else:
        answer = normalized(answer)
        truths = [without_punctuation(t) for t in truths] if len(set(truths)) > 1 else truths
    same = sum(truth == answer for truth in truths)
    others = len(truths) - 1
    if not others:
        return float(same)
    enough = min(3, others)
    left_out_is_same = min(1.0, (same - 1) / enough) if same else 0.0
    left_out_is_other = min(1.0, same / enough)
    return (same * left_out_is_same + (len(truths) - same) * left_out_is_other) / len(truths)
