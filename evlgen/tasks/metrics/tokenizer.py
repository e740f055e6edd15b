"""Captions to tokens: by pycocoevalcap's Java program where it runs, by our own tokenizer elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

from evlgen.tasks.metrics.base import ImageId
from evlgen.tasks.metrics.java import Java, JavaFailed, find_java, pycocoevalcap_file, run_java
from evlgen.tasks.metrics.ptb_tokenizer import PUNCTUATION, one_line, tokenize_lines

logger = logging.getLogger(__name__)

TokenizerName = Literal["java", "python"]
_JAR = ("tokenizer", "stanford-corenlp-3.4.1.jar")


def tokenize_with_java(captions: Sequence[str], java: Java) -> list[str]:
    """As `ptb_tokenizer.tokenize_lines`, by the Java program that published scores use.

    Unlike pycocoevalcap's wrapper it writes no file into the installed package, fixes the encoding, and keeps
    captions apart that hold line ends of any kind.

    Raises:
        JavaFailed: the program did not give one line for each caption.
    """
    if not captions:
        return []
    text = "".join(f"{one_line(caption)}\n" for caption in captions)
    program = ("-cp", str(pycocoevalcap_file(*_JAR)), "edu.stanford.nlp.process.PTBTokenizer")
    options = ("-preserveLines", "-lowerCase", "-encoding", "UTF-8")
    answer = run_java(java, (*program, *options), timeout=120 + 0.01 * len(captions), text=text)
    lines = answer.split("\n")[: len(captions)]
    if len(lines) < len(captions):
        raise JavaFailed(f"the Java tokenizer gave {len(lines)} lines for {len(captions)} captions")
    return [_without_punctuation(line) for line in lines]


def tokenize_captions(
    references: Mapping[ImageId, Sequence[str]], candidates: Mapping[ImageId, str]
) -> tuple[dict[ImageId, list[str]], dict[ImageId, list[str]], TokenizerName]:
    """Tokens of references and candidates, both by the same tokenizer.

    Returns:
        id -> tokens of each reference, joined by blanks; id -> a list with the candidate's; the tokenizer's
        name.
    """
    reference_lines = [caption for captions in references.values() for caption in captions]
    candidate_lines = list(candidates.values())
    java = find_java()
    name: TokenizerName = "python"
    if isinstance(java, Java):
        try:
            tokens = [tokenize_with_java(lines, java) for lines in (reference_lines, candidate_lines)]
            name = "java"
        except JavaFailed as error:
            logger.warning("Captions are tokenised without Java: %s.", error)
    if name == "python":
        tokens = [tokenize_lines(lines) for lines in (reference_lines, candidate_lines)]
    rest = iter(tokens[0])
    by_image = {image: [next(rest) for _ in captions] for image, captions in references.items()}
    return by_image, {image: [line] for image, line in zip(candidates, tokens[1], strict=True)}, name


def _without_punctuation(line: str) -> str:
    return " ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATION)
