"""A process that has imported all that a run needs, and then runs programs in forks of itself: imports take
most of a short run's time."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 900  # seconds, after which a program hangs: on free cores it takes a few


class Forks:
    """Starts the process; ``with`` ends it.

    Args:
        environment: of the process, beside that of this one.
    """

    def __init__(self, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self, program: Path, *arguments: str, shown: Path, **environment: str) -> tuple[int, str]:
        """The exit code (-9: killed) of a Python file, and the last of what it showed. That goes to the file
        ``shown``: a pipe would stay open until data-loading processes notice that their parent was killed."""
        command = [str(program), *arguments]
        request = {"command": command, "shown": str(shown), "environment": environment}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline()), shown.read_text()[-2000:]


def _serve() -> None:
    import evlgen

    for module in pkgutil.walk_packages(evlgen.__path__, "evlgen."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    import transformers.models.opt.modeling_opt  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if (child := os.fork()) == 0:
            signal.alarm(TIMEOUT)  # ends it
            os.environ.update(request["environment"])
            shown = os.open(request["shown"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(shown, stream)
            sys.argv = request["command"]
            runpy.run_path(sys.argv[0], run_name="__main__")
            sys.exit()
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
