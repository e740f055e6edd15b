"""VQA accuracy against values worked out by hand from the published evaluation's rules."""

from __future__ import annotations

import pytest

from evlgen.tasks.metrics.vqa_accuracy import normalized, vqa_accuracy, without_punctuation


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # case, articles, blanks
        ("Yes", "yes"),
        ("The red  car", "red car"),
        ("an apple and a pear", "apple and pear"),
        ("A", ""),
        ("theater", "theater"),
        ("  left\n", "left"),
        ("two\nmen\tsitting", "2 men sitting"),
        ("", ""),
        # numbers
        ("none", "0"),
        ("Zero", "0"),
        ("TEN", "10"),
        ("eleven", "eleven"),
        ("one of the two", "1 of 2"),
        ("twenty-two", "twenty 2"),
        # contractions: the apostrophe that is missing; one that is there stays; those in capitals never match
        ("dont know", "don't know"),
        ("don't know", "don't know"),
        ("it wouldnt've", "it wouldn't've"),
        ("it wouldn'tve", "it wouldn't've"),
        ("Im", "im"),
        ("lets go", "lets go"),
        ("let's go", "let's go"),
        ("somebody'd", "somebodyd"),
        ("twas", "'twas"),
        ("10 oclock", "10 o'clock"),
        ("y'allll", "y'all'll"),
        # a mark alone becomes a blank, one beside a blank nothing
        ("t-shirt", "t shirt"),
        ("red/white", "red white"),
        ("red, white", "red white"),
        ("red ,white", "red white"),
        ("black&white", "black&white"),
        ("what?!", "what"),
        ("(left)", "left"),
        ("yes;", "yes"),
        # what a mark becomes is decided for all marks of its kind at once
        ("t-shirt - red", "tshirt red"),
        # a comma between digits makes every mark vanish, in other words too
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),
        ("1, 2", "1 2"),
        ("3,a", "3"),
        # stops go but for those before a digit; colons and quotes stay
        ("3.5", "3.5"),
        (".5", ".5"),
        ("5.", "5"),
        ("u.s.a.", "usa"),
        ("yes...", "yes"),
        ("no.2", "no.2"),
        ("12:30", "12:30"),
        ("dog's", "dog's"),
        ("." * 33 + "x", ".x"),
        # what is not ASCII is left alone, but for its case and blanks
        ("Éclair", "éclair"),
        ("naïve–art", "naïve–art"),
        ("日本", "日本"),
        ("red\u00a0car", "red car"),
    ],
)
def test_an_answer_is_normalised(answer, expected):
    assert normalized(answer) == expected


@pytest.mark.parametrize(
    ("same", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)]
)
def test_agreement_of_ten_people_is_the_mean_over_the_choices_of_nine(same, expected):
    """Of three: three choices leave one of them out (2/3), seven leave all in (1): (3 * 2/3 + 7) / 10."""
    assert vqa_accuracy("yes", ["yes"] * same + ["no"] * (10 - same)) == pytest.approx(expected)


def test_peoples_punctuation_is_treated_where_they_differ():
    people = ["t-shirt"] * 3 + ["shirt"] * 7
    assert vqa_accuracy("T-shirt", people) == pytest.approx(0.9)
    assert vqa_accuracy("t shirt", people) == pytest.approx(0.9)


def test_people_who_all_say_the_same_are_taken_by_the_letter():
    assert vqa_accuracy("t-shirt", ["t-shirt"] * 10) == 0
    assert vqa_accuracy("shirt", ["shirt"] * 10) == 1


def test_peoples_articles_and_number_words_are_met_by_nothing():
    people = ["the cat"] * 5 + ["two"] * 5
    assert vqa_accuracy("the cat", people) == vqa_accuracy("cat", people) == vqa_accuracy("two", people) == 0


def test_case_of_people_counts():
    assert vqa_accuracy("Yes", ["Yes"] * 5 + ["yes"] * 5) == 1
    assert vqa_accuracy("yes", ["Yes"] * 9 + ["yes"]) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("people", "expected"),
    [
        (["yes"], 1),
        (["no"], 0),
        (["yes", "yes"], 1),
        (["yes", "no"], 1 / 2),  # the one left out: 0; the other left out: 1
        (["yes", "yes", "no"], (1 / 2 + 1 / 2 + 1) / 3),
        (["yes"] * 3, 1),
        (["yes"] * 4, 1),
        (["yes"] * 3 + ["no"], (3 * (2 / 3) + 1) / 4),
        (["yes"] * 2 + ["no"] * 18, (2 * (1 / 3) + 18 * (2 / 3)) / 20),
    ],
)
def test_fewer_and_more_people_are_each_left_out_once(people, expected):
    assert vqa_accuracy("yes", people) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["two", "Yes", "the cat", "t-shirt", "none", "dont know", "A", "?"])
def test_an_answer_of_ones_own_dataset_is_right_as_it_is_written(text):
    assert vqa_accuracy(text, [text]) == vqa_accuracy(text.upper(), [text]) == 1
    assert vqa_accuracy(text, [text] * 9 + ["x", "y"]) == 1


def test_an_answer_of_nothing_but_an_article_is_not_every_such_answer():
    assert vqa_accuracy("the", ["A"]) == vqa_accuracy("", ["A"]) == vqa_accuracy(".", ["A"]) == 0
    assert vqa_accuracy("A.", ["A"]) == vqa_accuracy("(a)", ["A"]) == vqa_accuracy("A", ["A)"]) == 1


def test_nobody_to_compare_with_is_an_error():
    with pytest.raises(ValueError, match="at least one person"):
        vqa_accuracy("yes", [])


def test_marks_are_judged_by_the_text_before_any_went():
    """The comma is beside a blank that only the dash would make."""
    assert without_punctuation("a-,b") == "a  b"
