"""What a search continues: sequences that have been read once, with branches behind them.

What all continuations of an image share, its soft prompts and its prompt, is read once and never copied. The
continuations themselves stand side by side in one sequence for each image, as branches of a tree: a mask
says which tokens a branch sees. When beams change places, rows of that mask move, and nothing in the cache
does.
"""

from __future__ import annotations

import inspect
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


class Prefix(Protocol):
    """What a search continues: what has been read once, and R branches behind it.

    Attributes:
        next_position: [B, R], of each branch's next token.
        logits: [B, 1, vocabulary], of the token after the prefix.
    """

    next_position: Tensor
    logits: Tensor

    def read(self, tokens: Tensor, branches: Tensor | None = None) -> Tensor:
        """One more token in each branch: [B, R], and the branches [B, R] they continue (None: their own) ->
        logits of the next, [B, R, vocabulary]."""
        ...


def can_read_trees(model: PreTrainedModel, length: int) -> bool:
    """Whether a model takes positions and a mask for each pair of tokens, in all layers, up to a text of
    ``length``: not where a position is a distance in the sequence (ALiBi) or the past is a state or a
    window."""
    config = model.config.get_text_config(decoder=True)
    return (
        config._attn_implementation in ("sdpa", "eager")
        and {"position_ids", "logits_to_keep"} <= set(inspect.signature(model.forward).parameters)
        and not getattr(config, "alibi", False)
        and all(
            type(layer) is DynamicLayer
            or (getattr(layer, "is_sliding", False) and layer.sliding_window >= length)
            for layer in DynamicCache(config=config).layers
        )
    )


def cache_name(model: PreTrainedModel) -> str:
    """``past_key_values`` is called ``cache`` in later versions of transformers."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class _PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer in memory set aside beforehand, where `DynamicLayer` copies all it holds
    at every step."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.length = room, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_empty(*states.shape[:2], self.room, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def keep(self, rows: Tensor) -> None:
        """Goes on with some rows [n] of the batch alone, in ascending order."""
        for states in (self.keys, self.values):
            states[: len(rows), :, : self.length] = states[rows, :, : self.length]
        self.keys, self.values = self.keys[: len(rows)], self.values[: len(rows)]


class SharedPrefix:
    """What a model has read: one prefix for each image and R branches behind it.

    Args:
        embeds: [B, P, C].
        mask: [B, P], on the CPU: 0 for padding.
        branches: R.
        max_length: tokens of a branch at most.

    Attributes:
        logits: [B, 1, vocabulary], of the token after the prefix.
    """

    def __init__(
        self, model: PreTrainedModel, embeds: Tensor, mask: Tensor, branches: int, max_length: int
    ) -> None:
        padded = not mask.all()
        mask = mask.to(embeds.device, torch.bool)
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # [B, P]
        room = embeds.shape[1] + branches * max_length
        self.model, self.cache_name = model, cache_name(model)
        self.cache = Cache(
            [
                _PreallocatedLayer(room)
                for _ in range(model.config.get_text_config(decoder=True).num_hidden_layers)
            ]
        )
        next_position = positions[:, -1:].expand(-1, branches) + 1  # [B, R]
        visible = None  # [B, R, tokens read]; None: everything
        if padded or branches > 1:
            visible = mask[:, None].expand(-1, branches, -1)
            self.own = torch.eye(branches, dtype=torch.bool, device=embeds.device).expand(len(embeds), -1, -1)
        self.logits = model(
            inputs_embeds=embeds,
            attention_mask=mask if padded else None,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
        ).logits
        self._start = next_position, visible, [layer.length for layer in self.cache.layers]
        self.rewind()

    def rewind(self) -> None:
        """Forgets what was read behind the prefix."""
        self.next_position, self.visible, lengths = self._start
        for layer, length in zip(self.cache.layers, lengths, strict=True):
            layer.length = length

    @property
    def rows_may_leave(self) -> bool:
        """Whether `keep` may be called: not where soft prompts merge inside the model, image by image."""
        return getattr(self.cache, "soft_prompts_merged", None) is None

    def keep(self, rows: Tensor) -> None:
        """Goes on with some images [n] of the batch alone, in ascending order; there is no `rewind` then."""
        for layer in self.cache.layers:
            layer.keep(rows)
        self.next_position = self.next_position[rows]
        if self.visible is not None:
            self.visible, self.own = self.visible[rows], self.own[: len(rows)]

    def read(self, tokens: Tensor, branches: Tensor | None = None) -> Tensor:
        """One more token in each branch.

        Args:
            tokens: [B, R].
            branches: [B, R], the branch that each token continues; None: its own.

        Returns:
            logits of the next token, [B, R, vocabulary].
        """
        mask = None
        if self.visible is not None:
            if branches is not None:
                self.visible = branch_rows(self.visible, branches)
            self.visible = torch.cat([self.visible, self.own], dim=2)
            hidden = torch.finfo(self.logits.dtype).min
            mask = torch.zeros_like(self.visible, dtype=self.logits.dtype).masked_fill_(~self.visible, hidden)
        logits = self.model(
            input_ids=tokens,
            attention_mask=None if mask is None else mask[:, None],  # the same for all heads
            position_ids=self.next_position,
            use_cache=True,
            **{self.cache_name: self.cache},
        ).logits
        self.next_position = self.next_position + 1
        return logits


def branch_rows(x: Tensor, rows: Tensor) -> Tensor:
    """[B, R, T] -> the named rows of each batch entry, [B, K, T]."""
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))
