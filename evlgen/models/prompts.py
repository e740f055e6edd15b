"""Prompts with slots: questions, their choices, and words read in the image.

The formats are those of LAVIS (`blip2_vicuna_instruct`): ``Question: {} Short answer:``; with choices
``Question: {} Options: {}. Short answer:``, where the second slot becomes ``(a) red (b) blue``; with words
read in the image ``OCR tokens: {}. Question: {} Short answer:``, where the first slot takes them.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Sequence, Sized

from evlgen.batch import Batch
from evlgen.common.errors import ConfigError, DataError

SLOT = "{}"
MOST_OCR_TOKENS = 30  # as published


def texts_to_learn(samples: Batch) -> list[str]:
    """The texts of a batch. Raises `DataError` where it has none."""
    if "text_input" not in samples:
        raise DataError(
            "these samples have no text to learn (text_input). Splits other than train are mostly read for "
            "scoring, without texts: see run.train_splits. To learn a file of theirs, name it as the "
            "annotations of train (datasets.NAME.build_info.annotations.train.storage)."
        )
    return samples["text_input"]


def ask(prompt: str, samples: Batch, count: int) -> list[str]:
    """The prompts of a batch of questions.

    Args:
        prompt: a text with one slot for the question, or two; empty for the bare questions.
        samples: ``text_input``, one question or ``count`` of them; ``ocr_tokens`` or ``choices`` where the
            prompt has two slots (``ocr_tokens`` where there are both), a list of strings for each sample.
        count: the number of samples.

    Raises:
        ConfigError: another number of questions than samples; a prompt of another number of slots, or two
            slots and nothing for the second.
    """
    questions = samples["text_input"]
    questions = [questions] * count if isinstance(questions, str) else list(questions)
    check_count(questions, count, "questions (text_input)")
    if not prompt:
        return questions
    check_slots(prompt)
    slots = prompt.count(SLOT)
    if slots == 1:
        return [_fill(prompt, question) for question in questions]
    if slots == 2 and "ocr_tokens" in samples:
        read = zip(samples["ocr_tokens"], questions, strict=True)
        return [_fill(prompt, _joined(words), question) for words, question in read]
    if slots == 2 and "choices" in samples:
        pairs = zip(questions, samples["choices"], strict=True)
        return [_fill(prompt, question, _lettered(choices)) for question, choices in pairs]
    raise ConfigError(
        f"the prompt {prompt!r} (run.prompt) has two slots, for a question and its choices or OCR tokens, "
        "and the samples have neither."
    )


def check_slots(prompt: str) -> None:
    """Raises `ConfigError` for the prompt of a question that has no slot for it, or more than two."""
    slots = prompt.count(SLOT)
    if prompt and slots not in (1, 2):
        raise ConfigError(
            f"the prompt {prompt!r} (run.prompt) has {slots} slots {SLOT}: it takes one for the question, "
            "and at most one more."
        )


def fill_ocr_slots(prompts: Sequence[str], samples: Batch) -> list[str]:
    """Prompts to continue, their slot filled with the words read in the image, where samples have them."""
    if "ocr_tokens" not in samples:
        return list(prompts)
    pairs = zip(prompts, samples["ocr_tokens"], strict=True)
    return [_fill(prompt, _joined(words)) if SLOT in prompt else prompt for prompt, words in pairs]


def check_count(texts: Sized, count: int, what: str) -> None:
    """Raises `ConfigError` unless there is one text for each sample."""
    if len(texts) != count:
        raise ConfigError(f"{len(texts)} {what} for {count} images: give one for all, or one for each.")


def _fill(prompt: str, *values: str) -> str:
    """Slots replaced one after the other: whatever else stands in braces is text."""
    pieces = prompt.split(SLOT)
    return "".join(itertools.chain.from_iterable(itertools.zip_longest(pieces, values, fillvalue="")))


def _joined(words: Sequence[str]) -> str:
    return ", ".join(words[:MOST_OCR_TOKENS])


def _lettered(choices: Sequence[str]) -> str:
    return " ".join(f"({letter}) {choice}" for letter, choice in zip(_letters(), choices, strict=False))


def _letters() -> Iterator[str]:
    """a, b, .. z, aa, ab, .."""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_lowercase, repeat=length))
