"""``evlgen caption FOLDER --output FILE`` by several processes on a large folder, through ``kill -9``.

    python benchmarks/caption_folder.py [--images 100000] [--processes 2] [--folder FOLDER]

Draws scenes of the Shapes world into folders of 1,000 images, with a few broken files among them, and has
them captioned by the bundled model in processes that torchrun starts. When a third is done, one process is
killed; when two thirds are done, all of them and torchrun. After each kill the same command is started again.
At the end every file must be there exactly once, in order by name, the broken ones in the list of failures;
what was done before the kills must be unchanged; and captions of some images must be those they get alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from evlgen.captioning import caption_files
from evlgen.datasets.shapes.world import draw, scene

MAX_LENGTH = 6
COMPARED = 200  # captions that are written again, of images one by one


def draw_images(folder: Path, count: int, broken: int) -> set[str]:
    """Draws what is not there yet. Returns the paths of the broken files among them."""
    places = [folder / f"{number // 1000:03d}" / f"{number:06d}.png" for number in range(count)]
    for number, place in enumerate(places):
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            Image.fromarray(draw(scene("test", number))).save(place, compress_level=1)
    damaged = [place.with_suffix(".broken.png") for place in places[:: max(1, count // broken)][:broken]]
    for place in damaged:
        place.write_bytes(b"not an image")
    return set(map(str, damaged))


def whole_lines(parts: Path) -> list[bytes]:
    """What the processes have finished so far."""
    return [
        line
        for part in sorted(parts.glob("rank-*.jsonl"))
        for line in part.read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
    ]


def processes_of(argument: str) -> dict[int, list[bytes]]:
    """The command lines of the running processes that have this argument, by process number."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (place / "cmdline").read_bytes().split(b"\0")
            if argument.encode() in words:
                found[int(place.name)] = words
    return found


def run_until(command: list[str], parts: Path, wanted: int, everything: bool) -> list[bytes]:
    """Starts the command, and kills one of its workers, or all of it, when ``wanted`` lines are finished.
    Returns these lines."""
    output = command[command.index("--output") + 1]
    launcher = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while len(whole_lines(parts)) < wanted:
        if launcher.poll() is not None:
            raise SystemExit(f"torchrun ended with {launcher.returncode} before it was killed")
        time.sleep(1)
    workers = sorted(pid for pid in processes_of(output) if pid != launcher.pid)
    for pid in [launcher.pid, *workers] if everything else workers[:1]:
        os.kill(pid, signal.SIGKILL)
    launcher.wait()
    while processes_of(output):
        time.sleep(0.1)
    if Path(output).exists():
        raise SystemExit(f"{output} was written by a run that was killed")
    found = whole_lines(parts)
    what = "all processes" if everything else f"process {workers[0]} of {len(workers)}"
    print(f"killed {what} with {len(found):,} files done", flush=True)
    return found


def check(folder: Path, output: Path, broken: set[str], before: list[bytes]) -> None:
    """Compares the finished files with the folder. Raises `SystemExit` for the first difference."""
    captions, failures = (
        [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in (output, output.with_name(f"{output.name}.failed"))
    )
    paths = sorted(str(path) for path in folder.rglob("*.png"))
    lines = {line["image"]: line for line in [*captions, *failures]}
    sample = random.Random(0).sample([line["image"] for line in captions], min(COMPARED, len(captions)))
    alone = dict(caption_files(sample, num_beams=1, max_length=MAX_LENGTH, batch_size=1))
    done = [json.loads(line) for line in before]
    facts = {
        "each readable file once, in order by name": [line["image"] for line in captions]
        == [path for path in paths if path not in broken],
        "each broken file once in the list of failures": [line["image"] for line in failures]
        == sorted(broken),
        "what was done before a kill is unchanged": all(lines[line["image"]] == line for line in done),
        "nothing that was done was done again": len({line["image"] for line in done}) == len(done),
        f"{len(sample)} captions are those of the images alone": all(
            lines[image]["caption"] == caption for image, caption in alone.items()
        ),
        "the folder of parts is gone": not output.with_name(f"{output.name}.partial").exists(),
    }
    for fact, holds in facts.items():
        print(f"{fact}: {'yes' if holds else 'NO'}")
    print(f"{len(paths):,} files: {len(captions):,} captions, {len(failures):,} failures")
    if not all(facts.values()):
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--broken", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="of the images and captions; kept (default: temporary)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = args.folder or Path(temporary)
        folder, output = base / "images", base / "captions.jsonl"
        parts = base / "captions.jsonl.partial"
        if output.exists() or parts.exists():
            raise SystemExit(f"{base} has captions from before: remove them")
        broken = draw_images(folder, args.images, args.broken)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(args.processes), "-m", "evlgen", "caption", str(folder)]
        command += ["--output", str(output), "--num-beams", "1", "--max-length", str(MAX_LENGTH)]
        command += ["--batch-size", "64"]
        started = time.monotonic()
        run_until(command, parts, args.images // 3, everything=False)
        before = run_until(command, parts, 2 * args.images // 3, everything=True)
        subprocess.run(command, stderr=subprocess.DEVNULL, check=True)
        seconds = time.monotonic() - started
        print(f"{args.images / seconds:.0f} images/s with {args.processes} processes, starts included")
        check(folder, output, broken, before)


if __name__ == "__main__":
    main()
