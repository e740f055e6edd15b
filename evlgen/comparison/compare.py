"""``python -m evlgen compare`` and ``sweep``: plan, run, report."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evlgen.common.errors import ConfigError, Interrupted, TrainingError
from evlgen.common.safe_text import message_lines
from evlgen.comparison.execution import Execution
from evlgen.comparison.plan import Configuration, Settings
from evlgen.comparison.results import collect
from evlgen.comparison.stages import Run, read
from evlgen.config.config import changed_keys
from evlgen.files.io import write_atomically

logger = logging.getLogger(__name__)

PLAN_FILE = "plan.json"


def compare(
    settings: Settings,
    configurations: Sequence[Configuration],
    folder: Path,
    command: str,
    interleave: bool = False,
    swept: str | None = None,
) -> dict[str, Any]:
    """Trains what is not trained yet and writes the report, also where runs failed or somebody stopped it.

    Args:
        folder: made by `new_folder`, or checked by `resumed_folder`.
        swept: the key of a sweep, whose files are ``sweep.*`` in place of ``report.*``.

    Returns:
        the content of ``report.json``.

    Raises:
        Interrupted: after the report of what is there is written.
    """
    write_atomically(folder / PLAN_FILE, json.dumps(_plan(settings, configurations), indent=1, default=str))
    # seed by seed, so that a comparison that is cut short has something of every configuration
    runs = [Run.of(c, seed, folder, settings) for seed in settings.seeds for c in configurations]
    try:
        Execution(folder, runs, settings, interleave).run()
    except Interrupted:
        write_report(folder, runs, configurations, settings, command, interleave, swept)
        raise
    return write_report(folder, runs, configurations, settings, command, interleave, swept)


def write_report(
    folder: Path,
    runs: Sequence[Run],
    configurations: Sequence[Configuration],
    settings: Settings,
    command: str,
    interleave: bool,
    swept: str | None,
) -> dict[str, Any]:
    """Writes ``report.json`` and ``report.html`` (of a sweep ``sweep.json``, ``.html`` and ``.png``)."""
    from evlgen.comparison.html_report import page

    report = collect(runs, configurations, settings, command)
    report |= {"interleaved": interleave, "swept": swept}
    name = "sweep" if swept else "report"
    write_atomically(folder / f"{name}.json", json.dumps(report, indent=1, default=str))
    write_atomically(folder / f"{name}.html", page(report, runs, swept))
    if swept:
        from evlgen.comparison.plots import sweep_figure
        from evlgen.report.plots import as_png

        figure = sweep_figure(report, swept)
        if figure is not None:
            write_atomically(folder / f"{name}.png", as_png(figure))
    return report


def new_folder(output: str | None, parent: str) -> Path:
    """An empty folder for a comparison: ``output``, or one named by the time under ``parent``.

    Raises:
        TrainingError: it holds a comparison already, or cannot be made.
    """
    folder = Path(os.path.expanduser(output)) if output else Path(parent) / time.strftime("%Y%m%d-%H%M%S")
    folder = folder.absolute()
    if (folder / PLAN_FILE).exists():
        raise TrainingError(
            f"--output {folder} holds a comparison already: add --resume to go on with it, or name another "
            "folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"--output {folder} cannot be made ({error.strerror}).") from error
    return folder


def resumed_folder(
    output: str | None, parent: str, settings: Settings, configurations: Sequence[Configuration]
) -> Path:
    """The folder of a comparison that goes on: ``output``, or the newest under ``parent``. More
    configurations and seeds than there were may be wanted, but no others under the same name.

    Raises:
        TrainingError: there is none.
        ConfigError: it was of other settings; names them.
    """
    found = [Path(os.path.expanduser(output))] if output else sorted(Path(parent).glob("*/"))
    found = [folder for folder in found if (folder / PLAN_FILE).exists()]
    if not found:
        raise TrainingError(f"--resume: there is no comparison in {output or parent} to go on with.")
    folder = found[-1].absolute()
    before = read(folder / PLAN_FILE)
    now = json.loads(json.dumps(_plan(settings, configurations), default=str))
    changed = changed_keys(before["settings"], now["settings"], ("seeds",))
    for name, new in now["configurations"].items():
        old = before["configurations"].get(name, new)
        if len(old) != len(new):
            changed.append(f"{name} had {len(old)} stages, has {len(new)}")
            continue
        for one, other in zip(old, new, strict=True):
            changed += [f"{name}: {line}" for line in changed_keys(one, other)]
    if changed:
        title = f"--resume: {folder} compares under other settings:"
        raise ConfigError(message_lines([title, *(f"  - {line}" for line in changed)]))
    return folder


def _plan(settings: Settings, configurations: Sequence[Configuration]) -> dict[str, Any]:
    kept = settings.to_json()
    for key in ("options", "plugins"):  # whatever they change shows in the configurations
        del kept[key]
    stages = {c.name: [stage.config for stage in c.stages] for c in configurations}
    return {"settings": kept, "configurations": stages}
