"""The reward is the CIDEr-D that COCO's evaluation computes, with document frequencies of a corpus."""

from __future__ import annotations

import json
import math

import pytest
from pycocoevalcap.cider.cider import Cider

from evlgen.common.errors import DataError
from evlgen.tasks.metrics.cider_reward import CiderReward
from evlgen.tasks.metrics.ptb_tokenizer import tokenize_lines

REFERENCES = {
    1: ["A dog runs.", "a brown dog runs on the grass", "the dog, running"],
    "two": ["a cat sits on a mat", "a cat"],
    3: ["two dogs and a cat on the grass don't run"],
    4: ["grass"],
}
CAPTIONS = {
    1: "a dog runs runs runs on the grass",
    "two": "a cat sits on a mat",
    3: "",
    4: "nothing of all that; and far, far longer than what the only person said who wrote about it",
}


def official(references, captions):
    """Value of each image's caption, by pycocoevalcap."""
    tokens = {image: tokenize_lines(lines) for image, lines in references.items()}
    candidates = {image: tokenize_lines([captions[image]]) for image in references}
    return Cider().compute_score(tokens, candidates)[1].tolist()


def test_values_are_the_official_ones_for_captions_made_by_hand():
    values = CiderReward(REFERENCES)(list(CAPTIONS), [[caption] for caption in CAPTIONS.values()])
    expected = official(REFERENCES, CAPTIONS)
    assert [value for (value,) in values] == pytest.approx(expected, abs=1e-6)
    assert values[0][0] > 0 and values[1][0] > 3 and values[2] == values[3] == [0.0]


def test_values_are_the_official_ones_for_people_judged_by_people(shared):
    file = shared / "data" / "lavis_cache" / "coco" / "annotations" / "coco_karpathy_train.json"
    references: dict[str, list[str]] = {}
    for record in json.loads(file.read_text()):
        references.setdefault(record["image"], []).append(record["caption"])
    captions = {image: lines[-1] for image, lines in references.items()}
    others = {image: lines[:-1] for image, lines in references.items()}
    shifted = dict(zip(captions, [*list(captions.values())[1:], *captions.values()], strict=False))
    reward = CiderReward(others)
    for written in (captions, shifted):
        values = reward(list(written), [[caption] for caption in written.values()])
        assert [value for (value,) in values] == pytest.approx(official(others, written), abs=1e-6)


def test_a_value_worked_out_by_hand():
    # "blue" and "blue sky" are in one of two images and weigh log 2; "sky", in both, weighs nothing. The
    # cosines are 1 for words and pairs, of four; "blue" alone has no pair, and is one pair too short.
    reward = CiderReward({"a": ["blue sky"], "b": ["grey sky"]})
    assert reward(["a"], [["blue sky", "blue", "grey sky", "sky"]]) == [
        [
            pytest.approx(10 * 2 / 4),
            pytest.approx(10 / 4 * math.exp(-1 / 72)),
            0.0,
            0.0,
        ]
    ]


def test_document_frequencies_are_of_all_images_whichever_are_rewarded():
    reward = CiderReward(REFERENCES)
    alone = reward([1], [["a dog runs", "the dog, running"]])
    among = reward([3, 1, 4], [["a"], ["a dog runs", "the dog, running"], []])
    assert among[1] == alone[0] and among[2] == []
    assert alone[0] != CiderReward({1: REFERENCES[1], 4: REFERENCES[4]})([1], [["a dog runs", "dog"]])[0]


class Counting(CiderReward):
    """Notes the lines whose vectors it computes."""

    def _vector(self, line):
        self.__dict__.setdefault("lines", []).append(line)
        return super()._vector(line)


def test_no_vector_is_computed_twice_for_a_batch():
    images = [1, 3, 1]
    captions = [["a dog", "a dog", "a brown dog"], ["two dogs", "a dog"], ["a brown dog", "two dogs"]]
    reward = Counting(REFERENCES)
    values = reward(images, captions)
    assert sorted(reward.lines) == sorted({*reward.lines}) and len(reward.lines) == 3 + 1 + 3
    pairs = zip(images, captions, strict=True)
    assert values == [[CiderReward(REFERENCES)([i], [[text]])[0][0] for text in own] for i, own in pairs]


def test_it_says_which_images_it_can_judge():
    reward = CiderReward({**REFERENCES, 5: []})
    assert 1 in reward and "two" in reward and 5 not in reward and 6 not in reward


@pytest.mark.parametrize("references", [{}, {1: ["a dog"]}])
def test_a_corpus_in_which_nothing_tells_images_apart_is_refused(references):
    with pytest.raises(DataError, match=f"at least two images, and there are {len(references)}"):
        CiderReward(references)
