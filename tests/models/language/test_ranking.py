"""How likely texts are, and each sample's own loss: equal to one text at a time, over families of language
models."""

from __future__ import annotations

import pytest
import torch

from evlgen.models.language import (
    CausalLanguageModel,
    OPTLanguageModel,
    Seq2SeqLanguageModel,
    VicunaLanguageModel,
)
from evlgen.models.language.ranking import log_likelihoods

PROMPTS = ["Question: what color is the circle? Short answer:", "how many stars are there?", "", "a "]
ANSWERS = ["red", "two blue stars", "a small cat on a hill", "two", "no", "red"]
#: Of them the first three are read as trees, Mamba and BLOOM text by text, and the others by a decoder.
FAMILIES = ("opt", "llama", "gemma3", "bloom", "mamba", "t5", "bart", "vicuna")


@pytest.fixture(scope="module", params=FAMILIES)
def language(request, model_folder, seq2seq_folder, llama_folder):
    return build(request.param, model_folder, seq2seq_folder, llama_folder)


def build(family, model_folder, seq2seq_folder, llama_folder, **options):
    if family in ("t5", "bart"):
        return Seq2SeqLanguageModel(str(seq2seq_folder(family)), max_txt_len=40, **options).eval()
    if family == "vicuna":
        return VicunaLanguageModel(str(llama_folder("tokenizer.json")), max_txt_len=40, **options).eval()
    kind = OPTLanguageModel if family == "opt" else CausalLanguageModel
    return kind(str(model_folder(family)), max_txt_len=40, **options).eval()


@torch.no_grad()
def one_at_a_time(language, soft, prompt, answers):
    """The negated loss of each answer by itself."""
    return [-language.sample_losses(soft, [prompt], [answer])[0].item() for answer in answers]


def test_texts_are_as_likely_as_each_alone(language, soft_prompts):
    soft = soft_prompts(language, len(PROMPTS))
    found = language.log_likelihoods(soft, PROMPTS, [ANSWERS] * len(PROMPTS))
    for row, (prompt, scores) in enumerate(zip(PROMPTS, found, strict=True)):
        expected = one_at_a_time(language, soft[row : row + 1], prompt, ANSWERS)
        if language.KIND == "opt" and not prompt:  # the start of the text, the same for all, is learned too
            expected = [value - expected[0] + scores[0].item() for value in expected]
        assert scores.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_each_prompt_may_have_texts_of_its_own_and_of_another_number(language, soft_prompts):
    lists = [ANSWERS[:2], ANSWERS[2:3], ANSWERS, ANSWERS[3:]]
    soft = soft_prompts(language, len(PROMPTS))
    every = language.log_likelihoods(soft, PROMPTS, [ANSWERS] * len(PROMPTS))
    own = language.log_likelihoods(soft, PROMPTS, lists)
    for scores, all_scores, part in zip(
        own, every, (slice(2), slice(2, 3), slice(None), slice(3, None)), strict=True
    ):
        assert torch.allclose(scores, all_scores[part], atol=1e-4)


def test_of_many_texts_those_with_the_likeliest_first_tokens_are_read(language, soft_prompts):
    soft = soft_prompts(language, 2)
    every = language.log_likelihoods(soft, PROMPTS[:2], [ANSWERS] * 2)
    some = language.log_likelihoods(soft, PROMPTS[:2], [ANSWERS] * 2, num_candidates=3)
    for row, (prompt, scores, all_scores) in enumerate(zip(PROMPTS[:2], some, every, strict=True)):
        (ids,) = {tuple(map(tuple, language._answer_ids(ANSWERS, language._gap_after(prompt))))}
        first = [language.token_losses(soft[row : row + 1], [prompt], [[text[0]]])[0].item() for text in ids]
        kept = scores.isfinite()
        assert kept.sum() == 3
        assert max(f for f, k in zip(first, kept, strict=True) if k) <= min(
            f for f, k in zip(first, kept, strict=True) if not k
        )
        assert torch.allclose(scores[kept], all_scores[kept], atol=1e-4)


def test_how_many_texts_are_read_side_by_side_changes_nothing(language, soft_prompts):
    soft = soft_prompts(language, 2)
    ids = [language._answer_ids(ANSWERS, " "), language._answer_ids(ANSWERS[1:], " ")]
    widths = []

    def reader(width, length):
        widths.append(width)
        return language._reader(soft, PROMPTS[:2], width, length)

    with torch.no_grad():
        together, apart = (log_likelihoods(reader, ids, at_once=count) for count in (100, 8))
    assert widths == [6, 4]
    for one, other in zip(together, apart, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_a_prompt_that_fills_all_room_leaves_answers_whole(model_folder, soft_prompts):
    language = OPTLanguageModel(str(model_folder("opt")), max_txt_len=8).eval()
    (scores,) = language.log_likelihoods(soft_prompts(language, 1), ["how many stars " * 8], [ANSWERS])
    assert len(set(scores.tolist())) == len(set(ANSWERS))


def test_answers_in_a_chat_template_are_as_likely_as_each_alone(model_folder, soft_prompts):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    folder = model_folder("qwen2", tokenizer_settings={"chat_template": template})
    language = CausalLanguageModel(str(folder), chat_template=True).eval()
    soft = soft_prompts(language, 1)
    (scores,) = language.log_likelihoods(soft, PROMPTS[:1], [ANSWERS])
    assert scores.tolist() == pytest.approx(one_at_a_time(language, soft, PROMPTS[0], ANSWERS), rel=1e-4)


# ---- each sample's own loss


def test_a_samples_own_loss_and_gradient_are_those_of_it_alone(language, soft_prompts):
    questions, answers = PROMPTS[:3], ANSWERS[:3]
    soft = soft_prompts(language).requires_grad_()
    losses, counts = language.sample_losses(soft, questions, answers)
    losses.sum().backward()
    for row in range(3):
        alone = soft_prompts(language)[row : row + 1].requires_grad_()
        loss, tokens = language.loss(alone, questions[row : row + 1], answers[row : row + 1])
        (loss * tokens).backward()
        assert counts[row] == tokens
        assert losses[row].item() == pytest.approx(loss.item() * tokens, rel=1e-4)
        difference = (soft.grad[row : row + 1] - alone.grad).norm()
        assert difference <= 5e-3 * alone.grad.norm(), "float32, through layers of large random weights"


def test_own_losses_sum_to_the_mean_loss_times_the_tokens(language, soft_prompts):
    soft = soft_prompts(language, 2)
    losses, counts = language.sample_losses(soft, ANSWERS[1:3])
    loss, tokens = language.loss(soft, ANSWERS[1:3])
    assert counts.sum() == tokens
    assert losses.sum().item() == pytest.approx(loss.item() * tokens, rel=1e-5)
