"""The launcher of several processes (torchrun): which of them this is, and what it is told of an error."""

from __future__ import annotations

import json
import os
import time


def is_first() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def report_to_launcher(error: str, follows_another: bool = False) -> None:
    """Gives torchrun the error to show in its report, in place of "no traceback". The format is that of
    `torch.distributed.elastic.multiprocessing.errors.record`.

    Args:
        follows_another: another process failed before; torchrun names the earliest error as the cause, by
            whole seconds.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    when = str(int(time.time()) + follows_another)
    message = {"message": error, "extraInfo": {"py_callstack": error, "timestamp": when}}
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"message": message}, file)
