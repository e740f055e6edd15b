"""One line for each run: redrawn in place on a terminal, written when something happens elsewhere."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from evlgen.common.safe_text import printable
from evlgen.comparison.plan import Settings
from evlgen.comparison.stages import Run
from evlgen.report.metrics import main_metric, shown_value


class LiveTable:
    """Shows runs.

    Args:
        runs: in the order of their lines.
        settings: the budget, of which a line says how much is used.
    """

    def __init__(self, runs: Sequence[Run], settings: Settings) -> None:
        self.runs, self.settings = list(runs), settings
        self.live = sys.stdout.isatty()
        self._drawn = 0
        self._said: dict[int, tuple] = {}

    def show(self) -> None:
        """Draws all lines again; outside a terminal, those in which a state or evaluation is new."""
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            up = f"\x1b[{self._drawn}A" if self._drawn else ""
            lines = [f"\x1b[2K{self.line(run)[:width]}" for run in self.runs]
            sys.stdout.write(up + "\n".join(lines) + "\n")
            sys.stdout.flush()
            self._drawn = len(self.runs)
            return
        for run in self.runs:
            state = "going on" if run.state in ("training", "paused") else run.state
            news = (state, tuple(len(s.evaluations()) for s in run.stages))
            if news != self._said.get(id(run), ("waiting", tuple(0 for _ in run.stages))):
                print(self.line(run), flush=True)
            self._said[id(run)] = news

    def line(self, run: Run) -> str:
        """``mlp  seed 42  training  iteration 120  34 of 120 s  CIDEr 0.412``."""
        width = max(len(printable(r.configuration.label)) for r in self.runs)
        seconds = sum(s.effort()[0] for s in run.stages)
        iterations = sum(s.effort()[2] for s in run.stages)
        parts = [f"{printable(run.configuration.label):<{width}}", f"seed {run.seed}", f"{run.state:<8}"]
        if iterations:
            parts += [f"iteration {iterations:>5}", f"{seconds:6.1f} s{self._of_budget(seconds, iterations)}"]
        scores = run.stages[-1].evaluations()
        name = main_metric(scores)
        if name is not None:
            at = scores[-1]["iteration"]  # training may be further by now
            where = "" if at == run.stages[-1].effort()[2] else f" after {at}"
            parts.append(f"{name} {shown_value(scores[-1][name])}{where}")
        if run.state == "failed":
            parts.append(printable((run.error or "").partition("\n")[0]))
        return "  ".join(parts)

    def _of_budget(self, seconds: float, iterations: int) -> str:
        budget = self.settings.budget
        if budget is None:
            return ""
        used = seconds if budget.unit == "s" else iterations
        return f" ({min(100, round(100 * used / budget.value))} %)"
