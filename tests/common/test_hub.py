"""A machine without a connection, that nobody told to stay offline."""

from __future__ import annotations

import socket
import time

import pytest
import timm
from huggingface_hub import close_session, constants
from safetensors.torch import save_file

from evlgen import registry
from evlgen.common.errors import CheckpointError
from evlgen.config.config import Config
from evlgen.config.model_config import VisionConfig
from evlgen.models.vision import build_vision_encoder
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
    with pytest.raises(CheckpointError, match="'nobody/has-this' is no folder, no model type"):
        registry.get_model_class("evlgen_opt").from_pretrained("nobody/has-this")
    assert time.monotonic() - began < 15  # the waits between tries alone would be as long


def test_weights_that_timm_would_fetch_are_asked_for_once_and_not_at_all_where_they_are_here(
    no_hub, tmp_path, monkeypatch
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cfg = VisionConfig(name="test_vit", image_size=160, pretrained=True)
    began = time.monotonic()
    with pytest.raises(
        CheckpointError, match="timm could not get the weights of test_vit .*pretrained to the"
    ):
        build_vision_encoder(cfg)
    model = timm.create_model("test_vit")
    repository = tmp_path / f"models--{model.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots" / ("a" * 40)).mkdir(parents=True)
    save_file(model.state_dict(), repository / "snapshots" / ("a" * 40) / "model.safetensors")
    found = build_vision_encoder(cfg).state_dict()
    assert any(
        value.equal(model.cls_token) for value in found.values() if value.shape == model.cls_token.shape
    )
    assert time.monotonic() - began < 40
