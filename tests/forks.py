"""A Python that starts at once: a process that has imported all that a run needs runs programs in forks of
itself. Imports take most of a short run's time. Not for tests that are about what is imported when.

As a program this file is both sides: ``forks.py serve SOCKET`` is that process; ``forks.py ask SOCKET ...``
has it run one program, with the environment, folder and output of its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 900  # seconds, after which a program hangs: on free cores it takes a few


class Forks:
    """Starts the process; ``with`` ends it. ``python`` is a program that is called as Python is; where the
    system has no forks, Python itself.

    Args:
        environment: of the process, beside that of this one.
    """

    def __init__(self, **environment: str) -> None:
        if not hasattr(os, "fork"):
            self.python, self._server = sys.executable, None
            return
        self._folder = tempfile.TemporaryDirectory(prefix="forks-")
        address = f"{self._folder.name}/socket"
        self.python = f"{self._folder.name}/python"
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FORKS": self.python, **environment}
        # -I and -S: it needs the standard library alone, and starts in some milliseconds
        ask = f'exec "{sys.executable}" -I -S "{__file__}" ask "{address}" "$@"'
        Path(self.python).write_text(f"#!/bin/sh\n{ask}\n")
        os.chmod(self.python, 0o755)
        self._server = subprocess.Popen(
            [sys.executable, __file__, "serve", address],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        assert self._server.stdout.readline() == "ready\n"

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is None:
            return
        self._server.kill()
        self._server.communicate()
        self._folder.cleanup()

    def run(self, program: Path, *arguments: object, shown: Path, **environment: str) -> tuple[int, str]:
        """The exit code (-9: killed) of a Python file, and what it showed. That goes to the file ``shown``: a
        pipe would stay open until data-loading processes notice that their parent was killed."""
        command = [self.python, str(program), *map(str, arguments)]
        with open(shown, "w") as file:
            done = subprocess.run(
                command, stdout=file, stderr=file, env={**os.environ, **environment}, timeout=TIMEOUT
            )
        return done.returncode, shown.read_text()

    def start(self, function: Callable[..., object], *arguments: object) -> SpawnProcess:
        """Calls a function of a module in another process; its arguments are pickled."""
        import multiprocessing.resource_tracker
        import multiprocessing.spawn

        multiprocessing.resource_tracker.ensure_running()  # for longer than the forks
        process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
        before = multiprocessing.spawn.get_executable()
        multiprocessing.set_executable(self.python)
        try:
            process.start()
        finally:
            multiprocessing.set_executable(before)
        return process


def _ask(address: str, arguments: list[str]) -> int:
    """Has a program run; passes signals on, and ends as it does."""
    files = [1, 2, *filter(_is_passed, map(int, os.listdir("/proc/self/fd")))]
    program = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(), "files": files}
    content = json.dumps(program).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [len(content).to_bytes(8, "big")], files)
        server.sendall(content)
        answers = server.makefile()
        process = int(answers.readline())
        signal.signal(signal.SIGTERM, lambda *_: os.kill(process, signal.SIGTERM))
        # as a terminal does it: to the data-loading processes as well
        signal.signal(signal.SIGINT, lambda *_: os.killpg(process, signal.SIGINT))
        code = int(answers.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    return code


def _is_passed(file: int) -> bool:
    """Whether an open file was given to this process (``pass_fds``), which has opened others itself."""
    try:
        return file > 2 and os.get_inheritable(file)
    except OSError:  # it was closed again
        return False


def _serve(address: str) -> None:
    import gc
    import importlib
    import pkgutil

    import torch.distributed.run  # noqa: F401
    import transformers.models.opt.modeling_opt  # noqa: F401

    import evlgen

    for module in pkgutil.walk_packages(evlgen.__path__, "evlgen."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    gc.collect()
    gc.freeze()  # else every fork copies all that is imported when it collects, and again when it ends
    sys.executable = os.environ["FORKS"]  # the programs' own programs are forks as well
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for `_answer`
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            client, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _answer(client)
            client.close()


def _answer(client: socket.socket) -> None:
    """Runs one program and ends this process; where the one that asked is killed, the program is as well."""
    import contextlib
    import threading

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, files, _, _ = socket.recv_fds(client, 8, 253)  # more cannot be sent
    program = json.loads(client.makefile("rb").read(int.from_bytes(length, "big")))
    if (child := os.fork()) == 0:
        client.close()
        _become(program, files)
    client.sendall(f"{child}\n".encode())

    def watch() -> None:
        client.recv(1)  # nothing comes any more
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    _, status = os.waitpid(child, 0)
    try:
        client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    finally:
        os._exit(0)


def _become(program: dict, files: list[int]) -> None:
    import fcntl
    import runpy

    os.setsid()
    signal.alarm(TIMEOUT)  # ends it
    os.environ.clear()
    os.environ.update(program["environment"])
    os.chdir(program["folder"])
    copies = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 1000) for file in files]  # none has another's number
    for file in files:
        os.close(file)
    for copy, number in zip(copies, program["files"], strict=True):
        os.dup2(copy, number)
        os.close(copy)
    arguments = program["arguments"]
    while arguments[0] in ("-u", "-B"):
        del arguments[0]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    _serve(sys.argv[2]) if sys.argv[1] == "serve" else sys.exit(_ask(sys.argv[2], sys.argv[3:]))
