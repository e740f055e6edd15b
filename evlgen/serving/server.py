"""Runs the application: sockets, signals, slow connections."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from evlgen.serving.app import Service, create_app

logger = logging.getLogger(__name__)


def serve(service: Service, listening: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
    """Answers requests until SIGTERM or SIGINT; then those that are being answered are finished.

    Args:
        listening: see `bind`.
        ready: called when requests are taken.
    """
    make_server(service, ready).run(sockets=[listening])


def make_server(service: Service, ready: Callable[[], None] = lambda: None) -> uvicorn.Server:
    """As `serve`, before it runs: a thread runs it by its ``run(sockets=[..])`` and ends it by its
    ``should_exit``."""
    limits = service.limits
    seconds = {"header_seconds": limits.header_seconds, "send_seconds": limits.send_seconds}
    protocol = type("Protocol", (_Protocol,), seconds)
    config = uvicorn.Config(
        create_app(service),
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_graceful_shutdown=max(1, round(limits.drain_seconds)),
    )
    return _Server(config, ready)


class _Server(uvicorn.Server):
    """Ends by a signal as by any other end, where uvicorn raises the signal once more."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        try:
            before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        except ValueError:  # not the main thread: whoever runs it sets should_exit
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Protocol(H11Protocol):
    """Closes connections on which no whole head of a request comes in time, and those that do not take in
    time what is sent."""

    header_seconds = 20.0
    send_seconds = 30.0
    _waiting: asyncio.TimerHandle | None = None
    _sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait_for_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()
        self._stop_sending()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_sending()
        self._sending = self.loop.call_later(self.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_sending()

    def _stop_sending(self) -> None:
        if self._sending is not None:
            self._sending.cancel()

    def _wait_for_request(self) -> None:
        self._stop_waiting()
        self._waiting = self.loop.call_later(self.header_seconds, self._close_without_request)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()

    def _close_without_request(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
