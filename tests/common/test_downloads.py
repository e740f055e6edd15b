"""Downloads land whole and with the published sum, or not at all: from a server that misbehaves."""

from __future__ import annotations

import base64
import hashlib
import http.server
import os
import random
import socketserver
import threading
from pathlib import Path

import pytest

from evlgen.common.errors import DataError
from evlgen.files import downloads
from evlgen.files.downloads import fetch, file_md5
from evlgen.files.io import download, download_target

BODY = random.Random(0).randbytes(300_000)
MD5 = hashlib.md5(BODY).hexdigest()
OTHER = hashlib.md5(b"other").digest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Each path is a way to answer, good or bad."""

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        way = self.path.strip("/").partition("?")[0].removesuffix(".bin")
        getattr(self, f"answer_{way}", self.answer_missing)()

    def send(self, *headers: tuple[str, str], length: int | None = len(BODY), body: bytes = BODY) -> None:
        self.send_response(200)
        for name, value in headers:
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def answer_good(self) -> None:
        self.send()

    def answer_no_length(self) -> None:
        self.send(length=None)

    def answer_same_sum(self) -> None:
        sent = base64.b64encode(bytes.fromhex(MD5)).decode()
        self.send(("x-goog-hash", "crc32c=AAAAAA=="), ("x-goog-hash", f"md5={sent}"), ("Content-MD5", sent))

    def answer_other_google_sum(self) -> None:
        self.send(("x-goog-hash", f"crc32c=AAAAAA==,md5={base64.b64encode(OTHER).decode()}"))

    def answer_other_content_md5(self) -> None:
        self.send(("Content-MD5", base64.b64encode(OTHER).decode()))

    def answer_cut(self) -> None:
        self.send(body=BODY[:200_000])
        self.wfile.flush()
        self.connection.close()

    def answer_cut_chunk(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"10000\r\n" + BODY[:100])
        self.wfile.flush()
        self.connection.close()

    def answer_longer_than_announced(self) -> None:
        self.send(length=1000)

    def answer_missing(self) -> None:
        self.send_error(404)

    def answer_broken(self) -> None:
        self.send_error(503)

    def answer_no_http(self) -> None:
        self.wfile.write(b"what?\r\n\r\n")

    def answer_loop(self) -> None:
        self.redirect("/loop.bin")

    def answer_moved(self) -> None:
        self.redirect("/good.bin")

    def answer_to_file(self) -> None:
        self.redirect("file:///etc/passwd")

    def answer_to_ftp(self) -> None:
        self.redirect("ftp://127.0.0.1/x")

    def redirect(self, place: str) -> None:
        self.send_response(302)
        self.send_header("Location", place)
        self.end_headers()


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        pass


@pytest.fixture(scope="module")
def address():
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "PAUSES", (0, 0))
    return tmp_path / "cache"


def files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if not p.is_dir()]


@pytest.mark.parametrize("way", ["good", "no_length", "same_sum", "moved"])
@pytest.mark.parametrize("md5", [None, MD5, MD5.upper()])
def test_a_good_answer_lands(address, cache, way: str, md5: str | None) -> None:
    path = download(f"{address}/{way}.bin", md5)
    assert path.read_bytes() == BODY and file_md5(path) == MD5
    assert files(cache) == [path] and path.stat().st_mode & 0o777 == 0o666 & ~_umask()


@pytest.mark.parametrize(
    ("way", "md5", "message"),
    [
        ("good", hashlib.md5(b"other").hexdigest(), "was refused: its md5 is"),
        ("no_length", hashlib.md5(b"other").hexdigest(), "was refused: its md5 is"),
        ("longer_than_announced", MD5, "was refused: its md5 is"),
        ("cut", None, "broke off after [0-9]+ of 300000 bytes|[Cc]onnection"),
        ("cut_chunk", None, "IncompleteRead|[Cc]onnection"),
        ("other_google_sum", None, "the server announced"),
        ("other_content_md5", None, "the server announced"),
        ("missing", None, "404"),
        ("broken", MD5, "503"),
        ("no_http", None, "could not be downloaded"),
        ("loop", None, "could not be downloaded"),
        ("to_file", None, "not allowed"),
        ("to_ftp", None, "leads from http to ftp"),
    ],
)
def test_a_bad_answer_leaves_nothing_and_keeps_what_was_there(address, cache, way, md5, message) -> None:
    url = f"{address}/{way}.bin"
    with pytest.raises(DataError, match=message) as caught:
        download(url, md5)
    assert url in str(caught.value) and files(cache) == []
    before = cache / "mine.bin"
    before.parent.mkdir(exist_ok=True)
    before.write_bytes(b"mine")
    with pytest.raises(DataError, match=message):
        fetch(url, before, md5)
    assert files(cache) == [before] and before.read_bytes() == b"mine"


def test_nobody_answering_is_named_with_the_place_for_the_file(cache, monkeypatch) -> None:
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: pytest.fail("nobody is waited for"))
    with socketserver.TCPServer(("127.0.0.1", 0), None) as free:
        url = f"http://127.0.0.1:{free.server_address[1]}/x.bin"
    with pytest.raises(DataError, match=r"could not be downloaded .*put it at .*x-.*\.bin"):
        download(url)
    assert files(cache) == []


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1", "http://host:99999/x", "http://../x", "https:///x"]
)
def test_what_is_no_address_is_named(url: str) -> None:
    with pytest.raises(DataError, match="is no address"):
        download(url)


def test_a_cache_that_takes_no_files_is_named(address, cache) -> None:
    cache.write_text("a file")
    with pytest.raises(DataError, match="could not be downloaded"):
        download(f"{address}/good.bin")
    assert cache.read_text() == "a file"


def test_a_redirection_from_https_to_http_is_not_followed() -> None:
    import urllib.error
    import urllib.request

    from evlgen.files.downloads import _SafeRedirects

    request = urllib.request.Request("https://host/x")
    arguments = (request, None, 302, "", {})
    with pytest.raises(urllib.error.URLError, match="from https to http:"):
        _SafeRedirects().redirect_request(*arguments, "http://host/x")
    assert _SafeRedirects().redirect_request(*arguments, "https://other/x").full_url == "https://other/x"


def test_every_address_has_a_path_of_its_own_inside_the_cache(cache) -> None:
    urls = [
        "https://host/a.bin?id=1",
        "https://host/a.bin?id=2",
        "https://host/a.bin",
        "https://user:word@host/b.bin",
        "https://host:8080/a.bin",
        "https://host/" + "long/" * 200 + "a.safetensors",
        "https://host/" + "long/" * 200 + "b.safetensors",
        "https://host/a%00b%2fc%5cd%0a.bin",
        "https://host/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "https://a..b/x",
        "https://host",
        "https://host/a/1.png",
        "https://host/a_1.png",
        "https://host/A_1.png",
        "https://host/a%2f1.png",
        "http://host/a/1.png",
        "https://host/a/1.tar.gz",
        "https://host/1.tar.gz",
        "https://host/.hidden",
    ]
    paths = [download_target(url) for url in urls]
    assert len({str(path).lower() for path in paths}) == len(urls)  # some disks do not tell A from a
    for path in paths:
        assert path.resolve().is_relative_to(cache / "downloads")
        assert len(path.name.encode()) < 200 and path.name.isprintable() and "word" not in str(path)
    assert paths[0].suffix == ".bin" and paths[5].suffix == ".safetensors"
    assert all(path.name.startswith("1-") and path.name.endswith(".tar.gz") for path in paths[16:18])
    assert download_target("https://me:word@host/b.bin#part") == paths[3]


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
