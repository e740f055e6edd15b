"""A server of the bundled model in a thread of this process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
from serving_requests import Running

from evlgen.models.zoo import load_model
from evlgen.serving import server
from evlgen.serving.answering import Answerer
from evlgen.serving.app import Service
from evlgen.serving.limits import Limits
from evlgen.serving.listening import bind


@pytest.fixture(scope="session")
def model():
    """The bundled model."""
    return load_model("evlgen_opt")


@pytest.fixture(scope="session")
def start(model):
    """Starts a server: ``with start(limits, api_key="x") as running``. Its signals are those of this
    process; at the end of the block it stops as by SIGTERM."""

    @contextlib.contextmanager
    def start(
        limits: Limits | None = None, answerer: Answerer | None = None, **settings
    ) -> Iterator[Running]:
        listening = bind("127.0.0.1", 0)
        service = Service(answerer or Answerer(model), "shapes", limits, num_beams=1, **settings)
        is_ready = threading.Event()
        running = server.make_server(service, is_ready.set)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        assert is_ready.wait(30)
        try:
            yield Running(service, listening.getsockname()[1], running)
        finally:
            running.should_exit = True
            thread.join(60)
            assert not thread.is_alive()

    return start


@pytest.fixture(scope="session")
def running(start):
    """One server for the tests that change nothing about it."""
    with start(Limits(body_bytes=2 << 20, image_pixels=1_000_000)) as found:
        yield found
