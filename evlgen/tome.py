"""Token merging in a timm vision transformer of one's own, outside of any model of this package.

Bolya et al., *Token Merging: Your ViT but Faster*, ICLR 2023 (arXiv 2210.09461), whose authors offer it as
``tome.patch.timm(model)``.
"""

from __future__ import annotations

from torch import nn

from evlgen.common.errors import ConfigError
from evlgen.models.vision.merging import Merging, merge_in_blocks, why_not_mergeable

__all__ = ["patch"]


def patch(vit: nn.Module, r: int) -> nn.Module:
    """Makes r pairs of similar tokens merge in every block, with the weights as they are::

        vit = evlgen.tome.patch(timm.create_model("vit_base_patch16_224", pretrained=True), r=13)

    The model is changed in place; its weights keep their names. It computes what ``model.vision.tome_r: r``
    makes of the same encoder in a configuration. Calling it again changes r; 0 merges nothing. The class
    token never merges. After a forward pass ``vit.blocks[0].merging`` has ``merge_map`` [B, N], where each
    token of the first block is now, and ``sizes`` [B, M], how many tokens each of those left stands for. A
    pooling over tokens (``global_pool="avg"`` or ``"map"``) gives a merged token the weight of one.

    Args:
        vit: a plain vision transformer of timm: ViT, DeiT, CLIP, SigLIP, DINOv2, EVA-CLIP.
        r: pairs of tokens that merge in each block, at most half of the tokens.

    Returns:
        ``vit``.

    Raises:
        ConfigError: r is not a whole number of at least 0; tokens cannot merge in this model, such as one
            with rotary positions; its head reads a token that would merge; it recomputes activations.
    """
    if isinstance(r, bool) or not isinstance(r, int) or r < 0:
        raise ConfigError(f"evlgen.tome.patch: r must be a whole number of at least 0, not {r!r}.")
    merging = next((getattr(block, "merging", None) for block in getattr(vit, "blocks", ())), None)
    if isinstance(merging, Merging):
        merging.r = r
        return vit
    if why := why_not_mergeable(vit) or _why_not_as_it_is(vit):
        raise ConfigError(f"evlgen.tome.patch: {why}.")
    merge_in_blocks(vit, r)
    return vit


def _why_not_as_it_is(vit: nn.Module) -> str | None:
    """Why the rest of a model would not work after its blocks; None where it does."""
    name, num_prefix = type(vit).__name__, vit.num_prefix_tokens
    if getattr(vit, "dist_token", None) is not None:
        return f"the head of {name} reads a distillation token, which would merge. Take a model without one"
    if num_prefix > 1 and getattr(vit, "global_pool", "") not in ("", "token"):
        return (
            f"{name} here pools the tokens after its {num_prefix} prefix tokens, which would merge. "
            "Create it with global_pool='token' or ''"
        )
    if getattr(vit, "grad_checkpointing", False):
        return "merged tokens cannot be computed again. Call vit.set_grad_checkpointing(False) first"
    return None
