"""What one request, and all of them together, may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        max_batch: requests computed at once at most.
        max_wait: seconds for which a request waits for others to share its batch.
        queue: requests that may be in the server beside those being computed; more are refused with 429.
        seconds: from the arrival of a whole request to its answer.
        max_tokens: new tokens of a text.
        texts: texts of a request (``n``), and beams.
        images: of a conversation.
        text_chars: characters of a question or a conversation.
        values: of a request: commas and opening brackets, in its texts too.
        body_bytes: of one request.
        body_seconds: in which a request has to arrive.
        bodies_bytes: of all requests that are arriving or being decoded.
        image_pixels: of an image, decoded.
        decoders: images decoded at once.
        connections: open at once; more are answered with 503.
        header_seconds: in which a connection has to send the head of a request.
        send_seconds: for which a client may leave its answer where it is, before it is cut off.
        drain_seconds: after a signal to stop, for requests that are being answered.
    """

    max_batch: int = 16
    max_wait: float = 0.005
    queue: int = 64
    seconds: float = 60.0
    max_tokens: int = 256
    texts: int = 8
    images: int = 8
    text_chars: int = 32_000
    values: int = 50_000
    body_bytes: int = 20 << 20
    body_seconds: float = 30.0
    bodies_bytes: int = 256 << 20
    image_pixels: int = 32_000_000
    decoders: int = 2
    connections: int = 512
    header_seconds: float = 20.0
    send_seconds: float = 30.0
    drain_seconds: float = 30.0
