"""METEOR by the Java program that pycocoevalcap carries."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evlgen.common.registry import registry
from evlgen.tasks.metrics.base import CaptionMetric, MetricResult, MetricUnavailable, Tokenised
from evlgen.tasks.metrics.java import Java, find_java, pycocoevalcap_file

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
        try:
            with _running(java, seconds=300 + 0.5 * len(candidates)) as process:
                statistics = [
                    _ask(process, _score_line(references[image], line))
                    for image, (line,) in candidates.items()
                ]
                # One line with every image's statistics is answered by a score for each, then the corpus's.
                first = _ask(process, _SEPARATOR.join(["EVAL", *statistics]))
                answers = [first] + [_read(process) for _ in statistics]
                scores = [float(answer) for answer in answers]
        except (OSError, ValueError) as error:
            raise MetricUnavailable(
                f"METEOR's Java program failed ({error}); it needs 2 GB of memory"
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
def _running(java: Java, seconds: float) -> Iterator[subprocess.Popen]:
    """METEOR reading from us, killed when the block ends or the time is up."""
    jar = _files()[0]
    process = subprocess.Popen(
        java.command("-Xmx2G", "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"),
        cwd=jar.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
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


def _score_line(references: list[str], candidate: str) -> str:
    return _SEPARATOR.join(["SCORE", *(line.replace("|||", " ") for line in (*references, candidate))])


def _ask(process: subprocess.Popen, line: str) -> str:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return _read(process)


def _read(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    answer = process.stdout.readline()
    if not answer:
        raise ValueError("it ended without an answer")
    return answer.strip()
