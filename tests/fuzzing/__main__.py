"""``PYTHONPATH=tests python -m fuzzing --inputs 20000``: the whole campaign.

Each chunk runs in a process of its own, so that even a crash of the interpreter is a failure that is counted,
and not the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

from fuzzing.campaign import KINDS, run_chunk
from fuzzing.guard import Result

CHUNK = 500


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzzing", description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--chunk", type=int, help="only this one, in this process")
    parser.add_argument("--first", type=int, default=0, help="number of the first chunk: others are others")
    parser.add_argument(
        "--failed", type=Path, default=Path("fuzz_failures"), help="folder for inputs that fail"
    )
    args = parser.parse_args()
    if args.chunk is not None:
        result = run_chunk(args.kinds[0], args.chunk, args.inputs, args.failed)
        print(json.dumps(dataclasses.asdict(result)))
        return 0
    failures = 0
    for kind in args.kinds:
        started, total = time.perf_counter(), Result()
        for chunk in range(-(-args.inputs // CHUNK)):
            count = min(CHUNK, args.inputs - chunk * CHUNK)
            result = _in_process(kind, args.first + chunk, count, args.failed)
            for failure in result.failures:
                print(failure)
            _add(total, result)
            print(f"{kind} so far: {total}", file=sys.stderr, flush=True)
        print(f"{kind}: {total}; {time.perf_counter() - started:.0f} s in all", flush=True)
        failures += len(total.failures)
    return 1 if failures else 0


def _in_process(kind: str, chunk: int, count: int, failed: Path) -> Result:
    options = ["--kinds", kind, "--chunk", str(chunk), "--inputs", str(count), "--failed", str(failed)]
    done = subprocess.run(
        [sys.executable, "-m", "fuzzing", *options], capture_output=True, text=True, check=False
    )
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-30:])
        return Result(failures=[f"{kind} {chunk}: the process ended with {done.returncode}\n{tail}"])
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def _add(total: Result, result: Result) -> None:
    total.read += result.read
    total.refused += result.refused
    total.slowest = max(total.slowest, result.slowest)
    total.grown = max(total.grown, result.grown)
    total.failures += result.failures


if __name__ == "__main__":
    raise SystemExit(main())
