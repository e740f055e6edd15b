"""Downloads that break off go on where they were, and never mix two files."""

from __future__ import annotations

import hashlib
import logging
import random
import shutil
import threading
from pathlib import Path

import pytest
from file_server import FileServer, cut, error, file_server

from evlgen.common.errors import DataError
from evlgen.files import downloads
from evlgen.files.downloads import as_size, fetch, length_of

BODY = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)
MD5 = hashlib.md5(BODY).hexdigest()


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(downloads, "PAUSES", (0, 0))
    with file_server() as server:
        server.files["/a.bin"] = BODY
        server.etags["/a.bin"] = '"one"'
        yield server


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def begun(server: FileServer, target: Path, md5: str | None = None) -> None:
    """A first run that gets 100,000 bytes and then nobody."""
    server.faults = [cut(100_000), error(503), error(503), error(503)]
    with pytest.raises(DataError, match=r"503.*100 kB of it are kept: try again"):
        fetch(f"{server.address}/a.bin", target, md5)
    assert names(target.parent) == [".a.bin.part", ".a.bin.part.json"]
    server.requests, server.sent, server.faults = [], [], []


@pytest.mark.parametrize("md5", [None, MD5])
def test_a_cut_connection_is_taken_up_where_it_broke_off(server, tmp_path, md5) -> None:
    server.faults = [cut(100_000), error(500), cut(5), cut(150_000)]
    path = fetch(f"{server.address}/a.bin", tmp_path / "a.bin", md5)
    assert path.read_bytes() == BODY and names(tmp_path) == ["a.bin"]
    assert server.sent == [100_000, 5, 150_000, 49_995]
    assert [r for _, r in server.requests] == [
        None,
        "bytes=100000-",
        "bytes=100000-",
        "bytes=100005-",
        "bytes=250005-",
    ]


@pytest.mark.parametrize("md5", [None, MD5])
def test_the_next_run_asks_only_for_what_is_missing(server, tmp_path, md5) -> None:
    begun(server, tmp_path / "a.bin", md5)
    assert fetch(f"{server.address}/a.bin", tmp_path / "a.bin", md5).read_bytes() == BODY
    assert server.sent == [200_000] and names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("heeds_if_range", [True, False])
def test_a_file_that_has_changed_meanwhile_is_fetched_whole(server, tmp_path, heeds_if_range) -> None:
    begun(server, tmp_path / "a.bin")
    server.files["/a.bin"], server.etags["/a.bin"] = OTHER, '"two"'
    server.heeds_if_range = heeds_if_range
    assert fetch(f"{server.address}/a.bin", tmp_path / "a.bin").read_bytes() == OTHER
    assert server.sent[-1] == len(OTHER) and server.conditions[-1] == '"one"'


def test_a_file_that_has_become_shorter_is_fetched_whole(server, tmp_path) -> None:
    begun(server, tmp_path / "a.bin")
    server.files["/a.bin"], server.heeds_if_range = OTHER[:50_000], False
    assert fetch(f"{server.address}/a.bin", tmp_path / "a.bin").read_bytes() == OTHER[:50_000]


@pytest.mark.parametrize("changed", [OTHER[:200_000], OTHER + OTHER], ids=["shorter", "longer"])
def test_a_part_of_a_file_of_another_length_is_not_taken(server, tmp_path, changed) -> None:
    """Its mark is the same: servers may make marks of what they like."""
    begun(server, tmp_path / "a.bin")
    server.files["/a.bin"] = changed
    assert fetch(f"{server.address}/a.bin", tmp_path / "a.bin").read_bytes() == changed
    assert server.requests == [("/a.bin", "bytes=100000-"), ("/a.bin", None)]


def test_a_part_from_another_place_is_not_taken(server, tmp_path) -> None:
    begun(server, tmp_path / "a.bin")
    server.shift = 7
    assert fetch(f"{server.address}/a.bin", tmp_path / "a.bin").read_bytes() == BODY
    assert server.requests == [("/a.bin", "bytes=100000-"), ("/a.bin", None)]


def test_a_server_without_ranges_sends_the_whole_again(server, tmp_path) -> None:
    server.has_ranges = False
    begun(server, tmp_path / "a.bin")
    assert fetch(f"{server.address}/a.bin", tmp_path / "a.bin").read_bytes() == BODY
    assert server.sent == [300_000]


def test_a_server_that_always_breaks_off_at_the_same_place_is_given_up(server, tmp_path) -> None:
    server.has_ranges, server.faults = False, [cut(100_000)] * 9
    with pytest.raises(DataError, match="broke off after 100000 of 300000 bytes"):
        fetch(f"{server.address}/a.bin", tmp_path / "a.bin")
    assert len(server.sent) == 1 + len(downloads.PAUSES)


def test_without_a_mark_and_a_sum_no_beginning_is_kept(server, tmp_path) -> None:
    """Nothing would tell whether the rest is of the same file."""
    server.etags["/a.bin"], server.faults = 'W/"weak"', [cut(100_000)] * 3
    with pytest.raises(DataError, match="broke off"):
        fetch(f"{server.address}/a.bin", tmp_path / "a.bin")
    assert names(tmp_path) == [] and [r for _, r in server.requests] == [None] * 3


def test_a_published_sum_makes_up_for_a_mark(server, tmp_path) -> None:
    del server.etags["/a.bin"]
    begun(server, tmp_path / "a.bin", MD5)
    server.files["/a.bin"] = OTHER
    with pytest.raises(DataError, match="was refused: its md5 is .* Nothing was kept"):
        fetch(f"{server.address}/a.bin", tmp_path / "a.bin", MD5)
    assert server.sent == [200_000] and names(tmp_path) == []
    server.files["/a.bin"] = BODY
    assert fetch(f"{server.address}/a.bin", tmp_path / "a.bin", MD5).read_bytes() == BODY


def test_a_beginning_of_another_address_or_with_a_damaged_record_is_not_continued(server, tmp_path) -> None:
    server.files["/b.bin"], server.etags["/b.bin"] = OTHER, '"one"'
    begun(server, tmp_path / "a.bin")
    assert fetch(f"{server.address}/b.bin", tmp_path / "a.bin").read_bytes() == OTHER
    (tmp_path / "a.bin").unlink()
    begun(server, tmp_path / "a.bin")
    (tmp_path / ".a.bin.part.json").write_text('{"url": ')
    assert fetch(f"{server.address}/a.bin", tmp_path / "a.bin").read_bytes() == BODY


def test_whole_content_whose_last_step_was_missing_is_not_fetched_again(server, tmp_path) -> None:
    begun(server, tmp_path / "a.bin")
    (tmp_path / ".a.bin.part").write_bytes(BODY)
    assert fetch(f"{server.address}/a.bin", tmp_path / "a.bin", MD5).read_bytes() == BODY
    assert server.requests == []


@pytest.mark.parametrize("fault", [500, 502, 503, 429, 408])
def test_a_passing_trouble_of_the_server_is_waited_out(server, tmp_path, fault) -> None:
    server.faults = [error(fault), error(fault)]
    assert fetch(f"{server.address}/a.bin", tmp_path / "a.bin").read_bytes() == BODY


@pytest.mark.parametrize("fault", [401, 403, 404, 410])
def test_an_answer_that_will_not_change_is_not_asked_for_again(server, tmp_path, fault) -> None:
    server.faults = [error(fault)]
    with pytest.raises(DataError, match=str(fault)):
        fetch(f"{server.address}/a.bin", tmp_path / "a.bin")
    assert len(server.requests) == 1 and names(tmp_path) == []


def test_an_interrupted_download_goes_on(server, tmp_path, monkeypatch) -> None:
    chunk = downloads._chunk

    def interrupted(answer):
        if calls:
            raise KeyboardInterrupt
        calls.append(answer)
        return chunk(answer)

    calls: list = []
    monkeypatch.setattr(downloads, "_CHUNK", 120_000)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(downloads, "_chunk", interrupted)
        fetch(f"{server.address}/a.bin", tmp_path / "a.bin")
    assert names(tmp_path) == [".a.bin.part", ".a.bin.part.json"]
    assert fetch(f"{server.address}/a.bin", tmp_path / "a.bin").read_bytes() == BODY
    assert server.requests[-1] == ("/a.bin", "bytes=120000-")


def test_a_disk_without_room_is_said_before_anything_is_written(server, tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage._replace(free=299_999))
    with pytest.raises(DataError, match="300 kB are still to come and 300 kB are free") as caught:
        fetch(f"{server.address}/a.bin", tmp_path / "a.bin")
    assert caught.value.cause == "disk full" and names(tmp_path) == []


def test_two_at_once_fetch_it_once(server, tmp_path, monkeypatch, caplog) -> None:
    chunk, holding = downloads._chunk, threading.Event()
    waiting = threading.Event()

    def slow(answer):
        holding.set()
        assert waiting.wait(10)
        return chunk(answer)

    class Waits(logging.Handler):
        def emit(self, record):
            if "waiting for it" in record.getMessage():
                waiting.set()

    monkeypatch.setattr(downloads, "_chunk", slow)
    logger = logging.getLogger("evlgen.files.locks")
    handler = Waits()
    logger.addHandler(handler)
    with caplog.at_level(logging.INFO, "evlgen.files.locks"):
        arguments = (f"{server.address}/a.bin", tmp_path / "a.bin")
        first = threading.Thread(target=fetch, args=arguments)
        first.start()
        assert holding.wait(10)
        assert fetch(*arguments).read_bytes() == BODY
        first.join()
    logger.removeHandler(handler)
    assert server.sent == [300_000] and names(tmp_path) == ["a.bin"]


def test_a_server_is_asked_for_the_size(server) -> None:
    assert length_of(f"{server.address}/a.bin") == 300_000
    with pytest.raises(DataError, match="404"):
        length_of(f"{server.address}/b.bin")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (13_510_573_713, "13.5 GB"), (2e12, "2.0 TB")],
)
def test_sizes_are_written_for_people(size, text) -> None:
    assert as_size(size) == text
