"""Decoding gives what transformers' ``generate`` gives, for every kind of model and every option."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from evlgen.common.errors import ConfigError
from evlgen.models.language import generation
from evlgen.models.language.generation import (
    TOP_K,
    Decoding,
    decode,
    decode_by_transformers,
    nucleus,
    top_k,
)
from evlgen.models.language.prefixes import can_read_trees

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GEMMA = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.1}
CONFIGS = {
    "opt": OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=128),
    "llama": LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=8),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=64),
    "gemma2": Gemma2Config(**SMALL, **GEMMA, final_logit_softcapping=2.0, attn_logit_softcapping=1.0),
    "gemma3": Gemma3TextConfig(**SMALL, **GEMMA, sliding_window=32),
    "bloom": BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),  # ALiBi: reads no trees
}
END, PAD = 5, 1
OPTIONS = {
    "greedy": Decoding(num_beams=1, max_length=12),
    "beams": Decoding(num_beams=5, max_length=12),
    "three captions": Decoding(num_beams=4, max_length=8, num_captions=3),
    "short ones": Decoding(num_beams=5, max_length=12, length_penalty=-1.0),
    "any length": Decoding(num_beams=3, max_length=12, length_penalty=0.0),
    "at least six": Decoding(num_beams=5, max_length=12, min_length=6),
    "no repeats": Decoding(num_beams=4, max_length=12, repetition_penalty=1.7),
    "greedy, no repeats": Decoding(num_beams=1, max_length=12, repetition_penalty=1.7, min_length=3),
}


def model_of(kind: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()


def inputs(model, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    embeds = 2.0 * torch.randn(3, 7, model.get_input_embeddings().embedding_dim)
    mask = torch.ones(3, 7, dtype=torch.long)
    if padded:  # the prompts of three images, after four soft prompts
        mask[0, 4:6] = 0
        mask[2, 4:5] = 0
    return embeds, mask


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["opt", "llama", "qwen3", "gpt_neox", "gemma2", "gemma3"])
@torch.no_grad()
def test_texts_are_those_of_transformers(kind, options, padded):
    model = model_of(kind)
    with torch.no_grad():  # so that texts end, each at a length of its own
        model.get_output_embeddings().weight[END] *= 3.0
    embeds, mask = inputs(model, padded)
    ours = decode(model, embeds, mask, options, [END], PAD)
    theirs = decode_by_transformers(model, embeds, mask, options, [END], PAD)
    assert texts(ours) == texts(theirs)
    assert len(ours) == 3 * options.num_captions


GREEDY = Decoding(num_beams=1, max_length=24, repetition_penalty=1.3)
BEAMS = Decoding(num_beams=3, max_length=24, num_captions=2)
SAMPLED = Decoding(use_nucleus_sampling=True, max_length=24)
THREE_SAMPLED = Decoding(use_nucleus_sampling=True, max_length=24, num_captions=3)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("kind", "options", "scale", "bonus"),
    [
        *[("opt", GREEDY, 3.0, 1.5), ("opt", BEAMS, 3.0, 1.5), ("opt", SAMPLED, 1.0, 2.0)],
        *[("gemma3", GREEDY, 1.0, 1.0), ("gemma3", BEAMS, 1.0, 2.0), ("gemma3", THREE_SAMPLED, 1.0, 2.0)],
    ],
    ids=["greedy", "beams", "sampled", "greedy, windows", "beams, windows", "three sampled, windows"],
)
@torch.no_grad()
def test_images_whose_texts_have_ended_leave_and_change_no_text(
    kind, options, scale, bonus, padded, monkeypatch
):
    model = model_of(kind)
    likelier = torch.zeros(97)
    likelier[END] = bonus  # so that texts end, at different lengths
    sizes: list[int] = []  # images in the batch at each token

    def change(module, inputs, logits):
        sizes.append(len(logits))
        return scale * logits + likelier

    model.get_output_embeddings().register_forward_hook(change)
    torch.manual_seed(2)
    embeds, mask = 2.0 * torch.randn(16, 7, 32), torch.ones(16, 7, dtype=torch.long)
    if padded:
        mask[::3, 4:6] = 0

    def written() -> list[list[int]]:
        sizes.clear()
        torch.manual_seed(3)
        return decode(model, embeds, mask, options, [END], PAD).tolist()

    found = written()
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 16 and sizes[-1] <= 12
    monkeypatch.setattr(generation, "_STAY", -1.0)
    assert written() == found
    assert {*sizes} == {16}


@pytest.mark.parametrize("num_beams", [1, 3])
@torch.no_grad()
def test_any_of_several_tokens_ends_a_text(num_beams):
    model = model_of("llama")
    ends = [END, 11, 40]
    model.get_output_embeddings().weight[ends] *= 3.0
    embeds, mask = inputs(model, padded=True)
    options = Decoding(num_beams=num_beams, max_length=12, min_length=2)
    ours = texts(decode(model, embeds, mask, options, ends, PAD), ends)
    assert ours == texts(decode_by_transformers(model, embeds, mask, options, ends, PAD), ends)
    assert {len(text) for text in ours} != {12}


@torch.no_grad()
def test_enough_beams_go_on_where_several_end_tokens_are_likely():
    model = model_of("llama")
    ends = [END, 11, 40]
    bonus = torch.zeros(97)
    bonus[ends] = 2.0
    model.get_output_embeddings().register_forward_hook(lambda *args: 10.0 * args[2] + bonus)
    embeds, mask = inputs(model, padded=True)
    options = Decoding(num_beams=4, num_captions=4, max_length=8, length_penalty=3.0)
    ours = texts(decode(model, embeds, mask, options, ends, PAD), ends)
    assert ours == texts(decode_by_transformers(model, embeds, mask, options, ends, PAD), ends)


def texts(ids: torch.Tensor, ends: Sequence[int] = (END,)) -> list[list[int]]:
    """Token ids up to the end."""
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in ids.tolist()]


def test_a_model_whose_positions_are_distances_is_left_to_transformers():
    assert not can_read_trees(model_of("bloom"), 20)
    state = Qwen3NextConfig(
        **SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=1
    )
    assert not can_read_trees(AutoModelForCausalLM.from_config(state), 20), "its past is a state"
    assert all(can_read_trees(model_of(kind), 20) for kind in CONFIGS if kind != "bloom")
    assert not can_read_trees(model_of("gemma3"), 40), "longer than the window it sees"


@pytest.mark.parametrize("num_beams", [33, 60, 97])
@pytest.mark.parametrize("ends", [[END], [END, 7, 9]])
@torch.no_grad()
def test_as_many_beams_as_the_vocabulary_has_tokens(num_beams, ends):
    model = model_of("llama")
    options = Decoding(num_beams=num_beams, max_length=3, num_captions=5)
    embeds, mask = inputs(model, padded=True)
    ours = decode(model, embeds, mask, options, ends, PAD)
    theirs = decode_by_transformers(model, embeds, mask, options, ends, PAD)
    assert texts(ours, ends) == texts(theirs, ends)


@pytest.mark.parametrize("num_beams", [1, 3])
@torch.no_grad()
def test_padding_exempts_no_token_from_the_repetition_penalty(num_beams):
    model = model_of("bloom")  # by transformers
    options = Decoding(num_beams=num_beams, max_length=6, repetition_penalty=1.7)
    embeds, mask = inputs(model, padded=False)
    mask[0, :4], mask[2, :2] = 0, 0  # shorter prompts than the second's
    together = decode(model, embeds, mask, options, [END], PAD)
    starts = [4, 0, 2]
    alone = [
        decode(model, embeds[i : i + 1, start:], mask[i : i + 1, start:], options, [END], PAD)
        for i, start in enumerate(starts)
    ]
    assert texts(together) == [text for ids in alone for text in texts(ids)]


@torch.no_grad()
def test_what_a_beam_sees_is_its_own_text_alone():
    """Scores of the texts found, computed again from the whole text, are those the search went by."""
    model = model_of("opt")
    embeds, mask = inputs(model, padded=False)
    options = Decoding(num_beams=4, max_length=6, min_length=6, num_captions=4, length_penalty=0.0)
    ids = decode(model, embeds, mask, options, [END], PAD).view(3, 4, -1)
    scores = torch.zeros(3, 4)
    for beam in range(4):
        whole = torch.cat([embeds, model.get_input_embeddings()(ids[:, beam])], dim=1)
        log_probs = model(inputs_embeds=whole).logits[:, 6:-1].log_softmax(-1)
        scores[:, beam] = log_probs.gather(-1, ids[:, beam, :, None]).sum((1, 2))
    assert (scores[:, :-1] >= scores[:, 1:] - 1e-5).all(), "the best text comes first"
    assert all(len({tuple(text) for text in one.tolist()}) == 4 for one in ids)


@torch.no_grad()
def test_sampling_draws_from_the_nucleus_only_and_repeats_with_a_seed():
    model = model_of("opt")
    embeds, mask = inputs(model, padded=True)
    options = Decoding(use_nucleus_sampling=True, num_captions=40, max_length=1, top_p=0.3)
    torch.manual_seed(0)
    first = decode(model, embeds, mask, options, [END], PAD).view(3, 40)
    torch.manual_seed(0)
    assert torch.equal(decode(model, embeds, mask, options, [END], PAD).view(3, 40), first)
    logits = model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)
    ).logits
    logits[:, -1, END] = -torch.inf  # min_length is 1
    for row, drawn in zip(logits[:, -1].softmax(-1), first, strict=True):
        likeliest, tokens = row.sort(descending=True)
        likeliest = likeliest / likeliest[:TOP_K].sum()
        inside = set(tokens[: int((likeliest.cumsum(0) < 0.3).sum()) + 1].tolist())
        assert set(drawn.tolist()) <= inside
        assert len(set(drawn.tolist())) > 1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["opt", "bloom"])  # bloom is left to transformers
def test_no_temperature_is_so_low_that_scores_overflow(kind):
    model = model_of(kind)
    prompt = torch.randn(2, 4, 32)
    mask = torch.ones(2, 4, dtype=torch.long)
    cold = Decoding(1, 12, use_nucleus_sampling=True, temperature=1e-40, repetition_penalty=2)
    assert cold.temperature == 0.01
    model.get_output_embeddings().weight *= 1e3  # the likeliest token is the only one
    greedy = decode(model, prompt, mask, Decoding(1, 12, repetition_penalty=2), [END], PAD)
    assert torch.equal(decode(model, prompt, mask, cold, [END], PAD), greedy)


def test_sampling_from_a_nucleus_of_one_token_is_greedy_in_every_branch():
    model = model_of("opt")
    embeds, mask = inputs(model, padded=True)
    options = Decoding(use_nucleus_sampling=True, num_captions=3, max_length=12, top_p=1e-6)
    sampled = texts(decode(model, embeds, mask, options, [END], PAD))
    greedy = texts(decode(model, embeds, mask, OPTIONS["greedy"], [END], PAD))
    assert sampled == [text for text in greedy for _ in range(3)]


@torch.no_grad()
def test_without_limits_tokens_are_drawn_as_often_as_the_model_says():
    model = model_of("opt")
    embeds, mask = inputs(model, padded=False)
    free = {"use_nucleus_sampling": True, "top_p": 1.0, "top_k": None, "min_length": 0}
    torch.manual_seed(0)
    draws = 4000
    options = Decoding(num_captions=draws, max_length=1, **free)
    drawn = decode(model, embeds[:1], mask[:1], options, [END], PAD).flatten()
    probabilities = model(inputs_embeds=embeds[:1]).logits[0, -1].softmax(-1)
    share = torch.bincount(drawn, minlength=97) / draws
    deviation = (probabilities * (1 - probabilities) / draws).sqrt()
    assert share.count_nonzero() > TOP_K and share[END] > 0
    assert ((share - probabilities).abs() / deviation).max() < 4.5


@torch.no_grad()
def test_a_nucleus_of_more_tokens_than_top_k_is_what_top_k_none_takes():
    scores = torch.randn(3, 97, generator=torch.Generator().manual_seed(0))
    probabilities, tokens = nucleus(scores, 0.999, None)
    assert (probabilities > 0).sum(-1).min() > TOP_K
    assert torch.equal(tokens.sort(-1).values, torch.arange(97).expand(3, -1))
    limited, _ = nucleus(scores, 0.999, 10)
    assert limited.shape == (3, 10)


def test_the_nucleus_is_the_smallest_set_of_that_probability():
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, size in ((0.4, 1), (0.5, 1), (0.6, 2), (0.8, 2), (0.94, 3), (1.0, 4)):
        probabilities, _ = nucleus(scores, top_p)
        assert (probabilities > 0).sum() == size, top_p


@pytest.mark.parametrize("size", [7, 64, 97, 1000, 50272])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_top_k_is_torchs(size, k):
    k = min(k, size)
    scores = torch.randn(3, 2, size, generator=torch.Generator().manual_seed(size))
    scores[0, 0, : size // 2] = -torch.inf
    values, index = top_k(scores, k)
    assert torch.equal(values, scores.topk(k).values)
    assert torch.equal(scores.gather(-1, index), values)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 2, "num_captions": 3}, "num_captions=3 different texts cannot come from num_beams=2"),
        ({"num_beams": 0, "use_nucleus_sampling": True}, "num_beams=0 for generation must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 for generation must be above 0"),
        ({"top_k": 0}, "top_k=0 for generation must be at least 1, or None"),
        ({"temperature": 0.0}, "temperature=0.0 for generation must be above 0"),
        ({"max_length": 0}, "max_length=0 for generation must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        Decoding(**options)
