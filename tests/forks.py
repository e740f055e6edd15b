"""A process that has imported all that a run needs, and then runs programs in forks of itself: imports take
most of a short run's time. Where an interpreter of its own is what a test is about, this is not for it."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 900  # seconds, after which a program hangs: on free cores it takes a few


@dataclass
class Started:
    """Processes that run a program: their ids, and the file that has all that they show."""

    pids: list[int]
    shown: Path
    server: subprocess.Popen

    def wait(self) -> tuple[int, str]:
        """The exit code (-9: killed) of the first one that failed or 0, and all that they showed."""
        codes = json.loads(self.server.stdout.readline())
        return next((code for code in codes if code), 0), self.shown.read_text()


class Forks:
    """Starts the process; ``with`` ends it.

    Args:
        environment: of the process, beside that of this one.
    """

    def __init__(self, **environment: str) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.communicate()

    def start(
        self, program: Path, *arguments: object, shown: Path, processes: int = 1, **environment: str
    ) -> Started:
        """Starts a Python file, each process in a session of its own. Wait for it before the next one.

        Args:
            shown: where what they show goes: a pipe would stay open until data-loading processes notice that
                their parent was killed.
            processes: several find each other as torchrun's do.
            environment: of the program, beside that of this process.
        """
        environments = [{**os.environ, "OMP_NUM_THREADS": "1", **environment} for _ in range(processes)]
        if processes > 1:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = str(free.getsockname()[1])
            for rank, own in enumerate(environments):
                own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                own |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [str(program), *map(str, arguments)]
        request = {"command": command, "shown": str(shown), "folder": os.getcwd()}
        self._server.stdin.write(json.dumps({**request, "environments": environments}) + "\n")
        self._server.stdin.flush()
        return Started(json.loads(self._server.stdout.readline()), shown, self._server)

    def run(self, program: Path, *arguments: object, shown: Path, **options) -> tuple[int, str]:
        """`start` and wait."""
        return self.start(program, *arguments, shown=shown, **options).wait()


def _serve() -> None:
    import evlgen

    for module in pkgutil.walk_packages(evlgen.__path__, "evlgen."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    import transformers.models.opt.modeling_opt  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        open(request["shown"], "w").close()
        children = []
        for environment in request["environments"]:
            if (child := os.fork()) == 0:
                _become(request, environment)
            children.append(child)
        print(json.dumps(children), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children]), flush=True)


def _become(request: dict, environment: dict[str, str]) -> None:
    os.setsid()
    signal.alarm(TIMEOUT)  # ends it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["folder"])
    shown = os.open(request["shown"], os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(shown, stream)
    sys.argv = request["command"]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    _serve()
