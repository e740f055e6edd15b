"""The pure-Python tokenizer against the Java program that published caption scores use.

``golden/ptb_tokens.json`` holds what pycocoevalcap's PTBTokenizer made of COCO captions, of a table of tricky
text and of invented captions, so the comparison runs without Java. Where Java is, it is asked again.
"""

from __future__ import annotations

import json
import random
import tarfile
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evlgen.tasks.metrics.java import Java, find_java
from evlgen.tasks.metrics.ptb_tokenizer import PUNCTUATION, tokenize_lines
from evlgen.tasks.metrics.tokenizer import tokenize_captions, tokenize_with_java


@pytest.fixture(scope="module")
def java(with_java) -> Java:
    found = find_java()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="module")
def java_tokens(golden) -> dict[str, list[tuple[str, str]]]:
    return json.loads((golden / "ptb_tokens.json").read_text(encoding="utf-8"))


def differences(captions, expected, found):
    return [row for row in zip(captions, expected, found, strict=True) if row[1] != row[2]]


def captions_in(value):
    """Every caption, question and answer of a JSON file, whatever its layout."""
    if isinstance(value, dict):
        for key, part in value.items():
            texts = [part] if isinstance(part, str) else part if isinstance(part, list) else []
            if key in ("caption", "captions", "question", "answer", "text"):
                yield from (text for text in texts if isinstance(text, str))
            yield from captions_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from captions_in(part)


def shared_captions(folder) -> list[str]:
    captions = []
    for path in sorted(folder.rglob("*.json")):
        captions += captions_in(json.loads(path.read_text(encoding="utf-8")))
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as shard:
            members = [member for member in shard if member.name.endswith(".json")]
            captions += captions_in([json.load(shard.extractfile(member)) for member in members])
    return list(dict.fromkeys(captions))


@pytest.mark.parametrize("table", ["coco", "tricky", "invented"])
def test_tokens_equal_those_of_java(java_tokens, table):
    captions, expected = zip(*java_tokens[table], strict=True)
    assert len(captions) >= 50
    assert differences(captions, expected, tokenize_lines(captions)) == []


def test_tokens_equal_those_of_java_on_all_shared_captions(shared, java):
    captions = shared_captions(shared / "data" / "lavis_cache")
    assert len(captions) > 100
    assert differences(captions, tokenize_with_java(captions, java), tokenize_lines(captions)) == []


def test_tokens_equal_those_of_java_on_recombined_captions(java_tokens, java):
    """Halves of captions put together at random: sentences nobody looked at when the rules were written."""
    generator = random.Random(0)
    words = [caption.split() for caption, _ in java_tokens["coco"] + java_tokens["invented"]]
    captions = []
    for _ in range(2000):
        first, second = generator.choice(words), generator.choice(words)
        captions.append(" ".join(first[: generator.randint(0, 9)] + second[generator.randint(0, 9) :]))
    assert differences(captions, tokenize_with_java(captions, java), tokenize_lines(captions)) == []


def test_java_is_asked_in_utf8_whatever_the_locale(java, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    captions = [
        "A Café, “naïve” don’t",
        "Two\nlines\u2028and\rmore\x85still one caption",
        "",
        "\n",
        "dog \U0001f600",
    ]
    expected = ["a café naïve do n't", "two lines and more still one caption", "", "", "dog"]
    assert tokenize_with_java(captions, java) == expected
    assert tokenize_lines(captions) == expected


def test_punctuation_is_the_list_of_pycocoevalcap():
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    assert frozenset(PUNCTUATIONS) == PUNCTUATION


def test_captions_stay_apart_and_with_their_images(monkeypatch):
    references = {7: ["One dog.", "Two\ndogs"], "b": [""]}
    candidates = {7: "a dog's life", "b": "\n"}
    expected = {7: ["one dog", "two dogs"], "b": [""]}, {7: ["a dog 's life"], "b": [""]}
    assert tokenize_captions(references, candidates)[:2] == expected
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert tokenize_captions(references, candidates) == (*expected, "python")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=6))
def test_any_text_gives_one_line_of_tokens_per_caption(captions):
    lines = tokenize_lines(captions)
    assert len(lines) == len(captions)
    assert not any(token in PUNCTUATION or "\n" in token for line in lines for token in line.split(" "))


@pytest.mark.parametrize(
    "unit", ["a-", "a.", "a,", "a'", "a@", "<a ", "12 ", "1,", "a", "o'a-", "'", "A. ", "("]
)
def test_a_degenerate_caption_does_not_hang(unit):
    """No speed is measured: an expression that tries every way to part such a text would take hours."""
    start = time.process_time()
    tokenize_lines([unit * 1000])
    assert time.process_time() - start < 60
