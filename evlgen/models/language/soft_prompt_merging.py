"""Merging of soft prompts inside a language model: behind one of its layers the most similar ones of each
image become one.

The layers behind read fewer positions, in training and in generation, and keep fewer keys and values. Nothing
of it is seen outside: each position that was merged comes out as the one it became.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evlgen.common.errors import ConfigError
from evlgen.config.model_config import SoftPromptMergingConfig
from evlgen.models.language.segments import Layout
from evlgen.models.token_merging import (
    compose_maps,
    limit_r,
    match_tokens,
    merge_weighted_mean,
    token_sizes,
)

#: ``model_type`` of those whose layers take hidden states, a mask and positions, and are one like another.
TYPES = ("llama", "mistral", "opt", "qwen2", "qwen3")


_MARK = "merges_soft_prompts"  # attribute of a model that has the hooks


class Block(NamedTuple):
    """Where the soft prompts of an image stand in a batch: the row, the first column, how many."""

    row: int
    start: int
    length: int


class Merged(NamedTuple):
    """What is left of a batch of sequences of L positions.

    Attributes:
        order: [B, L'], which positions are, in their order; rows with fewer have others at their end.
        is_left: [B, L'], false for those others; None where there are none.
        places: [B, L], the place in ``order`` of what each position became.
    """

    order: Tensor
    is_left: Tensor | None
    places: Tensor


def merge_similar(x: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merges r pairs of K sequences [K, M, C], in as many rounds as that takes: a round merges at most half.

    What is merged is the mean of all that went into it, and stands where one of them stood. The last
    position, which the text behind it is predicted from, stays as it is, and at least two are left.

    Returns:
        what is left [K, M - r, C], in its order; its places [K, M - r] among the M; the merge map [K, M].
    """
    count = x.shape[1]
    x = x.flip(1)  # `match_tokens` protects the first one
    places = torch.arange(count, device=x.device).expand(len(x), -1)
    whole, sizes = places, None
    while step := limit_r(x.shape[1], r):
        merge_map, num_left = match_tokens(x, step)
        r -= step
        x = merge_weighted_mean(x, sizes, merge_map, num_left)
        sizes = token_sizes(sizes, merge_map, num_left)
        stays = places.new_empty(len(x), num_left)
        for members in (slice(0, None, 2), slice(1, None, 2)):  # those that others merge into come last
            stays.scatter_(1, merge_map[:, members], places[:, members])
        places, order = stays.sort(dim=1)
        x, sizes = _rows(x, order), sizes.gather(1, order)
        whole = order.argsort(1).gather(1, compose_maps(whole, merge_map))
    return x.flip(1), (count - 1 - places).flip(1), (x.shape[1] - 1 - whole).flip(1)


class SoftPromptMerging:
    """Hooks on the layers of a model.

    Args:
        model: any of `TYPES`.
        cfg: after which layer, and how many pairs of each image.

    Raises:
        ConfigError: a model of another type, with windows, or without so many layers.
    """

    def __init__(self, model: PreTrainedModel, name: str, cfg: SoftPromptMergingConfig) -> None:
        config = model.config
        layers = _layers_of(model, name)
        if cfg.layer >= len(layers):
            raise ConfigError(
                f"model.language.tome.layer is {cfg.layer}, and '{name}' has {len(layers)} layers: set it to "
                f"1 to {len(layers) - 1}, so that there are layers behind it."
            )
        self.layer, self.r = cfg.layer, cfg.r
        self._blocks: list[Block] = []
        self._merged: Merged | None = None
        self._inputs: dict[str, Any] = {}
        if config._attn_implementation not in ("sdpa", "eager"):
            raise ConfigError(f"model.language.tome: not with attention '{config._attn_implementation}'.")
        setattr(model, _MARK, True)
        for layer in layers[cfg.layer :]:
            layer.register_forward_pre_hook(self._before, with_kwargs=True)
        layers[cfg.layer].register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)
        layers[-1].register_forward_hook(self._after)

    def expect(self, layout: Layout, num_soft: Sequence[int]) -> None:
        """Says where the soft prompts of each image stand in what the model reads next."""
        rows, columns = layout.places.tolist()
        self._blocks, first = [], 0
        for length in num_soft:
            if self._num_merged(length):
                self._blocks.append(Block(rows[first], columns[first], length))
            first += length

    def _num_merged(self, num_soft: int) -> int:
        r = round(self.r * num_soft) if isinstance(self.r, float) else self.r
        return max(0, min(r, num_soft - 2))

    # ---- hooks ----

    def _begin(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the first layer behind the merge."""
        self._merged, self._inputs = None, {}
        cache, mask = _cache_of(kwargs), kwargs.get("attention_mask")
        if self._blocks:
            hidden, self._merged = self._merge(args[0])
            args = (hidden, *args[1:])
            self._inputs = _fewer_inputs(self._merged, kwargs)
            if cache is not None:
                cache.soft_prompts_merged = self._merged
            self._blocks = []
        elif (before := getattr(cache, "soft_prompts_merged", None)) is not None:
            past = cache.layers[self.layer].get_seq_length()
            self._inputs = {"attention_mask": _mask_of_rest(before, mask, args[0], past)}
        return args, kwargs

    def _before(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, **self._inputs}

    def _after(self, layer: nn.Module, args: tuple, output: Any) -> Any:
        """Behind the last layer."""
        if self._merged is None:
            return output
        merged, self._merged = self._merged, None
        if isinstance(output, tuple):
            return (_rows(output[0], merged.places), *output[1:])
        return _rows(output, merged.places)

    def _merge(self, hidden: Tensor) -> tuple[Tensor, Merged]:
        batch, length, _ = hidden.shape
        stays = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
        became = torch.arange(length, device=hidden.device).repeat(batch, 1)
        fewer = [0] * batch
        for num_soft in {block.length for block in self._blocks}:
            alike = [block for block in self._blocks if block.length == num_soft]
            r = self._num_merged(num_soft)
            found = torch.tensor([block[:2] for block in alike]).T[:, :, None]  # each [K, 1]
            rows, starts = found.to(hidden.device, non_blocking=True)
            columns = starts + torch.arange(num_soft, device=hidden.device)  # [K, M]
            values, places, merge_map = merge_similar(hidden[rows, columns], r)
            left = starts + places  # [K, M - r]
            hidden = hidden.index_put((rows.expand_as(left), left), values)
            stays[rows, columns] = False
            stays[rows, left] = True
            became[rows, columns] = left.gather(1, merge_map)
            for block in alike:
                fewer[block.row] += r
        order = (~stays).int().argsort(dim=1, stable=True)[:, : length - min(fewer)]
        is_left = stays.gather(1, order) if len(set(fewer)) > 1 else None
        places = (stays.cumsum(1) - 1).gather(1, became)
        return _rows(hidden, order), Merged(order, is_left, places)


def merges_soft_prompts(model: PreTrainedModel) -> bool:
    """Whether soft prompts merge inside a model."""
    return getattr(model, _MARK, False)


def _layers_of(model: PreTrainedModel, name: str) -> nn.ModuleList:
    config = model.config
    if config.model_type not in TYPES:
        raise ConfigError(
            f"model.language.tome: '{name}' is a {config.model_type} model, between whose layers nothing is "
            f"merged: that is known of {', '.join(TYPES)}. Take it out, or name another model."
        )
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"} or (
        config.model_type == "mistral" and config.sliding_window is not None
    ):
        raise ConfigError(
            f"model.language.tome: '{name}' reads through a window, which counts positions that are gone "
            "after a merge. Take it out, or name another model."
        )
    return next(m for n, m in model.named_modules() if n.endswith("layers") and isinstance(m, nn.ModuleList))


def _cache_of(kwargs: dict[str, Any]) -> Any:
    return kwargs.get("cache", kwargs.get("past_key_values"))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """[B, L, C] -> the named positions of each, [B, L', C]."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def _fewer_inputs(merged: Merged, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The mask and the positions of what is left."""
    batch = len(merged.order)
    found: dict[str, Any] = {}
    if (mask := kwargs.get("attention_mask")) is not None:  # None: causal, which hides what is at a row's end
        mask = _columns(mask.expand(batch, -1, -1, -1), merged)
        mask = mask.gather(2, merged.order[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        if merged.is_left is not None:  # what is nobody's sees itself: a row of a mask must not be empty
            itself = (
                torch.eye(mask.shape[2], dtype=torch.bool, device=mask.device)
                & ~merged.is_left[:, None, :, None]
            )
            mask = mask.masked_fill(itself, True if mask.dtype == torch.bool else 0.0)
        found["attention_mask"] = mask
    if (ids := kwargs.get("position_ids")) is not None:
        found["position_ids"] = ids.expand(batch, -1).gather(1, merged.order)
    if (angles := kwargs.get("position_embeddings")) is not None:
        found["position_embeddings"] = tuple(_rows(a.expand(batch, -1, -1), merged.order) for a in angles)
    return found


def _columns(mask: Tensor, merged: Merged) -> Tensor:
    """A mask [B, H, Q, L] of what is left: [B, H, Q, L']."""
    index = merged.order[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
    mask = mask.gather(3, index)
    if merged.is_left is None:
        return mask
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(~merged.is_left[:, None, None], hidden)


def _mask_of_rest(merged: Merged, mask: Tensor | None, hidden: Tensor, past: int) -> Tensor | None:
    """The mask of tokens [B, Q] that are read behind what is left; ``past``: what was read before them."""
    length, batch = merged.places.shape[1], len(merged.order)
    if mask is not None:
        mask = mask.expand(batch, -1, -1, -1)
        return torch.cat([_columns(mask[..., :length], merged), mask[..., length:]], dim=3)
    if merged.is_left is None:
        return None
    count = hidden.shape[1]
    causal = torch.ones(count, past + count, dtype=torch.bool, device=hidden.device).tril(past)
    causal = causal.repeat(batch, 1, 1, 1)
    causal[..., : merged.order.shape[1]] &= merged.is_left[:, None, None]
    return causal
