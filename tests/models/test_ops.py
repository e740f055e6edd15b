"""Operations in their fast forms compute what torch's plain ones compute."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F

from evlgen.models.ops import Dropout, keep_mask, linear, products, self_attention, use_fast_linear
from evlgen.models.ops.attention import _PlainAttention


def plain_attention(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """Head by head."""
    out = []
    for q, k, v in zip(*(part.chunk(heads, -1) for part in qkv.chunk(3, -1)), strict=True):
        out.append((q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v)
    return torch.cat(out, -1)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_by_plain_products_has_the_gradient_of_its_output(dropout):
    qkv = torch.randn(2, 7, 36, dtype=torch.double, requires_grad=True)

    def attend(x):
        torch.manual_seed(3)
        return _PlainAttention.apply(x, 3, dropout)

    assert torch.autograd.gradcheck(attend, qkv)


@pytest.mark.parametrize("form", [self_attention, lambda x, heads: _PlainAttention.apply(x, heads, 0.0)])
def test_attention_is_softmax_attention(form):
    qkv = torch.randn(2, 9, 24)
    torch.testing.assert_close(form(qkv, 4), plain_attention(qkv, 4))


@pytest.mark.parametrize(
    "dtype, dropout, trained, form",
    [
        (torch.float32, 0.1, True, "_PlainAttentionBackward"),
        (torch.bfloat16, 0.0, True, "_PlainAttentionBackward"),
        (torch.float32, 0.0, True, "ScaledDotProduct"),
        (torch.bfloat16, 0.0, False, "None"),
    ],
)
def test_plain_products_are_taken_in_training_with_dropout_or_in_half_precision(
    dtype, dropout, trained, form
):
    qkv = torch.randn(2, 9, 24).to(dtype).requires_grad_(trained)
    found = ""
    node = self_attention(qkv, 4, dropout).grad_fn
    while node is not None and not found:
        name = type(node).__name__
        found = name if form in name else ""
        node = node.next_functions[0][0] if node.next_functions else None
    assert found or form == "None"


def test_attention_in_bf16_is_near_float32s():
    torch.manual_seed(0)
    qkv = torch.randn(2, 9, 24)
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        own = qkv.detach().to(dtype, copy=True).requires_grad_()
        out = _PlainAttention.apply(own, 4, 0.0)
        out.float().square().sum().backward()
        grads.append((out.detach().float(), own.grad.float()))
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(two, one, atol=0.05, rtol=0.05)


def test_attention_with_dropout_drops_weights_and_keeps_their_mean():
    torch.manual_seed(0)
    qkv = torch.zeros(1, 400, 3, requires_grad=True)
    with torch.no_grad():
        qkv[..., 2] = 1.0
    out = self_attention(qkv, 1, dropout=0.25)  # every weight is 1 / 400, so this is the share that was kept
    assert out.std() > 0.01
    assert abs(out.mean().item() - 1.0) < 3 * (0.25 / 0.75 / 400**2) ** 0.5


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_mask_keeps_the_share_it_says(p):
    torch.manual_seed(0)
    keep, scale = keep_mask(torch.Size([300, 701]), p)
    count = keep.numel()
    assert abs(keep.double().mean().item() - (1 - p)) < 4 * (p * (1 - p) / count) ** 0.5 + 1e-5
    assert scale == 0.0 if p == 1.0 else abs(scale * (1 - p) - 1) < 1e-4
    pairs = keep.flatten()[:-1] & keep.flatten()[1:]  # neighbours are drawn from the same random number
    assert abs(pairs.double().mean().item() - (1 - p) ** 2) < 5e-3


def test_dropout_repeats_with_the_seed_and_gives_the_gradient_of_what_it_dropped():
    dropout, x = Dropout(0.3), torch.randn(50, 60, requires_grad=True)
    torch.manual_seed(1)
    out = dropout(x)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), out)
    assert not torch.equal(dropout(x), out)
    out.sum().backward()
    torch.testing.assert_close(x.grad * x, out)
    assert torch.equal(dropout.eval()(x), x)


@pytest.fixture(params=[False, True], ids=["forward", "backward too"])
def asked_of_onednn(request, monkeypatch):
    """As on an AMD processor without and with AVX-512."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(products, "mkl_is_slow_backward", lambda: request.param)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (1, 12), (2, 0, 12), (12,)])
def test_linear_by_onednn_has_torchs_values_and_gradients(asked_of_onednn, shape, bias):
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.randn(7, 12), torch.randn(7) if bias else None]
    results = []
    for form in (linear, F.linear):
        own = [None if t is None else t.clone().requires_grad_() for t in inputs]
        out = form(*own)
        out.square().sum().backward()
        results.append([out.detach(), *(t.grad for t in own if t is not None)])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


def test_frozen_weights_get_no_gradient_and_trained_ones_do(asked_of_onednn):
    layer = torch.nn.Linear(6, 4).requires_grad_(False)
    layer.bias.requires_grad_(True)
    use_fast_linear(layer)
    x = torch.randn(3, 6, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 3.0))
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 6))
    layer.bias.grad = None
    layer(x.detach()).sum().backward()  # the bias alone
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 3.0))


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # all but the compiler itself
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler on CPUs"),
            ],
        ),
    ],
)
def test_compiled_for_real_the_forms_are_the_compilers(asked_of_onednn, backend):
    layer = torch.nn.Sequential(torch.nn.Linear(6, 9), Dropout(0.5))
    use_fast_linear(layer)
    x = torch.randn(2, 4, 6, requires_grad=True)
    compiled = torch.compile(lambda x: self_attention(layer(x), 1), backend=backend)
    assert compiled(x).shape == (2, 4, 3)
    layer.eval()
    torch.testing.assert_close(compiled(x), self_attention(layer(x), 1))


def test_quickened_layers_stay_linear_layers_of_the_same_weights():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    use_fast_linear(model)
    assert all(isinstance(model[i], torch.nn.Linear) for i in (0, 2))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
