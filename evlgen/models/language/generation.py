"""Decoding by a causal language model: greedy, beam search and nucleus sampling.

What all continuations of an image share is read once, and beams are branches behind it (`prefixes`). On a
GPU nothing here waits for the card but the question whether all texts have ended, every few tokens. Results
are those of transformers' ``generate``, which serves the models that cannot read a tree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
)

from evlgen.common.errors import ConfigError
from evlgen.models.language.fixed_prefix import prefix_behind
from evlgen.models.language.prefixes import Prefix, SharedPrefix, branch_rows, can_read_trees

#: Tokens that sampling chooses from at most: transformers' default, in force for every published result.
TOP_K = 50

#: Below this temperature, and this penalty of repetitions, scores divided by it may overflow to infinity.
LEAST = 0.01

#: A GPU is asked after so many tokens whether all texts have ended: until it answers it has nothing to do.
_TOKENS_PER_QUESTION = 8

#: Images whose texts have ended leave the batch where at most this fraction of it goes on, whose keys and
#: values are copied then.
_STAY = 0.75

_WATCHER: ContextVar[Callable[[list[list[int]]], None] | None] = ContextVar("watcher", default=None)


@contextlib.contextmanager
def watched(by: Callable[[list[list[int]]], None]) -> Iterator[None]:
    """Within the block ``by`` is given all texts so far after each token, B x num_captions lists of tokens of
    one length, padded behind an end token. Not of a beam search, which may still change them, nor of models
    whose texts transformers writes."""
    token = _WATCHER.set(by)
    try:
        yield
    finally:
        _WATCHER.reset(token)


@dataclass(frozen=True)
class Decoding:
    """How text is chosen. ``max_length`` and ``min_length`` count new tokens; ``top_k`` is how many tokens
    sampling chooses from at most, None for all; ``evenly`` samples without chance, texts that are spread over
    the distribution; a ``temperature`` below `LEAST` becomes that; the rest is as in `VLM.generate`.

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
    evenly: bool = False

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
            ("repetition_penalty", self.repetition_penalty >= LEAST, f"at least {LEAST}"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None"),
        ):
            if not good:
                raise ConfigError(f"{name}={getattr(self, name)} for generation must be {wanted}.")
        # transformers takes no whole numbers for these
        object.__setattr__(self, "temperature", max(float(self.temperature), LEAST))
        object.__setattr__(self, "repetition_penalty", float(self.repetition_penalty))


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
    with contextlib.ExitStack() as stack:

        def prefix_of(branches: int) -> Prefix:
            return stack.enter_context(prefix_behind(model, embeds, mask, branches, options.max_length))

        return search(prefix_of, options, ends, pad_token)


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
    with prefix_behind(model, embeds, mask, branches, options.max_length) as prefix:
        for texts in _extensions(prefix, options, ends, pad_token, question_every=1):
            yield texts[:, :, -1].flatten().tolist()


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


def _extend(prefix: Prefix, options: Decoding, ends: Tensor, pad_token: int) -> Tensor:
    """Every branch for itself, sampled or greedy; ``ends`` [E] end a text. Returns [B, R, T]."""
    watcher = _WATCHER.get()
    question_every = _question_every(ends.device) if watcher is None else 1
    for texts in _extensions(prefix, options, ends, pad_token, question_every):
        if watcher is not None:
            watcher(texts.flatten(0, 1).tolist())
    return texts


def _question_every(device: torch.device) -> int:
    """After how many tokens it is asked whether all texts have ended."""
    return 1 if device.type == "cpu" else _TOKENS_PER_QUESTION


def _extensions(
    prefix: Prefix, options: Decoding, ends: Tensor, pad_token: int, question_every: int
) -> Iterator[Tensor]:
    """The texts so far, [B, R, T], after each token; at most ``question_every`` - 1 tokens of padding
    longer than the longest."""
    everyone = texts = prefix.next_position.new_empty(*prefix.next_position.shape, 0)  # [B, R, 0]
    rows = torch.arange(len(texts), device=texts.device)  # those that are still in the batch
    ended = torch.zeros_like(prefix.next_position, dtype=torch.bool)
    points = _even_points(texts.shape[1], options) if options.evenly else None
    logits = prefix.logits
    while True:
        scores = _adjust(logits.float(), texts, options, ends).expand(-1, texts.shape[1], -1)
        if options.use_nucleus_sampling and points is not None:
            tokens = _sample_at(scores, options, points[texts.shape[2]])
        elif options.use_nucleus_sampling:
            tokens = _sample(scores, options, rows, len(everyone))
        else:
            tokens = scores.argmax(-1)
        tokens = tokens.masked_fill(ended, pad_token)
        texts = torch.cat([texts, tokens[:, :, None]], dim=2)
        ended = ended | torch.isin(tokens, ends)
        everyone = F.pad(everyone, (0, 1), value=pad_token)
        everyone[rows] = texts
        yield everyone
        length = texts.shape[2]
        if length == options.max_length:
            return
        if length % question_every == 0:
            left = _left(prefix, ended.all(1))
            if not len(left):
                return
            if len(left) < len(rows):
                rows, texts, ended, tokens = rows[left], texts[left], ended[left], tokens[left]
        logits = prefix.read(tokens)


def _left(prefix: Prefix, done: Tensor) -> Tensor:
    """The rows [n] of a batch to go on with, where some are ``done`` [B]: all of them where none can leave or
    too few are done for it to pay; none where all are done. The prefix goes on with these."""
    left = (~done).nonzero()[:, 0]
    if not len(left):
        return left
    if len(left) > _STAY * len(done) or not (isinstance(prefix, SharedPrefix) and prefix.rows_may_leave):
        return torch.arange(len(done), device=done.device)
    prefix.keep(left)
    return left


def _sample(scores: Tensor, options: Decoding, rows: Tensor, batch: int) -> Tensor:
    """[n, R, vocabulary], of ``rows`` [n] of a batch -> tokens [n, R], drawn by torch's global generator
    from the likeliest of total probability ``top_p`` among the ``top_k`` likeliest. Holtzman et al., *The
    Curious Case of Neural Text Degeneration*, ICLR 2020, section 3.1."""
    scores = scores / options.temperature
    if options.top_k is None and options.top_p == 1:  # of all tokens: nothing to sort
        return _draw(scores.softmax(-1), rows, batch)
    probabilities, tokens = nucleus(scores, options.top_p, options.top_k)
    return tokens.gather(-1, _draw(probabilities, rows, batch)[..., None]).squeeze(-1)


def _draw(probabilities: Tensor, rows: Tensor, batch: int) -> Tensor:
    """What `torch.multinomial` draws, one of each row [..., n] -> [...], without its checks: those wait for
    the card. Drawn for the whole batch, so that it is the same whoever has left it."""
    noise = probabilities.new_empty(batch, *probabilities.shape[1:]).exponential_(1)
    return (probabilities / (noise if len(rows) == batch else noise[rows])).argmax(-1)


def _even_points(branches: int, options: Decoding) -> Tensor:
    """Where in [0, 1) each branch chooses its tokens, [max_length, branches], on the CPU: at even distances
    among the branches, and in another order for each token (Latin hypercube: McKay et al., 1979). Those of
    every image."""
    by_seed = torch.Generator().manual_seed(0)
    places = [torch.randperm(branches, generator=by_seed) for _ in range(options.max_length)]
    return (torch.stack(places) + 0.5) / branches


def _sample_at(scores: Tensor, options: Decoding, points: Tensor) -> Tensor:
    """As `_sample`, where ``points`` [R] choose: each token has a share of [0, 1) as large as its
    probability, the likeliest the first."""
    probabilities, tokens = nucleus(scores / options.temperature, options.top_p, options.top_k)
    ends = probabilities.cumsum(-1)  # [n, R, K]
    chosen = points.to(ends.device, ends.dtype, non_blocking=True) * ends[..., -1]
    place = (ends <= chosen[..., None]).sum(-1, keepdim=True).clamp(max=ends.shape[-1] - 1)
    return tokens.gather(-1, place).squeeze(-1)


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
    everyone, rows = finished.clone(), torch.arange(batch, device=finished.device)  # see `_extensions`
    logits, question_every = prefix.logits, _question_every(ends.device)
    for length in range(1, options.max_length + 1):
        log_probs = _adjust(logits.float().log_softmax(-1), texts, options, ends)
        # with one end token at most half of twice as many as beams end here, so enough go on
        wide = (1 + len(ends)) * beams
        best, tokens = top_k(log_probs, min(wide, log_probs.shape[-1]))
        total = (best + running[:, :, None]).flatten(1)
        best, index = total.topk(min(wide, total.shape[1]))
        missing = (0, wide - best.shape[1])  # where the vocabulary has fewer tokens than that
        best, index = F.pad(best, missing, value=-torch.inf), F.pad(index, missing)  # [B, wide]
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
        if length == options.max_length:
            break
        texts = branch_rows(candidates, going_on)
        # behind the prefix there are no branches yet that could change places
        branches = parents.gather(1, going_on) if length > 1 else None
        if length % question_every == 0:
            left = _left(prefix, ~improvable[:, 0])
            if not len(left):
                break
            if len(left) < len(rows):
                everyone[rows] = finished
                rows, texts, running, finished = rows[left], texts[left], running[left], finished[left]
                scores, improvable = scores[left], improvable[left]
                branches = None if branches is None else branches[left]
        logits = prefix.read(texts[:, :, -1], branches)
    everyone[rows] = finished
    return everyone


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
        repetition_penalty=1.0,
        num_return_sequences=options.num_captions,
        eos_token_id=list(end_tokens),
        pad_token_id=pad_token,
        early_stopping=False,
        **how,
    )
    processors = LogitsProcessorList()
    if options.repetition_penalty != 1.0:
        # the one that `repetition_penalty` of the configuration makes takes a row's padding for tokens of its
        # text where embeddings are given, and exempts as many of the first new ones
        processors.append(RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
    with contextlib.ExitStack() as stack:
        if options.evenly:  # it cannot, but the same ones each time
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(0)
        return model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            generation_config=config,
            logits_processor=processors,
        )
