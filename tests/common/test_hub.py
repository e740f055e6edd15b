"""A machine without a connection, that nobody told to stay offline."""

from __future__ import annotations

import socket
import time

import pytest
from huggingface_hub import close_session, constants

from evlgen import registry
from evlgen.common.errors import CheckpointError
from evlgen.config.config import Config
from evlgen.weights import hub


@pytest.fixture(params=["refused", "silent"])
def no_hub(request, monkeypatch):
    """A hub that nobody listens at, or that takes calls and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if request.param == "refused":
            server.close()
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "HUB_SECONDS", 1)
        close_session()
        yield
        close_session()


def test_a_hub_id_without_a_connection_is_asked_for_once_and_named(tiny_project, no_hub):
    cfg = Config.load(tiny_project(), ["model.language.name=nobody/has-this"])
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="'nobody/has-this': it is neither a folder here.*hf download"):
        registry.get_model_class("evlgen_opt").from_config(cfg.model)
    with pytest.raises(CheckpointError, match="'nobody/has-this' is no folder, no model type"):
        registry.get_model_class("evlgen_opt").from_pretrained("nobody/has-this")
    assert time.monotonic() - began < 40
