"""Paths of every kind, files that appear whole or not at all, and checkpoint folders."""

from __future__ import annotations

import functools
import http.server
import threading
from pathlib import Path

import pytest
from iopath.common.file_io import PathHandler

from evlgen.common.checkpoints import is_checkpoint, point, remove_old, write_folder
from evlgen.common.errors import DataError
from evlgen.common.io import (
    PACKAGE_ROOT,
    atomic_file,
    cache_root,
    download_target,
    path_manager,
    resolve,
    write_atomically,
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
    point(tmp_path / "best", tmp_path / "step_00000002")
    point(tmp_path / "latest", tmp_path / "step_00000004")
    point(tmp_path / "latest", tmp_path / "step_00000005")
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
    point(tmp_path / "best", tmp_path / "step_1")
    assert (tmp_path / "best").resolve() == tmp_path / "step_1"
    assert (tmp_path / "best.copied" / "weights").read_text() == "copied"
