"""Token merging inside a vision transformer, without training.

Bolya et al., *Token Merging: Your ViT but Faster*, ICLR 2023 (arXiv 2210.09461), section 3: in every block,
between attention and MLP, the r most similar pairs of tokens merge. Similar means similar keys, averaged over
the heads. A token that stands for several counts as so many: in means, and in attention, to whose logits the
logarithm of its size is added (*proportional attention*).
"""

from __future__ import annotations

import torch
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from evlgen.common.errors import ConfigError
from evlgen.models.token_merging import (
    compose_maps,
    limit_r,
    match_tokens,
    merge_weighted_mean,
    token_sizes,
)


class Merging:
    """What the blocks of one encoder share during a forward pass.

    Args:
        r: pairs that merge in each block.
        num_protected: 1 keeps the class token (position 0) from merging.

    Attributes:
        sizes: how many tokens each one stands for now, [B, N] (int64); None before the first merge.
        merge_map: where each token of the first block is now, [B, N] (int64); None before the first merge.
    """

    def __init__(self, r: int, num_protected: int) -> None:
        self.r = r
        self.num_protected = num_protected
        self.start()

    def start(self, *_: object) -> None:
        """Forgets the last forward pass. Also a hook of the first block."""
        self.sizes: Tensor | None = None
        self.merge_map: Tensor | None = None
        self._keys: Tensor | None = None

    def see_keys(self, module: nn.Module, args: tuple, keys: Tensor) -> None:
        """Forward hook of the (empty) norm that timm's attention sends its keys through: [B, heads, N, d]."""
        self._keys = keys

    def attention_bias(self, dtype: torch.dtype) -> Tensor | None:
        """The logarithms of the sizes, [B, 1, 1, N]."""
        return None if self.sizes is None else self.sizes.log().to(dtype)[:, None, None]

    def merge(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N - r, C], by the keys of the attention that ran last."""
        assert self._keys is not None  # of the attention before
        metric, self._keys = self._keys.mean(1), None
        merge_map, num_out = match_tokens(metric, self.r, self.num_protected)
        if num_out == x.shape[1]:
            return x
        x = merge_weighted_mean(x, self.sizes, merge_map, num_out)
        self.sizes = token_sizes(self.sizes, merge_map, num_out)
        self.merge_map = merge_map if self.merge_map is None else compose_maps(self.merge_map, merge_map)
        return x


def merge_in_blocks(trunk: nn.Module, r: int) -> Merging:
    """Has r pairs of tokens merge in every block of a timm transformer.

    Returns:
        The state of the last forward pass.

    Raises:
        ConfigError: see `why_not_mergeable`.
    """
    if why := why_not_mergeable(trunk):
        raise ConfigError(f"model.vision.tome_r: {why}. Set it to 0, or take another model.vision.name.")
    merging = Merging(r, min(trunk.num_prefix_tokens, 1))
    trunk.blocks[0].register_forward_pre_hook(merging.start)
    for block in trunk.blocks:
        block.merging = merging
        block.attn.k_norm.register_forward_hook(merging.see_keys)
        # a block's class is changed, and not the block wrapped, so that its weights keep their names
        block.__class__ = _MERGING[type(block)]
    return merging


def num_merged_tokens(num_tokens: int, r: int, num_blocks: int, num_protected: int) -> int:
    """Tokens left after the last block."""
    for _ in range(num_blocks):
        num_tokens -= limit_r(num_tokens, r, num_protected)
    return num_tokens


def why_not_mergeable(trunk: nn.Module) -> str | None:
    """Why tokens cannot merge in a model; None for a plain vision transformer. Rotary positions are a reason:
    a merged token has none."""
    name, blocks = type(trunk).__name__, getattr(trunk, "blocks", ())
    if getattr(trunk, "rope", None) is not None:
        return f"{name} here has rotary positions, and a merged token has none"
    plain = all(
        type(block) in _MERGING and isinstance(block.attn, Attention | EvaAttention) for block in blocks
    )
    if not len(blocks) or not plain:
        return f"the blocks of {name} here are not those of a plain vision transformer"
    return None


class _MergingBlock(nn.Module):
    """A block of a vision transformer in which tokens merge between its two sub-layers."""

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        """[B, N, C] -> [B, N - r, C]. Raises `ConfigError` where a mask is given: merged tokens have none."""
        if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            raise ConfigError(
                "tokens cannot merge where attention is masked: leave attn_mask and is_causal out."
            )
        kwargs["attn_mask"] = self.merging.attention_bias(x.dtype)
        x = x + self.drop_path1(self._scaled(self.attn(self.norm1(x), **kwargs), 1))
        x = self.merging.merge(x)
        return x + self.drop_path2(self._scaled(self.mlp(self.norm2(x)), 2))


class _MergingViTBlock(_MergingBlock, Block):
    def _scaled(self, x: Tensor, number: int) -> Tensor:
        return getattr(self, f"ls{number}")(x)


class _MergingEvaBlock(_MergingBlock, EvaBlock):
    def _scaled(self, x: Tensor, number: int) -> Tensor:
        scale = getattr(self, f"gamma_{number}")
        return x if scale is None else scale * x


_MERGING = {Block: _MergingViTBlock, EvaBlock: _MergingEvaBlock}
