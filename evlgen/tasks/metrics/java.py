"""Finding a Java that runs, and running programs with it: quietly, in UTF-8, with a time limit, ended in
every case."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

OLDEST_VERSION = 8
# Java must read and write UTF-8 and lower-case in English whatever the machine's locale.
_FLAGS = (
    "-Dfile.encoding=UTF-8",
    "-Dstdout.encoding=UTF-8",
    "-Duser.language=en",
    "-Duser.country=US",
    "-Djava.awt.headless=true",
)


class JavaFailed(RuntimeError):
    """A Java program did not end well. The message holds its last words."""


@dataclass(frozen=True)
class Java:
    """A Java that answered.

    Attributes:
        executable: path of ``java``.
        version: 8 for "1.8.0_352", 17 for "17.0.15".
    """

    executable: str
    version: int

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs ``java`` with these arguments."""
        return [self.executable, *_FLAGS, *arguments]


def find_java() -> Java | str:
    """The Java of ``JAVA_HOME``, else of ``PATH``; a string with the reason where there is none that
    serves."""
    return _find_java(os.environ.get("JAVA_HOME", ""), os.environ.get("PATH", ""))


@lru_cache(maxsize=8)
def _find_java(home: str, path: str) -> Java | str:
    in_home = shutil.which("java", path=str(Path(home) / "bin")) if home else None
    executable = in_home or shutil.which("java", path=path)
    if executable is None:
        return f"Java is not installed (no `java` on PATH); install Java {OLDEST_VERSION} or newer"
    try:
        answer = subprocess.run(
            [executable, "-version"], capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{executable} does not run ({error}); install Java {OLDEST_VERSION} or newer"
    words = (answer.stderr + answer.stdout).decode(errors="replace")
    found = re.search(r'version "(?:1\.)?(\d+)', words)
    if answer.returncode != 0 or found is None:
        return f"{executable} does not run ({_last_line(words)}); install Java {OLDEST_VERSION} or newer"
    version = int(found.group(1))
    if version < OLDEST_VERSION:
        return f"{executable} is Java {version}, too old; install Java {OLDEST_VERSION} or newer"
    return Java(executable, version)


def run_java(
    java: Java, arguments: Sequence[str], timeout: float, text: str = "", folder: Path | None = None
) -> str:
    """Runs a Java program to its end and returns what it wrote.

    Args:
        java: from `find_java`.
        arguments: of ``java``: options, class or jar, the program's own arguments.
        timeout: seconds after which the program is killed.
        text: given to the program's standard input.
        folder: the folder it runs in.

    Raises:
        JavaFailed: it did not start, took too long or ended with an error.
    """
    try:
        done = subprocess.run(
            java.command(*arguments),
            input=text.encode("utf-8", errors="ignore"),
            capture_output=True,
            timeout=timeout,
            cwd=folder,
            check=False,
        )
    except OSError as error:
        raise JavaFailed(f"{java.executable} did not start: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise JavaFailed(f"Java was ended after {timeout:.0f} s without an answer") from error
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace")
        raise JavaFailed(f"Java ended with code {done.returncode}: {last_words(words)}")
    return done.stdout.decode("utf-8", errors="replace")


def pycocoevalcap_file(*parts: str) -> Path:
    """Path of a file of the installed pycocoevalcap, whether it is there or not. Imports nothing."""
    spec = importlib.util.find_spec("pycocoevalcap")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return Path(folders[0] if folders else "pycocoevalcap", *parts)


def last_words(errors: str) -> str:
    """The line of a Java program's error output that says most: the last exception, else the last line."""
    exceptions = [
        line.strip() for line in errors.splitlines() if re.match(r"(Exception|Caused by|Error)", line)
    ]
    return exceptions[-1] if exceptions else _last_line(errors)


def _last_line(words: str) -> str:
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
