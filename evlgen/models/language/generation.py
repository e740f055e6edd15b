"""Decoding by a causal language model: greedy, beam search and nucleus sampling.

What all continuations of an image share, its soft prompts and its prompt, is read once and never copied. The
continuations themselves stand side by side in one sequence for each image, as branches of a tree: a mask
says which tokens a branch sees. When beams change places, rows of that mask move, and nothing in the cache
does. Results are those of transformers' ``generate``, which serves the models that cannot read a tree.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from evlgen.common.errors import ConfigError

#: Tokens that sampling chooses from at most: transformers' default, in force for every published result.
TOP_K = 50


@dataclass(frozen=True)
class Decoding:
    """How text is chosen. ``max_length`` and ``min_length`` count new tokens; ``top_k`` is how many tokens
    sampling chooses from at most, None for all; the rest is as in `VLM.generate`.

    Raises:
        ConfigError: options that exclude each other or are out of range.
    """

    num_beams: int = 5
    max_length: int = 30
    min_length: int = 1
    top_p: float = 0.9
    use_nucleus_sampling: bool = False
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    num_captions: int = 1
    temperature: float = 1.0
    top_k: int | None = TOP_K

    def __post_init__(self) -> None:
        if not self.use_nucleus_sampling and self.num_captions > self.num_beams:
            raise ConfigError(
                f"num_captions={self.num_captions} different texts cannot come from "
                f"num_beams={self.num_beams}. Raise num_beams, or set use_nucleus_sampling."
            )
        for name, good, wanted in (
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("max_length", self.max_length >= 1, "at least 1"),
            ("num_captions", self.num_captions >= 1, "at least 1"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("temperature", self.temperature > 0, "above 0"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None"),
        ):
            if not good:
                raise ConfigError(f"{name}={getattr(self, name)} for generation must be {wanted}.")


def decode(
    model: PreTrainedModel,
    embeds: Tensor,
    mask: Tensor,
    options: Decoding,
    end_tokens: Sequence[int],
    pad_token: int,
) -> Tensor:
    """Continues sequences of embeddings.

    Args:
        model: any causal language model of transformers.
        embeds: [B, P, C], soft prompts and prompt.
        mask: [B, P], on the CPU: 0 where ``embeds`` is padding.
        options: how text is chosen.
        end_tokens: the tokens that end a text.
        pad_token: fills what is behind one.

    Returns:
        ids of the new tokens, [B x num_captions, T], those of one image in a row.
    """
    if not can_read_trees(model, embeds.shape[1] + options.max_length):
        return decode_by_transformers(model, embeds, mask.to(embeds.device), options, end_tokens, pad_token)
    ends = torch.tensor(end_tokens, device=embeds.device)
    return search(
        lambda branches: SharedPrefix(model, embeds, mask, branches, options.max_length),
        options,
        ends,
        pad_token,
    )


def decode_stepwise(
    model: PreTrainedModel,
    embeds: Tensor,
    mask: Tensor,
    options: Decoding,
    end_tokens: Sequence[int],
    pad_token: int,
) -> Iterator[list[int]]:
    """`decode`, greedily or by sampling, token by token: the next one of each of B x num_captions texts, the
    end token the last. All at once where a model's past is a state or a window.

    Raises:
        ConfigError: beams are asked for.
    """
    if options.num_beams > 1 and not options.use_nucleus_sampling:
        raise ConfigError(
            "num_beams: a text cannot be streamed while beams may still change it; set it to 1."
        )
    if not can_read_trees(model, embeds.shape[1] + options.max_length):
        ids = decode_by_transformers(model, embeds, mask.to(embeds.device), options, end_tokens, pad_token)
        yield from ids.T.tolist()
        return
    ends = torch.tensor(end_tokens, device=embeds.device)
    branches = options.num_captions if options.use_nucleus_sampling else 1
    prefix = SharedPrefix(model, embeds, mask, branches, options.max_length)
    for texts in _extensions(prefix, options, ends, pad_token):
        yield texts[:, :, -1].flatten().tolist()


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


def search(prefix_of: Callable[[int], Prefix], options: Decoding, ends: Tensor, pad_token: int) -> Tensor:
    """Continues by sampling, beams or greedily, as ``options`` say.

    Args:
        prefix_of: from a number of branches to the prefix that has them.
        ends: [E], the tokens that end a text.
        pad_token: fills what is behind one.

    Returns:
        ids of the new tokens, [B x num_captions, T], those of one image in a row.
    """
    if options.use_nucleus_sampling:
        ids = _extend(prefix_of(options.num_captions), options, ends, pad_token)
    elif options.num_beams > 1:
        ids = _beam_search(prefix_of(options.num_beams), options, ends, pad_token)[:, : options.num_captions]
    else:
        ids = _extend(prefix_of(1), options, ends, pad_token)
    return ids.flatten(0, 1)


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
            or (getattr(layer, "is_sliding", False) and layer.get_max_length() >= length)
            for layer in DynamicCache(config=config).layers
        )
    )


def _cache_name(model: PreTrainedModel) -> str:
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
        self.model, self.cache_name = model, _cache_name(model)
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


def _extend(prefix: Prefix, options: Decoding, ends: Tensor, pad_token: int) -> Tensor:
    """Every branch for itself, sampled or greedy; ``ends`` [E] end a text. Returns [B, R, T]."""
    *_, texts = _extensions(prefix, options, ends, pad_token)
    return texts


def _extensions(prefix: Prefix, options: Decoding, ends: Tensor, pad_token: int) -> Iterator[Tensor]:
    """The texts so far, [B, R, T], after each token."""
    texts = prefix.next_position.new_empty(*prefix.next_position.shape, 0)  # [B, R, 0]
    ended = torch.zeros_like(prefix.next_position, dtype=torch.bool)
    logits = prefix.logits
    while True:
        scores = _adjust(logits.float(), texts, options, ends).expand(-1, texts.shape[1], -1)
        tokens = _sample(scores, options) if options.use_nucleus_sampling else scores.argmax(-1)
        tokens = tokens.masked_fill(ended, pad_token)
        texts = torch.cat([texts, tokens[:, :, None]], dim=2)
        ended = ended | torch.isin(tokens, ends)
        yield texts
        if texts.shape[2] == options.max_length or ended.all():
            return
        logits = prefix.read(tokens)


def _sample(scores: Tensor, options: Decoding) -> Tensor:
    """[..., vocabulary] -> tokens [...], drawn by torch's global generator from the likeliest of total
    probability ``top_p`` among the ``top_k`` likeliest. Holtzman et al., *The Curious Case of Neural Text
    Degeneration*, ICLR 2020, section 3.1."""
    scores = scores / options.temperature
    if options.top_k is None and options.top_p == 1:  # of all tokens: nothing to sort
        return torch.multinomial(scores.softmax(-1).flatten(0, -2), 1).view(scores.shape[:-1])
    probabilities, tokens = nucleus(scores, options.top_p, options.top_k)
    drawn = torch.multinomial(probabilities.flatten(0, -2), 1).view(*scores.shape[:-1], 1)
    return tokens.gather(-1, drawn).squeeze(-1)


def nucleus(scores: Tensor, top_p: float, k: int | None = TOP_K) -> tuple[Tensor, Tensor]:
    """[..., vocabulary] -> probabilities that need not sum to 1 and their tokens, both [..., at most k]."""
    best, tokens = top_k(scores, min(k or scores.shape[-1], scores.shape[-1]))
    probabilities = best.softmax(-1)
    likelier = probabilities.cumsum(-1) - probabilities
    return probabilities.masked_fill(likelier >= top_p, 0.0), tokens


def _beam_search(prefix: Prefix, options: Decoding, ends: Tensor, pad_token: int) -> Tensor:
    """The best texts, best first: [B, beams, max_length].

    A text's score is its log probability / length ** length_penalty. An image is done when its best
    unfinished text, at its present length, scores below the worst of ``beams`` finished ones (transformers'
    ``early_stopping=False``).
    """
    batch, beams = prefix.next_position.shape
    texts = prefix.next_position.new_empty(batch, 1, 0)  # unfinished: [B, R, 0]
    running = prefix.logits.new_zeros(batch, 1, dtype=torch.float)  # their log probabilities
    finished = texts.new_full((batch, beams, options.max_length), pad_token)
    scores = running.new_full((batch, beams), -torch.inf)
    improvable = torch.ones_like(scores[:, :1], dtype=torch.bool)
    logits = prefix.logits
    for length in range(1, options.max_length + 1):
        log_probs = _adjust(logits.float().log_softmax(-1), texts, options, ends)
        # with one end token at most half of twice as many as beams end here, so enough go on
        wide = (1 + len(ends)) * beams
        best, tokens = top_k(log_probs, min(wide, log_probs.shape[-1]))
        best, index = (best + running[:, :, None]).flatten(1).topk(wide)  # [B, wide]
        parents, tokens = index // tokens.shape[2], tokens.flatten(1).gather(1, index)
        candidates = torch.cat([branch_rows(texts, parents), tokens[:, :, None]], dim=2)
        ended = (
            torch.isin(tokens, ends)
            if length < options.max_length
            else torch.ones_like(tokens, dtype=torch.bool)
        )

        # only what is among the best `beams` continuations can be a result
        closing = ended & improvable
        closing[:, beams:] = False
        new = (best / length**options.length_penalty).masked_fill(~closing, -torch.inf)
        scores, kept = torch.cat([scores, new], dim=1).topk(beams)
        padded = F.pad(candidates, (0, options.max_length - length), value=pad_token)
        finished = branch_rows(torch.cat([finished, padded], dim=1), kept)

        running, going_on = best.masked_fill(ended, -torch.inf).topk(beams)
        improvable = improvable & (
            running[:, :1] / length**options.length_penalty > scores.amin(1, keepdim=True)
        )
        if length == options.max_length or not improvable.any():
            break
        texts = branch_rows(candidates, going_on)
        # behind the prefix there are no branches yet that could change places
        branches = parents.gather(1, going_on) if length > 1 else None
        logits = prefix.read(texts[:, :, -1], branches)
    return finished


def branch_rows(x: Tensor, rows: Tensor) -> Tensor:
    """[B, R, T] -> the named rows of each batch entry, [B, K, T]."""
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))


def _adjust(scores: Tensor, texts: Tensor, options: Decoding, ends: Tensor) -> Tensor:
    """No end before ``min_length``, and tokens that are there already made less likely (Keskar et al.,
    *CTRL*, 2019, section 4.1). scores: [B, R, vocabulary], texts: [B, R, T]."""
    if options.repetition_penalty != 1.0 and texts.shape[2]:
        there = scores.gather(2, texts)
        penalty = options.repetition_penalty
        scores = scores.scatter(2, texts, torch.where(there < 0, there * penalty, there / penalty))
    if texts.shape[2] < options.min_length:
        scores = scores.index_fill(2, ends, -torch.inf)
    return scores


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk` over the last dimension, for a vocabulary's length and small k.

    The k largest are in the k groups of the largest maxima: finding those is one vectorised pass, while
    `torch.topk` on CPU moves every value about together with its index.
    """
    size, members = scores.shape[-1], 32
    groups = size // members
    if groups < k:
        return scores.topk(k)
    maxima = scores[..., : groups * members].unflatten(-1, (members, groups)).amax(-2)
    first = maxima.topk(k).indices[..., None]  # [..., k, 1]: group g is g, g + groups, g + 2 groups, ...
    inside = (first + torch.arange(0, groups * members, groups, device=scores.device)).flatten(-2)
    rest = torch.arange(groups * members, size, device=scores.device).expand(*inside.shape[:-1], -1)
    candidates = torch.cat([inside, rest], dim=-1)
    values, index = scores.gather(-1, candidates).topk(k)
    return values, candidates.gather(-1, index)


def decode_by_transformers(
    model: PreTrainedModel,
    embeds: Tensor,
    mask: Tensor,
    options: Decoding,
    end_tokens: Sequence[int],
    pad_token: int,
) -> Tensor:
    """`decode` by transformers, which repeats the prefix for every beam; ``embeds`` of an encoder-decoder are
    what its encoder reads."""
    if options.use_nucleus_sampling:
        how = {
            "do_sample": True,
            "num_beams": 1,
            "top_k": options.top_k or 0,
            "top_p": options.top_p,
            "temperature": options.temperature,
        }
    elif options.num_beams > 1:
        how = {"do_sample": False, "num_beams": options.num_beams, "length_penalty": options.length_penalty}
    else:
        how = {"do_sample": False, "num_beams": 1}
    config = GenerationConfig(
        max_new_tokens=options.max_length,
        min_new_tokens=options.min_length,
        repetition_penalty=options.repetition_penalty,
        num_return_sequences=options.num_captions,
        eos_token_id=list(end_tokens),
        pad_token_id=pad_token,
        early_stopping=False,
        **how,
    )
    return model.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config)
