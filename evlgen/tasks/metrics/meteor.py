"""METEOR by the Java program that pycocoevalcap carries."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

from evlgen.common.registry import registry
from evlgen.tasks.metrics.base import CaptionMetric, MetricResult, MetricUnavailable, Tokenised
from evlgen.tasks.metrics.java import Java, find_java, last_words, pycocoevalcap_file


@registry.register_metric("meteor")
class Meteor(CaptionMetric):
    """METEOR 1.5 with English defaults (Denkowski and Lavie, 2014), run as pycocoevalcap runs it.

    pycocoevalcap's own wrapper is not used: it waits for ever at exit when Java died, and leaves the text
    encoding to the machine's locale.
    """

    names = ("METEOR",)
    needs_java = True

    def __init__(self) -> None:
        self._program: _Program | None = None
        self._statistics: dict[str, str] = {}  # what was asked about a caption -> the program's answer

    def unavailable(self) -> str | None:
        missing = [str(path) for path in _files() if not path.is_file()]
        if missing:
            return f"{' and '.join(missing)} missing; install pycocoevalcap again"
        return super().unavailable()

    def begin(self) -> None:
        java = find_java()
        if isinstance(java, Java) and self.unavailable() is None:
            with contextlib.suppress(OSError):  # `compute` tries again, and tells why
                self._program = _Program(java)

    def takes(self) -> bool:
        return self._program is not None

    def take(self, references: Tokenised, candidates: Tokenised) -> None:
        if self._program is None:
            return
        try:
            with self._program.ended_after(_seconds_for(candidates)):
                self._look_at(self._program, references, candidates)
        except (OSError, ValueError):  # `compute` tries again, and tells why
            self._program.end()
            self._program = None

    def compute(self, references: Tokenised, candidates: Tokenised) -> MetricResult:
        java = find_java()
        if isinstance(java, str):
            raise MetricUnavailable(java)
        program, self._program = self._program, None
        try:
            program = program or _Program(java)
            with program.ended_after(_seconds_for(candidates)):
                scores = program.scores(self._look_at(program, references, candidates))
        except (OSError, ValueError) as error:
            words = str(error) if program is None else program.last_words()
            raise MetricUnavailable(
                f"METEOR's Java program ended without an answer ({words}); it needs 2 GB of memory"
            ) from error
        finally:
            if program is not None:
                program.end()
        return MetricResult(
            {"METEOR": scores[-1]}, {"METEOR": dict(zip(candidates, scores[:-1], strict=True))}
        )

    def _look_at(self, program: _Program, references: Tokenised, candidates: Tokenised) -> list[str]:
        """The statistics of each image, of which those that are known are not asked for again."""
        found = []
        for image, (line,) in candidates.items():
            question = _question("SCORE", *references[image], line)
            if question not in self._statistics:
                self._statistics[question] = program.ask(question)
            found.append(self._statistics[question])
        return found


def _seconds_for(candidates: Tokenised) -> float:
    return 300 + 0.5 * len(candidates)


def _question(*parts: str) -> str:
    return " ||| ".join(part.replace("|||", " ") for part in parts)


def _files() -> tuple[Path, Path]:
    return (
        pycocoevalcap_file("meteor", "meteor-1.5.jar"),
        pycocoevalcap_file("meteor", "data", "paraphrase-en.gz"),
    )


class _Program:
    """METEOR's Java program, which reads its tables when it starts: that takes longer than scoring some
    thousand captions.

    Attributes:
        end: ends it; it ends as well when this object is gone.

    Raises:
        OSError: it does not start.
    """

    def __init__(self, java: Java) -> None:
        jar = _files()[0]
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            java.command("-Xmx2G", "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"),
            cwd=jar.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            errors="ignore",
        )
        self.end = weakref.finalize(self, _end, self._process)

    @contextlib.contextmanager
    def ended_after(self, seconds: float) -> Iterator[None]:
        """Ends the program where what is done inside takes longer."""
        watchdog = threading.Timer(seconds, self._process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()

    def scores(self, statistics: list[str]) -> list[float]:
        """A score for each image's statistics, then that of all of them. Raises `OSError` or `ValueError`
        where the program has ended."""
        first = self.ask(_question("EVAL", *statistics))
        return [float(answer) for answer in (first, *(self._read() for _ in statistics))]

    def last_words(self) -> str:
        """Of what it wrote about errors."""
        self._errors.seek(0)
        return last_words(self._errors.read().decode(errors="replace"))

    def ask(self, question: str) -> str:
        """The line that answers a line. Raises as `scores`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{question}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer.endswith("\n"):
            raise ValueError("the program has ended")
        return answer.strip()


def _end(process: subprocess.Popen) -> None:
    process.kill()
    # Leaves the pipes closed and no zombie; what was still unwritten is of no use to anybody.
    process.communicate()
