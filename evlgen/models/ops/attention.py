"""Attention: torch's fused kernels, but where those are slow.

On CPUs torch has one fused kernel, without dropout, and its backward pass in bfloat16 took more than half
of a small training step on a processor that multiplies in it. With dropout torch falls back to a form that
copies queries, keys and values twice and keeps three matrices of attention for the backward pass. There
plain products over one copy are faster, and keep one matrix and a byte per entry.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from evlgen.models.ops.dropout import keep_mask, masked


def self_attention(qkv: Tensor, num_heads: int, dropout: float = 0.0) -> Tensor:
    """Softmax attention of every token to every token.

    Args:
        qkv: [B, N, 3 C]: queries, keys and values, the C channels of each split over the heads.
        dropout: probability of dropping an attention weight; 0 outside of training.

    Returns:
        [B, N, C].
    """
    trains = torch.is_grad_enabled() and qkv.requires_grad and not torch.compiler.is_compiling()
    if trains and _is_slow_fused(qkv.device, qkv.dtype, dropout):
        return _PlainAttention.apply(qkv, num_heads, dropout)
    batch, num_tokens, width = qkv.shape
    q, k, v = qkv.view(batch, num_tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B, heads, N, d]
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    return out.transpose(1, 2).reshape(batch, num_tokens, width // 3)


def language_attention(device: torch.device, dtype: torch.dtype) -> str:
    """What transformers calls the attention to train through on a device: ``sdpa`` or ``eager``."""
    return "eager" if _is_slow_fused(device, dtype, 0.0) else "sdpa"


def _is_slow_fused(device: torch.device, dtype: torch.dtype, dropout: float) -> bool:
    return device.type == "cpu" and (dropout > 0 or dtype != torch.float32)


class _PlainAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, num_heads: int, dropout: float) -> Tensor:
        batch, num_tokens, width = qkv.shape
        parts = qkv.view(batch, num_tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4).contiguous()
        q, k, v = parts.flatten(1, 2)  # each [B heads, N, d]
        ctx.scale = 1 / math.sqrt(q.shape[-1])
        with torch.autocast("cpu", enabled=False):
            scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=ctx.scale)
            weights = scores.softmax(-1)  # [B heads, N, N]
            keep, ctx.keep_scale = keep_mask(weights.shape, dropout) if dropout else (None, 1.0)
            used = weights if keep is None else masked(weights, keep, ctx.keep_scale)
            out = torch.bmm(used, v)
        ctx.save_for_backward(parts, weights, keep)
        return (
            out.view(batch, num_heads, num_tokens, -1).transpose(1, 2).reshape(batch, num_tokens, width // 3)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        parts, weights, keep = ctx.saved_tensors
        _, batch, num_heads, num_tokens, size = parts.shape
        q, k, v = parts.flatten(1, 2)
        grad = grad.view(batch, num_tokens, num_heads, size).transpose(1, 2).reshape(q.shape)
        grads = torch.empty_like(parts)
        grad_q, grad_k, grad_v = grads.flatten(1, 2)
        used = weights if keep is None else masked(weights, keep, ctx.keep_scale)
        torch.bmm(used.transpose(1, 2), grad, out=grad_v)
        grad_weights = torch.bmm(grad, v.transpose(1, 2))
        if keep is not None:
            grad_weights = masked(grad_weights, keep, ctx.keep_scale)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(ctx.scale)
        torch.bmm(grad_scores, k, out=grad_q)
        torch.bmm(grad_scores.transpose(1, 2), q, out=grad_k)
        return grads.permute(1, 3, 0, 2, 4).reshape(batch, num_tokens, 3 * num_heads * size), None, None
