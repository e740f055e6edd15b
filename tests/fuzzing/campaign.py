"""Inputs in chunks: a chunk is made again, input for input, from its kind and its number."""

from __future__ import annotations

import logging
import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import hypothesis

from evlgen.runners.training_state import kept_random_state
from fuzzing import annotations, checkpoints, configs, images, tables, tars
from fuzzing.guard import Guard, Result, bounded_memory
from fuzzing.videos import Reader

KINDS = ("configs", "annotations", "checkpoints", "tables", "tars", "images", "pyav", "decord", "gif")
Keep = Callable[[str], Callable[[Path], None]]


def run_chunk(kind: str, chunk: int, count: int, failed: Path | None = None) -> Result:
    """Runs ``count`` inputs. Their files are left in ``failed``, where they fail and it is given."""
    guard = Guard()
    environment = dict(os.environ)
    with (
        tempfile.TemporaryDirectory(prefix="evlgen_fuzz_") as name,
        kept_random_state(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        folder = Path(name)
        try:
            _MAKERS[kind](folder, chunk, count, lambda name, act, file: _one(guard, name, act, file, failed))
        finally:
            logging.disable(logging.NOTSET)
            os.environ.clear()
            os.environ.update(environment)
    return guard.finish()


def _one(guard: Guard, name: str, act: Callable[[], object], file: list[Path], failed: Path | None) -> None:
    before = len(guard.result.failures)
    with bounded_memory():
        guard.run(name, act)
    if failed is not None and len(guard.result.failures) > before and file:
        failed.mkdir(parents=True, exist_ok=True)
        shutil.copy(file[-1], failed / f"{name.replace(' ', '_').replace('/', '_')}_{file[-1].name}")


def _drawn(module) -> Callable:
    """Inputs that hypothesis draws."""

    def make(folder: Path, chunk: int, count: int, run: Callable) -> None:
        module.prepare(folder)
        number = iter(range(10 * count + 10))

        @hypothesis.seed(chunk)
        @hypothesis.settings(
            max_examples=count,
            database=None,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        @hypothesis.given(module.inputs)
        def each(drawn) -> None:
            file: list[Path] = []
            run(
                f"{module.__name__.rpartition('.')[2]} {chunk}:{next(number)}",
                module.action(folder, drawn, file.append),
                file,
            )

        each()

    return make


def _damaged(module) -> Callable:
    """Whole files that a generator damages."""

    def make(folder: Path, chunk: int, count: int, run: Callable) -> None:
        module.prepare(folder)
        kind = module.__name__.rpartition(".")[2]
        for number in range(count):
            file: list[Path] = []
            what, act = module.damaged(folder, random.Random(f"{chunk}:{number}"), file.append)
            run(f"{kind} {chunk}:{number} {what}", act, file)

    return make


_MAKERS = {
    "configs": _drawn(configs),
    "annotations": _drawn(annotations),
    "checkpoints": _damaged(checkpoints),
    "tables": _drawn(tables),
    "tars": _damaged(tars),
    "images": _damaged(images),
    "pyav": _damaged(Reader("pyav")),
    "decord": _damaged(Reader("decord")),
    "gif": _damaged(Reader("gif")),
}
