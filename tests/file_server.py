"""A file server on this machine that does what real ones do: ranges, marks of versions, and faults."""

from __future__ import annotations

import contextlib
import http.server
import re
import socketserver
import threading
from collections.abc import Iterator


def error(status: int) -> tuple[str, int]:
    """A fault: this HTTP error."""
    return "error", status


def cut(size: int) -> tuple[str, int]:
    """A fault: the connection ends after so many bytes of the body."""
    return "cut", size


class FileServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Serves `files`, and writes down what was asked and what was sent.

    Attributes:
        files: content by path, such as ``/a.bin``.
        etags: the mark of a version, by path; none: the server gives none.
        headers: of every file besides.
        faults: what the next requests meet, the first of them first: an `error` or a `cut`.
        has_ranges: whether it heeds Range.
        heeds_if_range: whether it heeds If-Range besides.
        shift: by how many bytes the parts that it sends start too late.
        requests: path and Range header of each request.
        conditions: the If-Range header of each request that has one.
        sent: body bytes of each answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.headers: dict[str, str] = {}
        self.faults: list[tuple[str, int]] = []
        self.has_ranges = True
        self.heeds_if_range = True
        self.shift = 0
        self.conditions: list[str] = []
        self.requests: list[tuple[str, str | None]] = []
        self.sent: list[int] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that goes away is no trouble here."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FileServer

    def log_message(self, *args) -> None:
        """Nobody reads it."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Range")))
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        server = self.server
        kind, number = server.faults.pop(0) if with_body and server.faults else (None, None)
        if self.path not in server.files or kind == "error":
            self.send_error(number if kind == "error" else 404)
            return
        whole, etag = server.files[self.path], server.etags.get(self.path)
        start = self.start(etag) if server.has_ranges else None
        if start is not None and start >= len(whole):
            self.send_error(416)
            return
        body = whole[start or 0 :]
        self.send_response(200 if start is None else 206)
        if start is not None:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        for name, value in {**server.headers, **({} if etag is None else {"ETag": etag})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            server.sent.append(len(body[:number]))
            self.wfile.write(body[:number])

    def start(self, etag: str | None) -> int | None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        self.server.conditions += [condition] if condition else []
        if asked is None or (self.server.heeds_if_range and condition is not None and condition != etag):
            return None
        return int(asked[1]) + self.server.shift


@contextlib.contextmanager
def file_server() -> Iterator[FileServer]:
    """A server that is up for as long."""
    server = FileServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
