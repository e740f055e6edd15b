"""METEOR by the Java program that pycocoevalcap carries."""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from evlgen.common.registry import registry
from evlgen.tasks.metrics.base import CaptionMetric, MetricResult, MetricUnavailable, Tokenised
from evlgen.tasks.metrics.java import Java, find_java, last_words, pycocoevalcap_file

_SEPARATOR = " ||| "


@registry.register_metric("meteor")
class Meteor(CaptionMetric):
    """METEOR 1.5 with English defaults (Denkowski and Lavie, 2014), run as pycocoevalcap runs it.

    pycocoevalcap's own wrapper is not used: it waits for ever at exit when Java died, and leaves the text
    encoding to the machine's locale.
    """

    names = ("METEOR",)
    needs_java = True

    def unavailable(self) -> str | None:
        missing = [str(path) for path in _files() if not path.is_file()]
        if missing:
            return f"{' and '.join(missing)} missing; install pycocoevalcap again"
        return super().unavailable()

    def compute(self, references: Tokenised, candidates: Tokenised) -> MetricResult:
        java = find_java()
        if isinstance(java, str):
            raise MetricUnavailable(java)
        with tempfile.TemporaryFile() as errors:
            try:
                with _running(java, errors, seconds=300 + 0.5 * len(candidates)) as process:
                    scores = _scores(process, references, candidates)
            except (OSError, ValueError) as error:
                errors.seek(0)
                words = last_words(errors.read().decode(errors="replace"))
                raise MetricUnavailable(
                    f"METEOR's Java program ended without an answer ({words}); it needs 2 GB of memory"
                ) from error
        return MetricResult(
            {"METEOR": scores[-1]}, {"METEOR": dict(zip(candidates, scores[:-1], strict=True))}
        )


def _files() -> tuple[Path, Path]:
    return (
        pycocoevalcap_file("meteor", "meteor-1.5.jar"),
        pycocoevalcap_file("meteor", "data", "paraphrase-en.gz"),
    )


@contextmanager
def _running(java: Java, errors: IO[bytes], seconds: float) -> Iterator[subprocess.Popen]:
    """METEOR reading from us, killed when the block ends or the time is up."""
    jar = _files()[0]
    process = subprocess.Popen(
        java.command("-Xmx2G", "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"),
        cwd=jar.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        encoding="utf-8",
        errors="ignore",
    )
    watchdog = threading.Timer(seconds, process.kill)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        process.kill()
        # Leaves the pipes closed and no zombie; what was still unwritten is of no use to anybody.
        process.communicate()


def _scores(process: subprocess.Popen, references: Tokenised, candidates: Tokenised) -> list[float]:
    """A score for each image, then that of all of them."""
    statistics = [
        _ask(process, _SEPARATOR.join(["SCORE", *map(_without_separator, (*references[image], line))]))
        for image, (line,) in candidates.items()
    ]
    first = _ask(process, _SEPARATOR.join(["EVAL", *statistics]))
    return [float(answer) for answer in (first, *(_read(process) for _ in statistics))]


def _without_separator(line: str) -> str:
    return line.replace("|||", " ")


def _ask(process: subprocess.Popen, line: str) -> str:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return _read(process)


def _read(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    answer = process.stdout.readline()
    if not answer:
        raise ValueError("the program has ended")
    return answer.strip()
