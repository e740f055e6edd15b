"""The lines that show runs while they go on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from evlgen.comparison.live_table import LiveTable
from evlgen.comparison.parsing import Amount
from evlgen.comparison.plan import Settings


@pytest.mark.parametrize(("evaluated", "end"), [(40, "CIDEr 0.500"), (30, "CIDEr 0.500 after 30")])
def test_a_score_stands_with_the_iteration_it_is_of(evaluated, end):
    stage = SimpleNamespace(
        effort=lambda: (20.0, 640, 40), evaluations=lambda: [{"iteration": evaluated, "CIDEr": 0.5}]
    )
    run = SimpleNamespace(
        configuration=SimpleNamespace(label="mlp"), seed=42, state="training", stages=[stage], error=None
    )
    line = LiveTable([run], Settings(budget=Amount.parse("40s", "--budget"))).line(run)
    assert "iteration    40    20.0 s (50 %)" in line and line.endswith(end)
