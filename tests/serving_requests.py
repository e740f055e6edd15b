"""Requests to a server of this machine, as clients write them."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import socket

import uvicorn
from PIL import Image

from evlgen.datasets.shapes.world import draw, scene
from evlgen.serving.app import Service


def image(number: int = 1) -> Image.Image:
    """A drawn scene."""
    return Image.fromarray(draw(scene("test", number)))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def data_url(content: bytes, media_type: str = "image/png") -> str:
    """A file as a data URL."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def question(url: str, text: str | None = None, **settings) -> dict:
    """The body of a request."""
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    parts += [] if text is None else [{"type": "text", "text": text}]
    return {"model": "shapes", "messages": [{"role": "user", "content": parts}], **settings}


@dataclasses.dataclass
class Running:
    """A server that is up."""

    service: Service
    port: int
    server: uvicorn.Server

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def send(self, head: str, body: bytes = b"", timeout: float = 30.0) -> socket.socket:
        """A connection on which a request was sent, as it is."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout)
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
        return connection

    def post(
        self, body: dict | bytes, headers: str = "", path: str = "/v1/chat/completions"
    ) -> tuple[int, dict]:
        """Status and JSON of the answer to a request."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        if "content-type" not in headers.lower():
            headers += "Content-Type: application/json\n"
        head = f"POST {path} HTTP/1.1\nHost: localhost\nConnection: close\n"
        head += f"Content-Length: {len(content)}\n{headers}"
        with self.send(head, content) as connection:
            return answer_of(connection)


def answer_of(connection: socket.socket) -> tuple[int, dict]:
    """Status and JSON of what comes on a connection until its end."""
    received = b""
    while part := connection.recv(1 << 16):
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body) if body.startswith(b"{") else {}
