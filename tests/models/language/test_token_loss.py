"""Losses of tokens without their logits, against cross entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from evlgen.models.language import token_loss
from evlgen.models.language.token_loss import token_losses


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("at_once", [1, 70, 10_000])
def test_losses_and_gradients_equal_cross_entropy(has_bias, at_once, monkeypatch):
    monkeypatch.setattr(token_loss, "_LOGITS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 6, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(23, 6, generator=generator, dtype=torch.float64)
    bias = torch.randn(23, generator=generator, dtype=torch.float64) if has_bias else None
    targets = torch.randint(23, (13,), generator=generator)
    shares = torch.rand(13, generator=generator)
    right = F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="none")
    (right_gradient,) = torch.autograd.grad((right * shares).sum(), hidden)
    found = token_losses(hidden, weight, bias, targets)
    (gradient,) = torch.autograd.grad((found * shares).sum(), hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(gradient, right_gradient, rtol=1e-5, atol=1e-6)


def test_large_logits_stay_finite():
    hidden = torch.tensor([[1e4, -1e4]], requires_grad=True)
    losses = token_losses(hidden, torch.eye(2), None, torch.tensor([1]))
    losses.sum().backward()
    assert losses.item() == 2e4 and hidden.grad.tolist() == [[1.0, -1.0]]


def test_nothing_of_the_vocabularys_size_is_kept():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(1000, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        token_losses(hidden, weight, None, torch.tensor([1, 2, 3, 4]))
    assert kept == [4 * 8]
    with torch.no_grad():
        assert token_losses(hidden, weight, None, torch.tensor([1, 2, 3, 4])).shape == (4,)
