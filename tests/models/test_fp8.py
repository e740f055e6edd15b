"""Frozen parts whose linear layers are in float8: what changes in the numbers, and what must not."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn

from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.config.config import load_model_file
from evlgen.estimate import estimate
from evlgen.models import language as language_models
from evlgen.models import vision as vision_encoders
from evlgen.models.ops import FP8, Fp8Linear, check_fp8, use_fp8

CPU = torch.device("cpu")
TEXTS = ["a red circle", "two blue stars on a hill", "a cat"]


def has_product() -> bool:
    try:
        a = torch.zeros(16, 16).to(FP8)
        torch._scaled_mm(a, a.t(), torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.bfloat16)
    except NotImplementedError:
        return False
    return True


needs_product = pytest.mark.skipif(not has_product(), reason="this torch has no float8 product on a CPU")


@pytest.fixture
def on_cpu(monkeypatch):
    """A CPU computes in float8 too, which nobody would want but a test."""
    for module in (language_models, vision_encoders):
        monkeypatch.setattr(module, "check_fp8", lambda key, device: None)


def section(golden, precision: str, **language):
    cfg = OmegaConf.create(load_model_file(golden / "evlgen_opt" / "model.yaml"))
    cfg.vision.precision = cfg.language.precision = precision
    cfg.language = OmegaConf.merge(cfg.language, language)
    return cfg


def build(golden, precision: str, **language):
    return registry.get_model_class("evlgen_opt").from_config(section(golden, precision, **language))


@pytest.fixture
def samples(golden):
    image = load_file(golden / "evlgen_opt" / "expected.safetensors")["image"]
    return {"image": image, "text_input": TEXTS}


def gradients(model, samples) -> tuple[float, torch.Tensor]:
    model.train().zero_grad()
    loss = model(samples)["loss"]
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.connector.parameters()])


@needs_product
def test_a_layer_against_its_product_in_float32():
    torch.manual_seed(0)
    plain = nn.Linear(64, 48)
    plain.weight.data *= torch.logspace(-3, 1, 48)[:, None]  # rows of other sizes
    x = torch.randn(2, 5, 64) * torch.logspace(-3, 2, 5)[:, None]
    x[0, 0] = 0  # a token of zeros
    x.requires_grad_()
    rounded = Fp8Linear(plain, CPU)
    out, expected = rounded(x), plain(x)
    out += 1  # in its place, as timm adds the bias of EVA's attention
    out = out - 1
    assert out.shape == expected.shape and out.dtype == x.dtype and torch.isfinite(out).all()
    errors = (out - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.max() < 0.15, "each token by itself, however small"
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, x, grad)
    (right,) = torch.autograd.grad(expected, x, grad)
    assert F.cosine_similarity(found, right, dim=-1).min() > 0.995
    assert rounded(x[:, :0]).shape == (2, 0, 48)
    assert rounded.weight.nbytes == 64 * 48


@needs_product
def test_a_model_in_float8_is_near_the_one_in_bf16(golden, samples, on_cpu):
    plain, model = build(golden, "bf16"), build(golden, "fp8")
    replaced = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    assert {name.split(".")[0] for name in replaced} == {"vision", "language"}
    assert len(replaced) == 3 * 4 + 2 * 6, "all layers of three blocks and of two"
    assert not any(p.dtype == FP8 for p in model.connector.parameters())
    with torch.no_grad():
        tokens = [one.encode(samples["image"]) for one in (plain, model)]
    assert F.cosine_similarity(*(t.float().flatten(1) for t in tokens)).min() > 0.99
    # from the same tokens, as near ties decide what a TomeFormer merges
    same = {"visual_tokens": tokens[0], "text_input": TEXTS}
    (loss, grad), (loss_fp8, grad_fp8) = (gradients(one, same) for one in (plain, model))
    assert loss_fp8 == pytest.approx(loss, rel=0.01) and loss_fp8 != loss
    # random weights of 48 channels; 0.980 on the bundled model's 128
    assert F.cosine_similarity(grad, grad_fp8, dim=0) > 0.93
    assert model.eval().generate(samples, num_beams=2, max_length=4)


@needs_product
def test_what_is_trained_and_saved_is_the_same(golden, samples, on_cpu, tmp_path):
    plain, model = build(golden, "bf16"), build(golden, "fp8")
    types = [{k: v.dtype for k, v in one.trained_state_dict().items()} for one in (plain, model)]
    assert types[0] == types[1]
    model.save_pretrained(tmp_path / "saved")
    again = build(golden, "fp8")
    nn.init.zeros_(again.ln_vision.weight)
    again.load_checkpoint(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again.soft_prompts(samples), model.soft_prompts(samples))
    plain.save_pretrained(tmp_path / "plain")
    assert not model.load_checkpoint(tmp_path / "plain").missing


@pytest.mark.parametrize("part", ["vision", "language"])
def test_weights_that_were_trained_earlier_are_saved_as_they_were(golden, on_cpu, tmp_path, part):
    cfg = section(golden, "bf16")
    cfg[part].precision, cfg[part].freeze = "fp32", False
    trained = registry.get_model_class("evlgen_opt").from_config(cfg)
    with torch.no_grad():
        for weight in getattr(trained, part).parameters():
            weight.mul_(1.2)
    model, plain = build(golden, "fp8"), build(golden, "bf16")
    model.load_checkpoint(plain.save_pretrained(tmp_path / "plain"))
    model.load_checkpoint(_with_parts(plain, tmp_path / "parts"))
    assert model.saved_state_dict().keys() == plain.saved_state_dict().keys(), "nothing of them was trained"
    model.load_checkpoint(trained.save_pretrained(tmp_path / "first"))
    saved = load_file(model.save_pretrained(tmp_path / "second") / "model.safetensors")
    linear = [name for name, module in model.named_modules() if isinstance(module, Fp8Linear)]
    linear = [f"{name}.weight" for name in linear if name.startswith(part)]
    assert linear and all(torch.equal(saved[name], trained.state_dict()[name]) for name in linear)
    assert set(trained.saved_state_dict()) <= set(saved)
    again = build(golden, "fp8")
    again.load_checkpoint(tmp_path / "second")
    for name, value in model.state_dict().items():
        assert torch.equal(*(v.contiguous().view(torch.uint8) for v in (again.state_dict()[name], value)))


def _with_parts(model, folder):
    """A checkpoint that holds the frozen parts too, as they are."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


@needs_product
def test_weights_in_another_type_are_rounded_as_they_are_loaded(golden, samples, on_cpu):
    plain, model = build(golden, "bf16"), build(golden, "fp8")
    state = {k: v + 0.1 * torch.randn_like(v) for k, v in plain.vision.state_dict().items()}
    found = model.vision.load_state_dict(state)
    assert not found.missing_keys and not found.unexpected_keys
    for name, module in model.vision.named_modules():
        if isinstance(module, Fp8Linear):
            expected = state[f"{name}.weight"].float()
            errors = module.weight.float() * module.weight_scale.t() - expected
            assert errors.norm() < 0.04 * expected.norm()
    other = build(golden, "fp8")
    other.load_state_dict(model.state_dict())  # float8 and its scales as they are
    with torch.no_grad():
        assert torch.equal(other.encode(samples["image"]), model.encode(samples["image"]))


@needs_product
def test_adapters_stay_as_they_are(golden, samples, on_cpu):
    pytest.importorskip("peft")
    model = build(golden, "fp8", lora={"r": 2})
    trained = [p for p in model.language.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)
    gradients(model, samples)
    assert any(p.grad.norm() > 0 for p in trained)
    assert all("lora_" in name for name in model.trained_state_dict() if name.startswith("language."))


@needs_product
def test_compiled_layers_give_the_same_for_all_sizes():
    torch.manual_seed(0)
    block = nn.Sequential(*(Fp8Linear(nn.Linear(32, 32), CPU) for _ in range(2)))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=backend, dynamic=True, fullgraph=True)
    for size in (3, 5):
        x = torch.randn(size, size + 4, 32, requires_grad=True)
        outs = [layer(x) for layer in (block, compiled)]
        assert torch.equal(*outs)
        grads = [torch.autograd.grad(out.sum(), x)[0] for out in outs]
        assert torch.equal(*grads) and grads[0].norm() > 0
    assert len(graphs) == 1


def test_layers_that_stay_as_they_are():
    part = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("one", "two", "wo")})
    part["odd"] = nn.Linear(15, 16)
    part["plain"], part["head"] = nn.Linear(16, 32), nn.Linear(16, 32)
    part["two"].weight = part["one"].weight  # tied
    part._keep_in_fp32_modules = ["wo"]
    before = copy.deepcopy(part.state_dict())
    assert use_fp8(part, CPU, apart=[part["head"], None]) == ["plain"]
    assert all(torch.equal(v, before[k]) for k, v in part.state_dict().items() if not k.startswith("plain."))


@pytest.mark.parametrize("part", ["vision", "language"])
def test_where_it_cannot_be_that_is_said(golden, part):
    cfg = section(golden, "bf16")
    cfg[part].precision = "fp8"
    build = registry.get_model_class("evlgen_opt").from_config
    with pytest.raises(ConfigError, match=f"{part}.precision: fp8 needs .* 8.9 .* run is on 'cpu'.*bf16"):
        build(cfg)
    cfg[part].freeze = False
    with pytest.raises(ConfigError, match=rf"frozen .*, and model.{part}.freeze is false"):
        build(cfg)


def test_older_cards_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"8.9 or more.*and A100 does not"):
        check_fp8("model.vision.precision", torch.device("cuda"))


def test_two_ways_at_once_are_refused(golden):
    with pytest.raises(ConfigError, match="fp8 and model.language.quantization: 8bit"):
        cfg = section(golden, "fp8", quantization="8bit")
        cfg.vision.precision = "auto"
        registry.get_model_class("evlgen_opt").from_config(cfg)


def test_the_estimate_knows_its_memory():
    from evlgen.config.config import Config

    cfg = Config.load("projects/shapes/caption.yaml", []).model
    plain, fp8 = (dataclasses.replace(cfg.vision, precision=p) for p in ("bf16", "fp8"))
    language = dataclasses.replace(cfg.language, precision="fp8")
    found = estimate(dataclasses.replace(cfg, vision=fp8, language=language), "bf16")
    for part in ("vision", "language"):
        cost = found.parts[part]
        assert 1.0 < cost.bytes / cost.frozen < 1.5, "a byte for most weights, two for the rest"
    encoder = vision_encoders.build_vision_encoder(plain, "meta")
    assert found.parts["vision"].frozen == sum(p.numel() for p in encoder.parameters())
    # a linear layer of d x d does d * d operations for each of 65 tokens
    linear = sum(m.weight.numel() for m in encoder.modules() if isinstance(m, nn.Linear))
    assert found.parts["vision"].forward > 65 * linear


@pytest.mark.parametrize("move", [lambda m: m.to(torch.bfloat16), nn.Module.half, lambda m: m.to("meta")])
def test_another_type_is_not_for_float8_layers(move):
    layer = Fp8Linear(nn.Linear(32, 16), CPU)
    model = move(nn.Sequential(layer, nn.Linear(16, 16)))
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (FP8, torch.float32)
    assert layer.bias.dtype == torch.bfloat16 and layer.weight.device == model[1].weight.device
