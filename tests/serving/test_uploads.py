"""Uploads of hostile clients: refused, within bounded memory and time."""

from __future__ import annotations

import io
import json
import socket
import struct
import threading
import time
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image
from serving_requests import answer_of, data_url, encoded, image, question

from evlgen.serving.errors import Refusal
from evlgen.serving.limits import Limits
from evlgen.serving.uploads import decode, from_data_url

PNG = encoded(image())
JPEG = encoded(image(), "JPEG")


def _png(width: int, height: int, depth: int, packed: bytes) -> bytes:
    """A grey PNG of packed rows."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def _png_of_size(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says it is so large, all of it black."""
    row = bytes(1 + (width + 7) // 8)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return _png(width, height, 1, rows)


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("payload.class", "x")
    return file.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>'
HOSTILE = {
    "empty": ("image/png", b""),
    "text": ("image/png", b"hello"),
    "cut": ("image/png", PNG[: len(PNG) // 2]),
    "damaged": ("image/jpeg", JPEG[:200] + bytes(80) + JPEG[280:320]),
    "bomb": ("image/png", _png_of_size(20000, 20000)),
    "above the limit": ("image/png", _png_of_size(1001, 1000)),
    "svg": ("image/svg+xml", SVG),
    "svg as png": ("image/png", SVG),
    "another type": ("image/png", JPEG),
    "no image type": ("text/html", PNG),
    "octets": ("application/octet-stream", PNG),
    "tiff": ("image/tiff", encoded(image(), "TIFF")),
    "postscript": ("image/png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "zip behind png": ("image/png", PNG + _zip()),
    "zip behind jpeg": ("image/jpeg", JPEG + _zip()),
    "zip behind gif": ("image/gif", encoded(image(), "GIF") + _zip()),
    "pdf in jpeg": ("image/jpeg", encoded(image(), "JPEG", comment=b"%PDF-1.7 obj")),
    "script in jpeg": ("image/jpeg", encoded(image(), "JPEG", comment=b"<script>alert(1)</script>")),
    "page in jpeg": ("image/jpeg", encoded(image(), "JPEG", comment=b"<HTML><body onload=alert(1)>")),
    "svg in jpeg": ("image/jpeg", encoded(image(), "JPEG", comment=b"<svg\nonload = alert(1)>")),
    "php behind png": ("image/png", PNG + b"<?php system('id'); ?>"),
    "tail behind png": ("image/png", PNG + b"MZ\x90"),
    "tail behind gif": ("image/gif", encoded(image(), "GIF") + b"=1;alert(1)"),
    "tail behind webp": ("image/webp", encoded(image(), "WEBP") + b"tail"),
    "scans": ("image/jpeg", JPEG[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" * 200 + JPEG[-2:]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_uploads_are_refused_with_a_reason(running, name):
    media_type, content = HOSTILE[name]
    status, body = running.post(question(data_url(content, media_type)))
    assert status == 400 and len(body["error"]["message"]) > 15
    assert body["error"]["type"] == "invalid_request_error" and body["error"]["param"] == "messages"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_sound_images_of_all_types_are_read(kind):
    content = encoded(image(), kind)
    media_type = f"image/{kind.lower()}"
    assert from_data_url(data_url(content, media_type)) == (content, media_type)
    assert decode(content, media_type, 10**6).size == image().size
    if kind in ("GIF", "PNG"):
        frames = [image(number) for number in range(3)]
        animated = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
        assert decode(animated, media_type, 10**6).size == image().size
    large = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    options = {"progressive": True} if kind == "JPEG" else {}
    assert decode(encoded(large, kind, **options), media_type, 10**6).size == (400, 300)


def test_pixels_that_look_like_the_beginning_of_markup_are_pixels():
    noise = np.random.default_rng(0).integers(128, 255, (40, 40), dtype=np.uint8)
    for row, text in enumerate((b"<svg ", b"<SVG>", b"<html", b"<?php", b"<Html\n")):
        noise[row, : len(text)] = list(text)
    rows = b"".join(b"\0" + row.tobytes() for row in noise)
    content = _png(40, 40, 8, zlib.compress(rows, 0))
    assert b"<svg " in content
    found = decode(content, "image/png", 10**6)
    assert np.array_equal(np.asarray(found)[..., 0], noise)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "data:",
        "data:image/png",
        "data:image/png,abc",
        "data:image/png;base64,a b c",
        "data:image/png;base64,YWJj=YWJj",
        "data:image/png;base64,caf\u00e9",
        "data:;base64,YWJj",
        "file:///etc/passwd",
        "/etc/passwd",
        "ftp://example.com/a.png",
        "http://127.0.0.1/a.png",
        "HTTPS://example.com/a.png",
        "evlgen://assets/shapes/vision.safetensors",
    ],
)
def test_other_addresses_are_not_read(running, url):
    status, body = running.post(question(url))
    assert status == 400 and body["error"]["code"] in (
        *("invalid_image_url", "image_url_refused", "invalid_base64_image", "unsupported_image_type"),
    )


def test_bodies_that_are_no_requests_are_refused(running):
    deep = b"[" * 100_000
    for body in (b"", b"{", b"[]", b"null", b"\xff\xfe", deep, b'{"model": NaN}', b'{"a":' * 5000):
        status, answer = running.post(body)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), body[:20]
    body = json.dumps(question(data_url(PNG))).encode()
    for headers in (
        "Content-Type: text/plain\n",
        "Content-Type: multipart/form-data; boundary=x\n",
        "Content-Type: application/json\nContent-Encoding: gzip\n",
    ):
        assert running.post(body, headers)[0] == 415
    assert running.post(body, "Content-Type: Application/JSON; charset=utf-8\n")[0] == 200


def _peak() -> int:
    """Bytes this process has resident."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_a_hundred_megabytes_are_refused_in_bounded_memory(running):
    before = _peak()
    size = 100 << 20
    head = "POST /v1/chat/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"
    for length in (f"Content-Length: {size}\n", "Transfer-Encoding: chunked\n"):
        with running.send(f"{head}{length}Connection: close\n") as connection:
            part = bytes(1 << 20)
            framed = part if length.startswith("Content") else b"100000\r\n" + part + b"\r\n"
            highest = 0
            for _ in range(size >> 20):
                connection.sendall(framed)
                highest = max(highest, _peak())
            if "chunked" in length:
                connection.sendall(b"0\r\n\r\n")
            status, body = answer_of(connection)
        assert (status, body["error"]["code"]) == (413, "request_too_large")
        assert highest - before < 40 << 20
    head += f"Content-Length: {size}\nExpect: 100-continue\nConnection: close\n"
    with running.send(head) as connection:  # nothing of it is sent
        assert answer_of(connection)[0] == 413


def test_requests_of_many_small_values_are_refused_before_they_are_parsed(running):
    texts = b'{"type":"text","text":""},' * 60_000
    for content in (b"1," * 500_000, texts, b"[]," * 300_000):
        body = b'{"model":"shapes","messages":[{"role":"user","content":[' + content + b"1]}]}"
        status, answer = running.post(body)
        assert (status, answer["error"]["code"]) == (400, "too_large")
    status, answer = running.post(b'{"model":"shapes","' + b"x" * 500_000 + b'":1}')
    assert status == 400 and len(json.dumps(answer)) < 1000
    many = [{"type": "text", "text": ""}] * 1025
    status, answer = running.post({"model": "shapes", "messages": [{"role": "user", "content": many}]})
    assert (status, answer["error"]["param"]) == (400, "messages.0.content")
    assert running.post(question(data_url(PNG), "why, " * 5))[0] == 200


def test_slow_requests_end_and_do_not_hinder_others(start):
    limits = Limits(body_seconds=0.5, header_seconds=0.8, seconds=20)
    head = "POST /v1/chat/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"
    with start(limits) as running:
        slow = running.send(f"{head}Content-Length: 1000\n", b"{")
        silent = socket.create_connection(("127.0.0.1", running.port), 30)
        dripping = running.send("")
        dripping_ends = threading.Event()

        def drip() -> None:
            try:
                while True:
                    dripping.sendall(b"X")
                    time.sleep(0.05)
            except OSError:
                dripping_ends.set()

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        assert running.post(question(data_url(PNG)))[0] == 200
        status, body = answer_of(slow)
        assert (status, body["error"]["code"]) == (408, "slow_request")
        try:
            assert silent.recv(1) == b""
        except ConnectionResetError:
            pass
        assert dripping_ends.wait(20)
        for connection in (slow, silent, dripping):
            connection.close()


def test_all_bodies_together_stay_within_a_limit(start):
    limits = Limits(body_bytes=1 << 20, bodies_bytes=1 << 20, body_seconds=20)
    head = "POST /v1/chat/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"
    with start(limits) as running:
        held = [running.send(f"{head}Content-Length: {1 << 20}\n", bytes(900_000)) for _ in range(1)]
        ends = time.monotonic() + 20
        while running.service.bodies._held < 900_000:
            assert time.monotonic() < ends
            time.sleep(0.01)
        body = json.dumps(question(data_url(PNG), user="x" * 300_000)).encode()
        status, answer = running.post(body)
        assert (status, answer["error"]["code"]) == (429, "busy")
        for connection in held:
            connection.close()
        while running.service.bodies._held:
            assert time.monotonic() < ends
            time.sleep(0.01)
        assert running.post(body)[0] == 200


def test_a_refused_image_says_the_limit():
    with pytest.raises(Refusal, match="at most 0.5 megapixels"):
        decode(_png_of_size(1001, 1000), "image/png", 500_000)
