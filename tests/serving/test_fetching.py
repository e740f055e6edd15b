"""Images at addresses: only public ones, within limits."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest
from serving_requests import encoded, image, question

from evlgen.serving.errors import Refusal
from evlgen.serving.fetching import Fetcher, is_public

PNG = encoded(image())


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),  # where clouds keep credentials
        ("100.64.0.1", False),
        ("100.100.100.200", False),
        ("192.0.2.1", False),
        ("198.18.0.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fc00::1", False),
        ("fd00:ec2::254", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("2001:db8::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("::127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b:1::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2002:a9fe:a9fe::1", False),
        ("2001:0:7f00:1::", False),
    ],
)
def test_which_addresses_are_public(address, public):
    assert is_public(ipaddress.ip_address(address)) is public


class _Server(socketserver.ThreadingTCPServer):
    """Answers each path with raw bytes, or by a function of the connection; notes the heads it reads."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict = {}
        self.heads: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """Clients that leave are what is tested."""


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.rfile.readline()
        self.server.heads.append(head.decode())
        answer = self.server.answers[head.split()[1].decode()]
        if callable(answer):
            answer(self.wfile)
        else:
            self.wfile.write(answer)


def _image(content: bytes = PNG, kind: str = "image/png", more: str = "") -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{more}\r\n".encode() + content


def _to(target: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode()


@pytest.fixture(scope="module")
def web() -> Iterator[_Server]:
    server = _Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def _fetch(url: str, **settings):
    settings = {"max_bytes": 100_000, "seconds": 5.0, "may_connect": lambda _: True, **settings}
    return asyncio.run(Fetcher(**settings).fetch(url))


def test_an_image_is_fetched_through_redirections(web):
    web.answers = {
        "/a.png?size=1": _image(more="Content-Length: " + str(len(PNG)) + "\r\n"),
        "/moved": _to("/again"),
        "/again": _to(f"{web.address}/a.png?size=1"),
    }
    assert _fetch(f"{web.address}/a.png?size=1") == (PNG, "image/png")
    assert _fetch(f"{web.address}/moved") == (PNG, "image/png")
    assert f"Host: 127.0.0.1:{web.server_address[1]}" in web.heads[0]
    with pytest.raises(Refusal, match="more than 1 times"):
        _fetch(f"{web.address}/moved", max_redirects=1)


def test_addresses_that_are_not_public_are_never_connected_to(web):
    web.answers, web.heads = {"/": _image()}, []
    port = web.server_address[1]
    for host in ("127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"):
        with pytest.raises(Refusal, match="not a public address|host is not known"):
            asyncio.run(Fetcher(1000).fetch(f"http://{host}:{port}/"))
    assert web.heads == []


def test_a_redirection_to_an_address_that_is_not_public_is_not_followed(web):
    web.answers = {"/out": _to("http://127.0.0.2:1/secret"), "/file": _to("file:///etc/passwd")}
    with pytest.raises(Refusal, match="not a public address"):
        _fetch(f"{web.address}/out", may_connect=lambda address: str(address) == "127.0.0.1")
    with pytest.raises(Refusal, match="not an http"):
        _fetch(f"{web.address}/file")


def test_a_name_is_resolved_once_for_the_check_and_the_connection(web, monkeypatch):
    """A name that changes its meaning after the check leads nowhere else."""
    web.answers = {"/": _image()}
    asked = []
    resolve = socket.getaddrinfo

    def changing(host, *rest, **named):
        if host != "rebinding.example":
            return resolve(host, *rest, **named)
        asked.append(host)
        return resolve("127.0.0.1" if len(asked) == 1 else "127.0.0.9", *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    url = f"http://rebinding.example:{web.server_address[1]}/"
    assert _fetch(url, may_connect=lambda address: str(address) == "127.0.0.1")[0] == PNG
    assert len(asked) == 1
    both = [*resolve("127.0.0.1", 80), *resolve("127.0.0.9", 80)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(Refusal, match="not a public address"):  # one of a name's addresses is enough
        _fetch(url, may_connect=lambda address: str(address) == "127.0.0.1")


def test_answers_that_are_no_image_are_refused(web):
    def endless(file) -> None:
        file.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            file.write(b"4000\r\n" + bytes(0x4000) + b"\r\n")

    web.answers = {
        "/404": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        "/html": _image(kind="text/html"),
        "/none": b"HTTP/1.1 200 OK\r\n\r\n" + PNG,
        "/gzip": _image(more="Content-Encoding: gzip\r\n"),
        "/long": _image(more="Content-Length: 100001\r\n"),
        "/endless": endless,
        "/cut": _image(PNG[:20], more=f"Content-Length: {len(PNG)}\r\n"),
        "/head": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000,
        "/no-http": b"SSH-2.0-OpenSSH\r\n\r\n",
        "/nothing": b"",
        "/number": _image(more="Content-Length: ten\r\n"),
    }
    for path in web.answers:
        with pytest.raises(Refusal):
            _fetch(f"{web.address}{path}")
    for url in (
        "http://user:secret@example.com/a.png",
        "http:///a.png",
        "http://example.com:99999/",
        "http://example.com/\r\nX: y",
        "https://" + "a" * 3000,
        "http://no-such-host.invalid/",
        "http://127.0.0.1:1/",
    ):
        with pytest.raises(Refusal):
            _fetch(url)


def test_a_slow_answer_ends_in_time(web):
    def drip(file) -> None:
        file.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            file.write(b"X")
            file.flush()
            time.sleep(0.05)

    web.answers = {"/": drip}
    started = time.monotonic()
    with pytest.raises(Refusal, match="within 0.4 seconds"):
        _fetch(f"{web.address}/", seconds=0.4)
    assert time.monotonic() - started < 5


def test_the_server_reads_addresses_where_it_was_told_to(start, web):
    web.answers = {"/a.png": _image(), "/svg": _image(b"<svg/>", "image/svg+xml")}
    fetcher = Fetcher(100_000, may_connect=lambda _: True)
    with start(fetcher=fetcher) as running:
        assert running.post(question(f"{web.address}/a.png"))[0] == 200
        status, body = running.post(question(f"{web.address}/svg"))
        assert (status, body["error"]["code"]) == (400, "unsupported_image_type")
    with start(fetcher=Fetcher(100_000)) as running:
        status, body = running.post(question(f"{web.address}/a.png"))
        assert (status, body["error"]["code"]) == (400, "image_url_refused")
