"""Paths of every kind, files that appear whole or not at all, and checkpoint folders."""

from __future__ import annotations

import contextlib
import errno
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from faults import deaths
from iopath.common.file_io import PathHandler

from evlgen.common.errors import CheckpointError, DataError, TrainingError
from evlgen.files.digests import DIGESTS_FILE, check_digests, replace_file, write_digests
from evlgen.files.io import (
    PACKAGE_ROOT,
    atomic_file,
    cache_root,
    download_target,
    path_manager,
    resolve,
    write_atomically,
)
from evlgen.files.locks import sole_writer
from evlgen.weights import checkpoints
from evlgen.weights.checkpoints import (
    clear_unfinished,
    found_checkpoints,
    is_checkpoint,
    remove_old,
    update_symlink,
    write_folder,
)


def test_the_data_root_is_the_environments_then_the_configs_then_the_home_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path))
    assert cache_root("/configured") == tmp_path
    monkeypatch.delenv("EVLGEN_CACHE")
    assert cache_root("/configured") == Path("/configured")
    assert cache_root() == Path.home() / ".cache" / "evlgen"


def test_addresses_inside_the_package(tmp_path):
    assert resolve("evlgen://configs/default.yaml") == str(PACKAGE_ROOT / "configs" / "default.yaml")
    assert resolve(tmp_path / "x") == str(tmp_path / "x")
    assert resolve("file:///a%20b/c.png") == "/a b/c.png"


def test_paths_below_the_data_root_and_none_outside(tmp_path, monkeypatch):
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path / "root"))
    assert resolve("cache://parts/model") == str((tmp_path / "root" / "parts" / "model").resolve())
    for path in ("cache://../other", "cache://parts/../../other"):
        with pytest.raises(DataError, match="leads out of the data root"):
            resolve(path)


def test_addresses_that_nothing_reads_are_refused_and_registered_ones_read():
    with pytest.raises(DataError, match="nothing here reads store:// addresses. Register an iopath handler"):
        resolve("store://bucket/x")
    with pytest.raises(DataError, match="is on another machine, host"):
        resolve("file://host/x")

    class Store(PathHandler):
        def _get_supported_prefixes(self):
            return ["mine://"]

        def _get_local_path(self, path, force=False, **kwargs):
            return f"/mnt/{path.removeprefix('mine://')}"

    path_manager.cache_clear()
    path_manager().register_handler(Store())
    try:
        assert resolve("mine://bucket/x") == "/mnt/bucket/x"
    finally:
        path_manager.cache_clear()


@pytest.fixture
def server(tmp_path):
    """Serves a folder on the loopback address; gives (folder, address)."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def test_a_file_is_downloaded_once(server, monkeypatch, tmp_path):
    folder, address = server
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path / "cache"))
    (folder / "a b.bin").write_bytes(b"weights")
    first = resolve(f"{address}/a%20b.bin")
    assert Path(first).read_bytes() == b"weights" and Path(first).is_relative_to(tmp_path / "cache")
    (folder / "a b.bin").unlink()
    assert resolve(f"{address}/a%20b.bin") == first


def test_a_failed_download_leaves_nothing_and_says_where_the_file_may_be_put(server, monkeypatch, tmp_path):
    _, address = server
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="could not be downloaded.*put it at"):
        resolve(f"{address}/missing.bin")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_an_address_cannot_place_a_file_outside_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path))
    for path in ("../../x", "%2e%2e/%2e%2e/x", "/a/../../x"):
        assert download_target(f"http://host/{path}").resolve().is_relative_to(tmp_path)


def test_a_file_whose_writing_fails_keeps_what_was_there(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_whose_writing_fails_keeps_what_was_there(tmp_path):
    write_folder(tmp_path / "step_1", lambda f: (f / "x").write_text("old"))

    def fail(folder):
        (folder / "x").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "step_1", fail)
    assert (tmp_path / "step_1" / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


def test_old_checkpoints_go_and_those_pointed_at_stay(tmp_path):
    def fill(folder):
        (folder / "model.safetensors").touch()
        (folder / "config.yaml").touch()

    for step in range(1, 6):
        write_folder(tmp_path / f"step_{step:08d}", fill)
    update_symlink(tmp_path / "best", tmp_path / "step_00000002")
    update_symlink(tmp_path / "latest", tmp_path / "step_00000004")
    update_symlink(tmp_path / "latest", tmp_path / "step_00000005")
    remove_old(tmp_path, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best",
        "latest",
        "step_00000002",
        "step_00000004",
        "step_00000005",
    ]
    assert (tmp_path / "latest").resolve().name == "step_00000005"
    assert is_checkpoint(tmp_path / "latest") and not is_checkpoint(tmp_path)


def test_a_folder_where_a_link_should_be_is_kept_under_another_name(tmp_path):
    for name in ("step_1", "best"):
        (tmp_path / name).mkdir()
    (tmp_path / "best" / "weights").write_text("copied")
    update_symlink(tmp_path / "best", tmp_path / "step_1")
    assert (tmp_path / "best").resolve() == tmp_path / "step_1"
    assert (tmp_path / "best.copied" / "weights").read_text() == "copied"


def test_a_copied_folder_does_not_stop_the_second_copy(tmp_path):
    for copies in (["best.copied"], ["best.copied", "best.copied1"]):
        (tmp_path / "best").unlink(missing_ok=True)
        (tmp_path / "best").mkdir()
        update_symlink(tmp_path / "best", tmp_path / "step_1")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["best", *copies]
    (tmp_path / "latest").mkdir()
    update_symlink(tmp_path / "latest", tmp_path / "latest")  # a run folder of which only this copy is left
    assert (tmp_path / "latest").is_dir()


# ---- the order of checkpoints ----


def save(folder: Path, iteration: int, **state) -> Path:
    """A checkpoint of small files."""

    def fill(at: Path) -> None:
        (at / "model.safetensors").write_text(f"weights of {iteration}")
        (at / "config.yaml").touch()
        (at / "training_state").mkdir()
        (at / "training_state" / "progress.json").write_text(json.dumps({"iteration": iteration, **state}))
        write_digests(at)

    return write_folder(folder / f"step_{iteration:08d}", fill)


def test_the_iteration_orders_checkpoints_whatever_the_clock_says(tmp_path):
    run = tmp_path / "run"
    for iteration in (5, 10, 15, 20):
        folder = save(run, iteration)
        for path in [folder, *folder.rglob("*")]:
            os.utime(path, (1e9 - iteration, 1e9 - iteration))  # the clock runs backwards
    assert [p.name[-2:] for p in found_checkpoints(run)] == ["20", "15", "10", "05"]
    shutil.copytree(run, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in sorted((tmp_path / "copy").rglob("*"), reverse=True):
        path.touch()
    remove_old(tmp_path / "copy", keep_last=2)
    assert [p.name[-2:] for p in found_checkpoints(tmp_path / "copy")] == ["20", "15"]
    (run / "step_00000005").rename(run / "step_renamed")  # the state counts, not the name
    assert [p.name[-2:] for p in found_checkpoints(run)] == ["20", "15", "10", "ed"]


def test_what_is_saved_after_going_back_is_newer_than_what_was_left(tmp_path):
    for iteration, rewinds in ((10, 0), (20, 0), (5, 1)):
        save(tmp_path, iteration, rewinds=rewinds)
    assert [p.name[-2:] for p in found_checkpoints(tmp_path)] == ["05", "20", "10"]


@pytest.mark.parametrize(
    "state", ["", "[]", "{", '{"iteration": -3}', '{"iteration": "7"}', '{"iteration": true}']
)
def test_a_checkpoint_whose_state_says_nothing_counts_by_its_name(tmp_path, state):
    for iteration in (9, 10, 11):
        save(tmp_path, iteration)
    (tmp_path / "step_00000010" / "training_state" / "progress.json").write_text(state)
    assert [p.name[-2:] for p in found_checkpoints(tmp_path)] == ["11", "10", "09"]


# ---- one whole copy at every instant ----


@pytest.fixture
def quick_disk(monkeypatch):
    """Nothing is waited for: what reaches the disk is not what these tests look at."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def check_whole(folder: Path) -> None:
    assert is_checkpoint(folder)
    check_digests(folder)


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_save_over_a_checkpoint_may_be_killed_at_any_system_call(
    quick_disk, tmp_path, monkeypatch, exchanges
):
    if not exchanges:
        monkeypatch.setattr(checkpoints, "exchange", lambda one, other: False)
    target = tmp_path / "step_00000004"
    for iteration in (3, 4):
        update_symlink(tmp_path / "latest", save(tmp_path, iteration))

    def save_again() -> None:
        update_symlink(tmp_path / "latest", save(tmp_path, 4, again=True))
        remove_old(tmp_path, 2)

    calls = []
    for call in deaths(save_again, (checkpoints, "exchange")):
        calls.append(call)
        if exchanges:
            check_whole(target)
            check_whole(tmp_path / "latest")
        check_whole(found_checkpoints(tmp_path)[0])
        clear_unfinished(tmp_path)  # as the next start does
        check_whole(target)
        check_whole(tmp_path / "latest")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000003", "step_00000004"]
        save(tmp_path, 4)
    assert {"exchange", "fsync", "unlink", "symlink", "replace", "mkdir", "rmdir"} <= set(calls)


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_disk_that_fails_during_a_save_over_a_checkpoint_leaves_a_whole_one(
    quick_disk, tmp_path, monkeypatch, exchanges
):
    if not exchanges:
        monkeypatch.setattr(checkpoints, "exchange", lambda one, other: False)
    target = save(tmp_path, 4)
    full = OSError(errno.EIO, "Input/output error")
    assert len([check_whole(target) for _ in deaths(lambda: save(tmp_path, 4), error=full)]) > 8


def test_removing_old_checkpoints_may_be_killed_at_any_system_call(quick_disk, tmp_path):
    def save_three() -> None:
        for iteration in (1, 2, 3):
            save(tmp_path, iteration)

    save_three()
    for _ in deaths(lambda: remove_old(tmp_path, 1)):
        for left in found_checkpoints(tmp_path):
            check_whole(left)
        clear_unfinished(tmp_path)
        assert all(p.name.startswith("step_") for p in tmp_path.iterdir())
        save_three()


# ---- digests ----


def test_any_file_that_changes_after_it_was_saved_is_found(tmp_path):
    folder = save(tmp_path, 1)
    listed = (folder / DIGESTS_FILE).read_text()
    files = [line.split("  ")[1] for line in listed.splitlines()]
    assert files == ["config.yaml", "model.safetensors", "training_state/progress.json"]
    done = subprocess.run(["sha256sum", "--check", DIGESTS_FILE], cwd=folder, capture_output=True)
    assert done.returncode == 0
    for name in files:
        path = folder / name
        content, times = path.read_bytes(), path.stat()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if content else b"x")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(CheckpointError, match=f"its {path.name} does not match its digest"):
            check_digests(folder)
        path.unlink()
        with pytest.raises(CheckpointError, match=f"its {path.name} is missing"):
            check_digests(folder)
        path.write_bytes(content)
        check_digests(folder)
    for damaged in ("", "x", listed[5:], "0" * 64 + "  ../x", "0" * 64 + "  /dev/zero", b"\xff"):
        (folder / DIGESTS_FILE).write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
        with pytest.raises(CheckpointError, match=DIGESTS_FILE):
            check_digests(folder)
    (folder / DIGESTS_FILE).unlink()  # as older versions wrote checkpoints
    check_digests(folder)


def test_a_file_and_its_digest_match_whenever_a_replacement_is_killed(quick_disk, tmp_path):
    folder, numbers = save(tmp_path, 1), iter(range(100))
    name = "training_state/progress.json"
    for _ in deaths(lambda: replace_file(folder, name, json.dumps({"iteration": next(numbers)}))):
        check_digests(folder)
        clear_unfinished(tmp_path)
        assert sorted(p.name for p in (folder / "training_state").iterdir()) == ["progress.json"]
    check_digests(folder)
    assert json.loads((folder / name).read_text())["iteration"] > 3
    assert len((folder / DIGESTS_FILE).read_text().splitlines()) == 3


# ---- one writer of a folder ----

HOLDER = """
import os, sys, time
from pathlib import Path
from evlgen.files.locks import sole_writer
with sole_writer(Path(sys.argv[1])):
    child = os.fork()  # as a data-loading worker
    if child:
        print(child, flush=True)
    time.sleep(60)
    os._exit(0)
"""


def test_a_folder_has_one_writer_and_a_dead_one_leaves_no_lock(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(TrainingError, match=f"in use: process {holder.pid} on .* run.resume=null"):
            sole_writer(tmp_path).__enter__()
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # the worker lives on for a while
        for _ in range(300):  # it gives its copy of the lock away as soon as it runs
            with contextlib.suppress(TrainingError), sole_writer(tmp_path):
                break
            time.sleep(0.1)
        with sole_writer(tmp_path):
            with pytest.raises(TrainingError, match="this process"), sole_writer(tmp_path / "." / ""):
                pass
            with sole_writer(tmp_path.parent):
                pass
    finally:
        os.kill(child, 9)
        holder.stdout.close()
    assert not list(tmp_path.iterdir())
    with sole_writer(tmp_path):
        pass
