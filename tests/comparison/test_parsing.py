"""Budgets, axes, seeds and shares as the command line has them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evlgen.common.errors import ConfigError
from evlgen.comparison.parsing import Amount, Axis, parse_seeds, parse_shares, split_values


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [("120s", 120, "s"), ("2min", 120, "s"), ("2m", 120, "s"), ("1.5h", 5400, "s"), (" 500it ", 500, "it")],
)
def test_budgets(text, value, unit):
    assert Amount.parse(text, "--budget") == Amount(value, unit)


@pytest.mark.parametrize("text", ["", "120", "s", "-3s", "0s", "0it", "1.5it", "3 days", "nans", "1e3s"])
def test_what_is_no_budget_is_refused_by_name(text):
    with pytest.raises(ConfigError, match="--budget"):
        Amount.parse(text, "--budget")


def test_a_part_of_a_budget_is_whole_iterations_and_one_at_least():
    assert Amount(500, "it").share(1 / 6) == Amount(83, "it")
    assert Amount(2, "it").share(0.1) == Amount(1, "it")
    assert Amount(30, "s").share(1 / 6) == Amount(5, "s")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0,4", ("0", "4")),
        ("tomeformer,mlp", ("tomeformer", "mlp")),
        ("{name: tomeformer, r: 16},{name: mlp}", ("{name: tomeformer, r: 16}", "{name: mlp}")),
        ("[8, 2],null", ("[8, 2]", "null")),
        ('"a, b",c', ('"a, b"', "c")),
        ("{a: 'x,y'},it's", ("{a: 'x,y'}", "it's")),
        ("{a: [1, {b: 2, c: 3}]}", ("{a: [1, {b: 2, c: 3}]}",)),
    ],
)
def test_values_are_split_at_outer_commas_only(text, values):
    assert Axis.parse(f"model.connector={text}").values == values


@given(st.lists(st.recursive(st.integers(0, 9) | st.sampled_from("ab"), lambda v: st.lists(v, max_size=3))))
def test_splitting_undoes_joining(values):
    texts = [str(value).replace("'", '"') for value in values]
    assert [part.strip() for part in split_values(",".join(texts))] == (texts or [""])


@pytest.mark.parametrize("text", ["model.connector.r", "=1", "a=", "a=1,,2", "a=1,1", "a={b", "a.=1"])
def test_axes_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="--grid"):
        Axis.parse(text)


def test_values_are_called_by_what_tells_them_apart():
    axis = Axis.parse("model.connector={name: tomeformer, r: 16},{name: mlp}")
    assert [axis.label(value) for value in axis.values] == ["tomeformer, r=16", "mlp"]
    assert Axis.parse("model.connector.name=mlp,x").label("mlp") == "mlp"
    assert Axis.parse("model.connector.r=0,4").label("4") == "r=4"


def test_seeds():
    assert parse_seeds("42, 43") == [42, 43]
    for text in ("", "1,1", "a"):
        with pytest.raises(ConfigError, match="--seeds"):
            parse_seeds(text)


def test_shares_of_stages():
    assert parse_shares(None, 2) == [0.5, 0.5]
    assert parse_shares("0.75", 2) == [0.75, 0.25]
    assert parse_shares("0.5,0.25", 3) == [0.5, 0.25, 0.25]
    for text in ("1", "0", "-0.1", "0.5,0.2", "half"):
        with pytest.raises(ConfigError, match="--stage-split"):
            parse_shares(text, 2)
