"""``${..}`` in a configuration: other keys are found, everything else is refused."""

from __future__ import annotations

import pytest

from evlgen.common.errors import ConfigError
from evlgen.config.config import load_model_file
from evlgen.config.layers import Layer, Layers


def merged(**content) -> dict:
    return Layers([Layer("file.yaml", content)]).merged()


def test_a_reference_is_the_value_of_another_key():
    found = merged(
        run={
            "seed": 7,
            "lr": "${run.seed}",
            "name": "s${run.seed}_${.lr}",
            "copy": "${.sizes}",
            "sizes": [1, 2],
        },
        model={"first": "${run.sizes[1]}", "through": "${run.copy.0}", "vision": {"up": "${..first}"}},
    )
    assert found["run"] == {"seed": 7, "lr": 7, "name": "s7_7", "copy": [1, 2], "sizes": [1, 2]}
    assert found["model"] == {"first": 2, "through": 1, "vision": {"up": 2}}


def test_a_stronger_layer_changes_what_is_referred_to():
    layers = Layers([Layer("a", {"run": {"x": 1, "y": "${run.x}"}}), Layer("b", {"run": {"x": 2}})])
    assert layers.get("run.y") == layers.merged()["run"]["y"] == 2
    assert layers.get("run.z") is None


BOMB = {f"k{i}": f"${{run.k{i + 1}}}" * 16 for i in range(19)} | {"k19": "0123456789"}
TREE = {f"k{i}": [f"${{run.k{i + 1}}}"] * 16 for i in range(19)} | {"k19": 0}


@pytest.mark.parametrize(
    ("run", "problem"),
    [
        ({"a": "${run.b}"}, r"run\.a \(file\.yaml\): \${run\.b} names no key"),
        ({"a": "${run.a}"}, "refers to itself"),
        ({"a": {"b": "${run.a}"}}, "refers to itself"),
        ({"a": "${run.b}", "b": "${run.a}"}, "refers to itself"),
        ({f"k{i}": f"${{run.k{i + 1}}}" for i in range(30)} | {"k30": 1}, "or on and on"),
        (BOMB, "too large"),
        (TREE, "too large"),
        ({"a": "${oc.env:HOME}"}, r"\${oc\.env:HOME} is refused"),
        ({"a": "x${oc.decode:${oc.env:HOME}}"}, "is refused"),
        ({"a": "${run.${run.b}}", "b": "b"}, "is refused"),
        ({"a": "${"}, "is refused"),
        ({"a": "\\${run.b}", "b": "${run.c}", "c": "${oc.create:{a: 1}}"}, "is refused"),
        ({"a": "???"}, r"run\.a \(file\.yaml\): is still \?\?\?"),
    ],
)
def test_what_is_refused_names_the_key(run, problem):
    with pytest.raises(ConfigError, match=problem):
        merged(run=run)


def test_a_models_file_gets_nothing_of_the_environment(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {arch: evlgen_opt, prompt: '${oc.env:HOME}'}\n")
    with pytest.raises(ConfigError, match=r"model\.prompt .*\${oc\.env:HOME} is refused"):
        load_model_file(tmp_path / "config.yaml")
