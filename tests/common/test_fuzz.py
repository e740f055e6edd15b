"""A short campaign of each kind; ``bash run_scripts/fuzz.sh`` runs the long one."""

from __future__ import annotations

import pytest
from fuzzing.campaign import run_chunk
from fuzzing.guard import Guard


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        *(("configs", 60), ("annotations", 100), ("checkpoints", 120), ("tables", 150), ("tars", 150)),
        *(("images", 120), ("pyav", 40), ("decord", 40), ("gif", 60)),
    ],
)
def test_only_errors_of_ours_come_out_of_damaged_files(kind: str, count: int) -> None:
    result = run_chunk(kind, chunk=0, count=count)
    assert result.failures == []
    assert result.inputs >= count * 0.9 and result.read and result.refused


def test_a_guard_notes_errors_of_others_hangs_and_memory(monkeypatch) -> None:
    monkeypatch.setattr("fuzzing.guard.SECONDS", 0.1)
    monkeypatch.setattr("fuzzing.guard.PEAK_MEGABYTES", -1)

    def hang() -> None:
        while True:
            pass

    guard = Guard()
    guard.run("error", lambda: {}["x"])
    guard.run("hang", hang)
    found = "\n".join(guard.finish().failures)
    assert "error: Traceback" in found and "KeyError" in found
    assert "hang: more than 0.1 s" in found and "hang: it took 0 MB" in found
