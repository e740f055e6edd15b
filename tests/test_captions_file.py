"""Captions of folders in a file: each image once, in order, through kills and several processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from evlgen.captioning import caption_files
from evlgen.captions_file import caption_to_file
from evlgen.common.errors import ConfigError, DataError, TrainingError
from evlgen.datasets.shapes.world import draw, scene

HOW = {"prompt": None, "num_beams": 1, "max_length": 8, "num_frames": 4}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(40):
        place = folder / f"{number % 3}" / f"{number:03d}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(draw(scene("test", number))).save(place)
    (folder / "1" / "broken.png").write_bytes(b"no image")
    (folder / "2" / "größe\n.png").write_bytes((folder / "0" / "000.png").read_bytes())
    return folder


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_killed_run_goes_on_and_captions_each_image_once(forks, photos, tmp_path):
    output = tmp_path / "captions.jsonl"
    command = [forks.python, "-m", "evlgen", "caption", str(photos), "--output", str(output)]
    command += ["--num-beams", "1", "--max-length", "8", "--batch-size", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    part = tmp_path / "captions.jsonl.partial" / "rank-00000.jsonl"
    ends = time.monotonic() + 120
    while not (part.exists() and part.read_bytes().count(b"\n") >= 6):
        assert process.poll() is None and time.monotonic() < ends
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    before = [line for line in part.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    with open(part, "ab") as file:
        file.write(b'{"image": "half a li')

    with pytest.raises(ConfigError, match="num_beams=1"):
        caption_to_file([str(photos)], output, **{**HOW, "num_beams": 2})
    # one rank of two finds work of the other left, whose turn finishes the file
    found = [caption_to_file([str(photos)], output, rank=rank, world_size=2, **HOW) for rank in (1, 0)]
    assert found == [None, (41, 1)]
    assert not part.parent.exists()
    expected = dict(caption_files([str(photos)], num_beams=1, max_length=8))
    lines = _read(output)
    assert [line["image"] for line in lines] == list(expected)
    assert {line["image"]: line["caption"] for line in lines} == expected
    assert all(json.loads(line) in lines or "error" in json.loads(line) for line in before)
    (failed,) = _read(tmp_path / "captions.jsonl.failed")
    assert failed["image"] == str(photos / "1" / "broken.png") and failed["cause"] == "not an image"


def test_a_finished_file_takes_in_what_is_new(photos, tmp_path):
    folder = tmp_path / "few"
    folder.mkdir()
    for number in (3, 1):
        os.link(photos / f"{number % 3}" / f"{number:03d}.png", folder / f"{number}.png")
    output = tmp_path / "out" / "captions.jsonl"
    assert caption_to_file([str(folder)], output, **HOW) == (2, 0)
    first = _read(output)
    os.link(photos / "2" / "002.png", folder / "2.png")
    (folder / "0.png").write_bytes(b"")
    assert caption_to_file([str(folder)], output, **HOW) == (3, 1)
    assert [Path(line["image"]).name for line in _read(output)] == ["1.png", "2.png", "3.png"]
    assert [_read(output)[0], _read(output)[2]] == first
    assert caption_to_file([str(folder)], output, **HOW) == (3, 1)  # nothing is left to do
    with pytest.raises(ConfigError, match=r"captions\.jsonl was begun with other settings \(num_beams=1\)"):
        caption_to_file([str(folder)], output, **{**HOW, "num_beams": 2})
    output.unlink()
    (tmp_path / "out" / "captions.jsonl.failed").unlink()
    assert caption_to_file([str(folder)], output, **{**HOW, "num_beams": 2}) == (3, 1)


@pytest.mark.parametrize(
    "content", ['{"caption": "a dog"}\n', "name,caption\n", "[1]\n", "{}\n", '{"image": "a"}\n']
)
def test_another_kind_of_file_is_named_and_left_as_it_is(photos, tmp_path, content):
    output = tmp_path / "captions.jsonl"
    output.write_text(content)
    with pytest.raises(ConfigError, match="its line 1 is not one of this command's"):
        caption_to_file([str(photos)], output, **HOW)
    assert output.read_text() == content and os.listdir(tmp_path) == ["captions.jsonl"]


def test_nothing_readable_is_an_error_and_a_second_process_of_a_rank_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    output = tmp_path / "captions.jsonl"
    with pytest.raises(DataError, match="none of the 1 files"):
        caption_to_file([str(tmp_path / "a.png")], output, **HOW)
    part = tmp_path / "other.jsonl.partial" / "rank-00000.jsonl"
    part.parent.mkdir()
    code = "import sys, fcntl; f = open(sys.argv[1], 'ab'); fcntl.flock(f, 2); print(1, flush=True); input()"
    other = [sys.executable, "-c", code, str(part)]
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(TrainingError, match="torchrun"):
            caption_to_file([str(tmp_path / "a.png")], tmp_path / "other.jsonl", **HOW)
        holder.communicate(b"\n")


@pytest.mark.slow
def test_two_processes_of_torchrun_go_on_after_a_kill(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(300):
        Image.fromarray(draw(scene("test", number))).save(folder / f"{number:04d}.png")
    broken = [folder / "0050x.png", folder / "0250x.png"]
    for path in broken:
        path.write_bytes(b"no image")
    output = tmp_path / "captions.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "evlgen", "caption", str(folder), "--output", str(output)]
    command += ["--num-beams", "1", "--max-length", "8", "--batch-size", "4"]
    parts = tmp_path / "captions.jsonl.partial"

    def count() -> list[int]:
        return [part.read_bytes().count(b"\n") for part in sorted(parts.glob("rank-*.jsonl"))]

    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    ends = time.monotonic() + 300
    while not (len(count()) == 2 and min(count()) >= 20):
        assert first.poll() is None and time.monotonic() < ends
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)  # torchrun
    for worker in _workers(str(output)):  # which starts its workers in sessions of their own
        os.kill(worker, signal.SIGKILL)
    first.wait()
    assert not output.exists()
    before = [json.loads(line) for part in parts.glob("rank-*.jsonl") for line in _whole(part)]
    assert 40 <= len(before) < 300

    subprocess.run(command, stderr=subprocess.DEVNULL, check=True)
    lines = _read(output)
    names = sorted(str(path) for path in folder.iterdir())
    assert [line["image"] for line in lines] == [name for name in names if Path(name) not in broken]
    failed = _read(tmp_path / "captions.jsonl.failed")
    assert [line["image"] for line in failed] == [str(path) for path in broken]
    assert all(line in lines or line in failed for line in before)
    assert not parts.exists()


def _whole(part: Path) -> list[bytes]:
    return [line for line in part.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _workers(argument: str) -> list[int]:
    """Processes with an argument."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if argument.encode() in (place / "cmdline").read_bytes().split(b"\0"):
                found.append(int(place.name))
    return found
