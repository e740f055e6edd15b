"""Annotations as a YAML schema."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from evlgen.common.errors import ConfigError
from evlgen.config.schema import (
    REQUIRED,
    AtLeast,
    AtMost,
    Fraction,
    MoreThan,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Registered,
    build_dataclass,
    check_section,
    describe,
    parameters_of,
)

if TYPE_CHECKING:
    from decimal import Decimal


class Merger:
    """A part such as a plugin would write."""

    def __init__(
        self,
        width: int,
        num_layers: PositiveInt = 12,
        r: NonNegativeInt | list[NonNegativeInt] = 19,
        init: str | None = None,
        dropout: Fraction = 0.1,
        mode: Literal["mean", "sum", 2] = "mean",
        scale: tuple[float, float] = (0.5, 1.0),
        normalise: bool = True,
    ) -> None:
        pass


def check(**section: Any) -> dict[str, Any]:
    return check_section(section, Merger, "model.connector", ignore=("width",))


def message(**section: Any) -> str:
    with pytest.raises(ConfigError) as error:
        check(**section)
    return str(error.value)


def test_right_values_come_back_as_they_are():
    section = {
        "num_layers": 3,
        "r": [8, 2],
        "init": None,
        "mode": "sum",
        "scale": [0.1, 1.0],
        "normalise": False,
    }
    assert check(**section) == section


def test_defaults_are_not_filled_in():
    assert check(num_layers=3) == {"num_layers": 3}


def test_none_is_an_empty_section():
    assert check_section(None, Merger, ignore=("width",)) == {}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"num_layers": "12"}, "model.connector.num_layers: must be int, not '12'."),
        ({"num_layers": 2.0}, "model.connector.num_layers: must be int, not 2.0."),
        ({"num_layers": True}, "model.connector.num_layers: must be int, not true."),
        ({"num_layers": 0}, "model.connector.num_layers: must be at least 1, not 0."),
        ({"num_layers": None}, "model.connector.num_layers: must be int, not null."),
        ({"r": -1}, "model.connector.r: must be at least 0, not -1."),
        ({"r": [8, -2]}, "model.connector.r[1]: must be at least 0, not -2."),
        ({"r": "all"}, "model.connector.r: must be int (at least 0) or list of int (at least 0), not 'all'."),
        ({"init": 3}, "model.connector.init: must be str or null, not 3."),
        ({"dropout": 1.5}, "model.connector.dropout: must be at most 1, not 1.5."),
        ({"dropout": float("nan")}, "model.connector.dropout: must be float, not nan."),
        ({"mode": "meen"}, "must be 'mean', 'sum' or 2, not 'meen'. Did you mean 'mean'?"),
        ({"mode": 2.0}, "must be 'mean', 'sum' or 2, not 2.0."),
        ({"scale": [0.1]}, "model.connector.scale: must be [float, float], not [0.1]."),
        ({"scale": 0.1}, "model.connector.scale: must be [float, float], not 0.1."),
        ({"normalise": 1}, "model.connector.normalise: must be bool, not 1."),
    ],
)
def test_wrong_values_are_named(section, expected):
    assert message(**section).endswith(expected)


def test_unknown_key_names_the_nearest_and_all_that_are_allowed():
    text = message(num_layer=3)
    assert "model.connector.num_layer: there is no such key. Did you mean 'num_layers'?" in text
    assert "Allowed: dropout, init, mode, normalise, num_layers, r, scale" in text


def test_what_the_framework_hands_in_is_no_key():
    assert "model.connector.width: there is no such key" in message(width=3)


def test_missing_required_key_is_named():
    with pytest.raises(ConfigError, match=r"part\.width: is required: int"):
        check_section({}, Merger, "part")


def test_all_problems_are_shown_at_once():
    text = message(num_layers=0, dropout=2, nonsense=1)
    assert text.startswith("3 problems in the configuration:")
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:]] == [
        "model.connector.num_layers",
        "model.connector.dropout",
        "model.connector.nonsense",
    ]


def test_problem_names_the_file_the_key_came_from():
    with pytest.raises(ConfigError, match=r"^part\.r \(file of part\.r\): must be at least 0, not -1\.$"):
        check_section({"r": -1}, Merger, "part", source=lambda path: f"file of {path}", ignore=("width",))


def test_a_section_that_is_no_mapping_is_named():
    with pytest.raises(ConfigError, match=r"part: must be a mapping of keys to values, not 3"):
        check_section(3, Merger, "part")


def takes_floats(rate: float = 0.1, either: float | str = 1.0, many: Sequence[float] = ()) -> None:
    pass


@pytest.mark.parametrize(
    ("given", "number"), [(3, 3.0), ("1e-4", 1e-4), ("-2.5", -2.5), (".5", 0.5), (1e-3, 1e-3)]
)
def test_numbers_and_yaml_1_1_exponents_are_floats(given, number):
    value = check_section({"rate": given}, takes_floats)["rate"]
    assert value == number and type(value) is float


@pytest.mark.parametrize("given", ["fast", "nan", "inf", "", True, None, [1.0], "1e999"])
def test_what_is_no_finite_number_is_no_float(given):
    with pytest.raises(ConfigError, match="rate: must be float"):
        check_section({"rate": given}, takes_floats)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_float_survives_as_number_and_as_text(number):
    assert check_section({"rate": number}, takes_floats) == {"rate": number}
    assert check_section({"rate": repr(number)}, takes_floats) == {"rate": number}


def test_text_that_could_be_a_number_stays_text_where_text_is_allowed():
    assert check_section({"either": "1e-4"}, takes_floats) == {"either": "1e-4"}


def test_items_of_a_list_are_converted():
    assert check_section({"many": ["1e-4", 2]}, takes_floats) == {"many": [1e-4, 2.0]}


def test_text_given_without_quotes_gets_the_remedy():
    def target(name: str) -> None: ...

    with pytest.raises(ConfigError, match="name: must be str, not false; put it in quotes"):
        check_section({"name": False}, target)


def open_target(known: int = 1, *args: int, **kwargs: Any) -> None:
    pass


def test_keyword_arguments_allow_any_key_and_known_ones_are_still_checked():
    assert check_section({"other": object}, open_target) == {"other": object}
    with pytest.raises(ConfigError, match="known: must be int"):
        check_section({"other": 1, "known": "x"}, open_target)


def test_a_key_that_is_no_text_is_named():
    with pytest.raises(ConfigError, match="True: there is no such key"):
        check_section({True: 1}, open_target)


def test_parameters_know_annotation_and_default():
    parameters = parameters_of(Merger)
    assert list(parameters)[:2] == ["width", "num_layers"]
    assert parameters["width"].default is REQUIRED
    assert parameters["num_layers"].default == 12
    assert not parameters.any_key and parameters_of(open_target).any_key


def test_a_class_without_a_constructor_has_no_parameters():
    class Empty:
        pass

    assert parameters_of(Empty) == {}


def half_annotated(amount: Decimal, count: int = 1, anything=None) -> None:  # noqa: F821
    pass


def test_an_annotation_that_cannot_be_evaluated_is_not_checked_but_the_others_are():
    assert check_section({"amount": [1], "anything": 2}, half_annotated) == {"amount": [1], "anything": 2}
    with pytest.raises(ConfigError, match="count: must be int"):
        check_section({"amount": 1, "count": "x"}, half_annotated)


@dataclasses.dataclass
class Inner:
    size: PositiveInt
    kwargs: dict[str, PositiveFloat] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Outer:
    inner: Inner = dataclasses.field(default_factory=lambda: Inner(3))
    other: Inner | None = None
    names: list[str] = dataclasses.field(default_factory=list)
    word: str = ""


def test_dataclass_is_built_with_nested_ones_and_defaults():
    built = build_dataclass(Outer, {"other": {"size": 2, "kwargs": {"a": "1e-4"}}})
    assert built == Outer(Inner(3), Inner(2, {"a": 1e-4}), [])


def test_dataclass_is_built_from_omegaconf():
    built = build_dataclass(
        Outer, OmegaConf.create({"inner": {"size": 2}, "word": "b", "names": ["a", "${word}"]})
    )
    assert built == Outer(Inner(2), None, ["a", "b"], "b")
    assert type(built.names) is list


def test_problems_inside_nested_dataclasses_have_the_whole_path():
    with pytest.raises(ConfigError) as error:
        build_dataclass(Outer, {"inner": {"sise": 1, "kwargs": {"a": 0}}}, "top")
    text = str(error.value)
    assert "top.inner.sise: there is no such key. Did you mean 'size'?" in text
    assert "top.inner.kwargs.a: must be more than 0, not 0" in text
    assert "top.inner.size: is required: int (at least 1)" in text


def test_problems_inside_an_optional_dataclass_are_those_of_the_dataclass():
    with pytest.raises(ConfigError, match=r"other\.size: must be at least 1, not 0"):
        build_dataclass(Outer, {"other": {"size": 0}})


def named(scheduler: Annotated[str, Registered("lr_scheduler")] = "x") -> None:
    pass


def test_registered_name_is_looked_up():
    assert check_section({"scheduler": "constant_lr"}, named) == {"scheduler": "constant_lr"}
    with pytest.raises(
        ConfigError, match="no lr_scheduler is registered as 'constan_lr'. Did you mean 'constant_lr'"
    ):
        check_section({"scheduler": "constan_lr"}, named)


def test_bounds_meet_their_limits():
    assert AtLeast(1).problem(1) is None and AtLeast(1).problem(0) is not None
    assert AtMost(1).problem(1) is None and AtMost(1).problem(1.1) is not None
    assert MoreThan(0).problem(0) is not None and MoreThan(0).problem(1e-9) is None


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int | None, "int or null"),
        (Fraction, "float (at least 0, at most 1)"),
        (list[int] | dict[str, int] | bool, "list of int, mapping or bool"),
        (Annotated[str, Registered("task")], "a registered task"),
        (list, "list"),
        (Inner, "mapping"),
    ],
)
def test_annotations_are_described_in_words(annotation, words):
    assert describe(annotation) == words
