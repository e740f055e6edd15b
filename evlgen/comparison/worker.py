"""``python -m evlgen.comparison.worker JOB``: one stage of one compared run, in a process of its own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from evlgen.common.errors import EVLGenError
from evlgen.console import guarded
from evlgen.files.json_io import read_json


def main() -> int:
    parser = argparse.ArgumentParser(prog="evlgen.comparison.worker")
    parser.add_argument("job", type=Path, help="job.json: cfg_path, options, plugins")
    parser.add_argument("--debug", action="store_true")
    return guarded(_run, parser, None)


def _run(args: argparse.Namespace) -> int:
    from evlgen.common.logs import quiet_libraries
    from evlgen.config.config import Config

    job = read_json(args.job, EVLGenError, "job")
    cfg = Config.load(job["cfg_path"], job["options"], job["plugins"])
    quiet_libraries()
    from evlgen.assemble import run
    from evlgen.comparison.run_recorder import RunRecorder

    run(cfg, [RunRecorder(args.job.parent)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
