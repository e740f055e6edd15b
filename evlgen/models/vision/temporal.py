"""Videos: how the frames' visual tokens become one set of tokens.

Temporal Attentive Soft Token Contextualizing (Jian et al., ACL 2024, arXiv 2310.03291, section 3.3): between
the attention and the MLP of every block of the frozen encoder, each token position attends over the frames.
The simpler ways it is compared with, the mean and the concatenation of the frames' tokens, need no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evlgen.common.errors import ConfigError

ATTENTIVE_FORMS = ("average", "residual")  # those that add weights to the encoder
WIDTH, HEADS = 256, 8  # channels of queries and keys together, and heads: published


class TemporalAttention(nn.Module):
    """Attention of each token over the frames of its video; its values are the tokens themselves.

    Args:
        dim: channels C of the tokens, a multiple of 8.
        form: ``average``: ``(1 - alpha) * x + alpha * attended``; ``residual``: ``x + alpha * attended``.

    Attributes:
        alpha: learned scalar, 0 at the start.
        num_frames: frames of the videos in the batch that comes next.
    """

    def __init__(self, dim: int, form: str) -> None:
        super().__init__()
        self.query = nn.Linear(dim, WIDTH)
        self.key = nn.Linear(dim, WIDTH)
        self.alpha = nn.Parameter(torch.zeros(()))
        self.form = form
        self.num_frames = 1

    def forward(self, x: Tensor, num_frames: int | None = None) -> Tensor:
        """[B * T, N, C], the frames of a video in a row -> the same shape. Computed in the type of ``x``.

        Args:
            num_frames: T; None: as the attribute says.
        """
        num_frames = num_frames or self.num_frames
        if num_frames == 1 and self.form == "average" and not self.training:
            return x  # one frame is its own average; in training, processes wait for every weight's gradient
        alpha = self.alpha.to(x.dtype)
        if self.form == "average":
            return torch.lerp(x, self._attended(x, num_frames), alpha)
        return x + alpha * self._attended(x, num_frames)

    def _attended(self, x: Tensor, num_frames: int) -> Tensor:
        values = x.unflatten(0, (-1, num_frames)).unflatten(-1, (HEADS, -1))  # [B, T, N, 8, C / 8]
        query, key = (
            nn.functional.linear(x, part.weight.to(x.dtype), part.bias.to(x.dtype))
            .unflatten(0, (-1, num_frames))
            .unflatten(-1, (HEADS, -1))  # [B, T, N, 8, 32]
            for part in (self.query, self.key)
        )
        scores = torch.einsum("btnhd,bsnhd->bnhts", query * WIDTH**-0.5, key)  # [B, N, 8, T, T]
        attended = torch.einsum("bnhts,bsnhd->btnhd", scores.softmax(-1), values)
        return attended.flatten(3).flatten(0, 1)


def add_temporal_attention(encoder: nn.Module, form: str) -> None:
    """Puts a `TemporalAttention` into every block of an encoder of timm's blocks, as
    ``blocks.i.temporal_merge``.

    Raises:
        ConfigError: the encoder's blocks are of another kind, or their channels do not divide into 8 heads.
    """
    blocks = _blocks(encoder)
    if not len(blocks) or not all(isinstance(block, Block | EvaBlock) for block in blocks):
        raise ConfigError(
            f"model.vision.temporal.form '{form}' puts attention over the frames into the blocks of a plain "
            f"vision transformer, and {type(encoder).__name__} has no such blocks. Take form mean or concat, "
            "or "
            "another model.vision.name."
        )
    dim = encoder.embed_dim
    if dim % HEADS:
        raise ConfigError(
            f"model.vision.temporal.form '{form}' needs channels that divide into {HEADS} heads, and the "
            f"vision encoder has {dim}. Take form mean or concat."
        )
    for block in blocks:
        block.temporal_merge = TemporalAttention(dim, form)
        block.__class__ = _contextual(type(block))
        block.register_forward_pre_hook(_with_num_frames, with_kwargs=True)


def temporal_modules(encoder: nn.Module) -> list[TemporalAttention]:
    """The temporal attention of an encoder, block by block."""
    return [block.temporal_merge for block in _blocks(encoder) if hasattr(block, "temporal_merge")]


def recompute_contextual_blocks(encoder: nn.Module) -> bool:
    """Has blocks with temporal attention computed again in the backward pass, each with the number of frames
    that its forward pass had: a batch may have videos of several lengths, one after the other. Whether there
    are such blocks."""
    blocks = [block for block in _blocks(encoder) if isinstance(block, _ContextualBlock)]
    for block in blocks:
        block.recomputes = True
    return bool(blocks)


def pool_frames(tokens: Tensor, num_frames: int, form: str) -> Tensor:
    """Tokens of all frames [B * T, N, C] -> of the videos: their mean [B, N, C], or, with ``concat`` and
    ``each``, in a row [B, T * N, C]."""
    tokens = tokens.unflatten(0, (-1, num_frames))
    return tokens.flatten(1, 2) if form in ("concat", "each") else tokens.mean(1)


def _blocks(encoder: nn.Module) -> Sequence[nn.Module]:
    return getattr(getattr(encoder, "trunk", None), "blocks", ())


class _ContextualBlock(nn.Module):
    """A block of a vision transformer with attention over the frames between its two sub-layers."""

    recomputes = False  # see `recompute_contextual_blocks`

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False, **kwargs)
        return self._forward(x, **kwargs)

    def _forward(self, x: Tensor, num_frames: int, **kwargs) -> Tensor:
        attended = self.attn(self.norm1(x), **kwargs)
        x = x + self.drop_path1(_scaled(self, attended, "ls1", "gamma_1"))
        x = self.temporal_merge(x, num_frames)
        return x + self.drop_path2(_scaled(self, self.mlp(self.norm2(x)), "ls2", "gamma_2"))


class _ContextualViTBlock(_ContextualBlock, Block):
    pass


class _ContextualEvaBlock(_ContextualBlock, EvaBlock):
    pass


def _with_num_frames(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Before a contextual block: the number of frames as an argument, which a repeated pass has too."""
    return args, {"num_frames": block.temporal_merge.num_frames, **kwargs}


def _contextual(block_class: type) -> type:
    # a block's class is changed, and not the block wrapped, so that its weights keep their published names
    return _ContextualEvaBlock if issubclass(block_class, EvaBlock) else _ContextualViTBlock


def _scaled(block: nn.Module, x: Tensor, vit_name: str, eva_name: str) -> Tensor:
    """A sub-layer's output after the block's layer scale, a module of a ViT and a parameter of an EVA."""
    if isinstance(block, Block):
        return getattr(block, vit_name)(x)
    scale = getattr(block, eva_name)
    return x if scale is None else scale * x
