"""Bodies of requests: read within limits of size, time and memory."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

from starlette.requests import Request

from evlgen.serving.errors import Refusal
from evlgen.serving.limits import Limits

_MOST_DRAINED = 256 << 20  # bytes read and dropped before a refusal is answered


class BodyReader:
    """Reads bodies; all of those that are held at one time stay within ``limits.bodies_bytes``."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._held = 0

    @contextlib.contextmanager
    def holding(self) -> Iterator[Held]:
        """What is read in the block counts until its end."""
        held = Held(self)
        try:
            yield held
        finally:
            self._held -= held.size


class Held:
    """The bytes of one request."""

    def __init__(self, reader: BodyReader) -> None:
        self._reader = reader
        self.size = 0

    async def read(self, request: Request) -> bytes:
        """The body of a request.

        Raises:
            Refusal: not JSON by its headers, too large, too slow, or too many others are being read.
            ClientDisconnect: the client left.
        """
        limits = self._reader.limits
        try:
            _check_headers(request, limits)
            return await asyncio.wait_for(self._read(request), limits.body_seconds)
        except (TimeoutError, asyncio.TimeoutError):
            message = f"the request did not arrive within {limits.body_seconds:g} seconds."
            raise Refusal(408, message, "slow_request") from None
        except Refusal:
            await drain(request, limits)
            raise

    async def _read(self, request: Request) -> bytes:
        limits, reader = self._reader.limits, self._reader
        parts = []
        async for chunk in request.stream():
            self.size += len(chunk)
            reader._held += len(chunk)
            parts.append(chunk)
            if self.size > limits.body_bytes:
                raise _too_large(limits)
            if reader._held > limits.bodies_bytes:
                raise Refusal(429, "too many large requests are arriving: try again.", "busy", retry_after=1)
        return b"".join(parts)


def _check_headers(request: Request, limits: Limits) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "the Content-Type must be application/json.", "wrong_content_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "compressed requests are not read.", "wrong_content_encoding")
    if int(request.headers.get("content-length", 0)) > limits.body_bytes:
        raise _too_large(limits)


def _too_large(limits: Limits) -> Refusal:
    return Refusal(413, f"the request has more than {limits.body_bytes:,} bytes.", "request_too_large")


async def drain(request: Request, limits: Limits) -> None:
    """Reads what is left of a body and drops it: a client that is still sending would not see the answer. Not
    for one that waits for leave to send."""
    if request.headers.get("expect"):
        return
    ends, size = time.monotonic() + limits.body_seconds, 0
    with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
        while size < _MOST_DRAINED:
            left = ends - time.monotonic()
            message = await asyncio.wait_for(request.receive(), max(left, 0))
            size += len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return
