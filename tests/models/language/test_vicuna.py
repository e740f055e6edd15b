"""Vicuna's text conventions are those of its published use behind soft prompts."""

from __future__ import annotations

import pytest
import torch

from evlgen.common.errors import ConfigError
from evlgen.models.language import VicunaLanguageModel
from evlgen.models.text_lengths import TextLengths

QUESTIONS = ["what color is the circle?", "", "how many stars are there on the hill? two or three?"]
ANSWERS = ["red", "two blue stars", "no"]
LAYOUTS = ("tokenizer.model", "tokenizer.json")
END = 2  # </s>


@pytest.fixture(scope="module", params=LAYOUTS)
def model(llama_folder, request):
    return VicunaLanguageModel(str(llama_folder(request.param)), max_txt_len=12).eval()


@pytest.fixture(scope="module")
def pieces(llama_folder, tmp_path_factory):
    """Token ids of a text by the sentencepiece library itself."""
    import sentencepiece

    path = llama_folder("tokenizer.model") / "tokenizer.model"
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).encode


def published_rows(pieces, text_in, text_out, max_in, max_out):
    """Ids and labels of the published procedure, step by step: both texts are tokenised with a start token
    and truncated, the input at its left; then the output without its start token goes between the input
    and the input's padding."""
    inputs = [[END, *pieces(text)[-(max_in - 1) :]] for text in text_in]
    outputs = [[END, *pieces(text), END][:max_out] for text in text_out]
    longest_in, longest_out = max(map(len, inputs)), max(map(len, outputs))
    rows, labels = [], []
    for a, b in zip(inputs, outputs, strict=True):
        padding = [None] * (longest_out - len(b)) + [None] * (longest_in - len(a))
        row = a + b[1:] + padding
        rows.append(row)
        labels.append([-100] * len(a) + [-100 if token is None else token for token in row[len(a) :]])
    return rows, labels


def transformers_loss(model, soft, rows, labels):
    """By the model's own labels, with padding tokens and a mask."""
    pad = model.tokenizer.pad_token_id
    ids = torch.tensor([[pad if token is None else token for token in row] for row in rows])
    mask = torch.tensor([[token is not None for token in row] for row in rows]).long()
    embeds = torch.cat([soft, model.model.get_input_embeddings()(ids)], dim=1)
    mask = torch.cat([mask.new_ones(soft.shape[:2]), mask], dim=1)
    labels = torch.cat([torch.full(soft.shape[:2], -100), torch.tensor(labels)], dim=1)
    return model.model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss.item()


@pytest.mark.parametrize("lengths", [(12, None), (5, 4), (32, 32)])
@torch.no_grad()
def test_the_loss_is_the_published_one(llama_folder, pieces, soft_prompts, lengths):
    max_in, max_out = lengths
    rows, labels = published_rows(pieces, QUESTIONS, ANSWERS, max_in, max_out or max_in)
    for layout in LAYOUTS:
        path = str(llama_folder(layout))
        model = VicunaLanguageModel(path, max_txt_len=max_in, max_output_txt_len=max_out).eval()
        soft = soft_prompts(model)
        loss, count = model.loss(soft, QUESTIONS, ANSWERS)
        assert count == sum(label != -100 for row in labels for label in row)
        assert loss.item() == pytest.approx(transformers_loss(model, soft, rows, labels), rel=1e-5)


@torch.no_grad()
def test_a_caption_is_the_output_of_an_empty_input(model, pieces, soft_prompts):
    soft = soft_prompts(model)
    rows, labels = published_rows(pieces, [""] * 3, ANSWERS, 12, 12)
    loss, _ = model.loss(soft, ANSWERS)
    assert loss.item() == pytest.approx(transformers_loss(model, soft, rows, labels), rel=1e-5)


@torch.no_grad()
def test_a_caption_behind_a_prompt_is_the_output_of_the_prompt(llama_folder, pieces, soft_prompts):
    model = VicunaLanguageModel(str(llama_folder("tokenizer.model")), prompt="a photo of").eval()
    soft = soft_prompts(model)
    rows, labels = published_rows(pieces, ["a photo of"] * 3, ANSWERS, 32, 32)
    expected = pytest.approx(transformers_loss(model, soft, rows, labels), rel=1e-5)
    assert model.loss(soft, ANSWERS)[0].item() == expected
    assert model.loss(soft, [f"a photo of {text}" for text in ANSWERS])[0].item() == expected


def test_the_pad_token_is_added_with_the_mean_of_all_embeddings(model):
    assert model.tokenizer.pad_token == "[PAD]" and model.tokenizer.pad_token_id == 340
    tokenizer = model.tokenizer
    assert {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token} == {"</s>"}
    for layer in (model.model.get_input_embeddings(), model.model.get_output_embeddings()):
        assert layer.weight.shape[0] == 341
        assert torch.allclose(layer.weight[340], layer.weight[:340].mean(0), atol=1e-6)


@pytest.mark.parametrize("num_beams", [1, 5])
@torch.no_grad()
def test_texts_of_a_batch_are_those_of_each_alone(model, soft_prompts, num_beams):
    soft = soft_prompts(model)
    options = {"num_beams": num_beams, "max_length": 8}
    together = model.generate(soft, QUESTIONS, **options)
    alone = [model.generate(soft[i : i + 1], [q], **options)[0] for i, q in enumerate(QUESTIONS)]
    assert together == alone and len(set(together)) > 1


@torch.no_grad()
def test_generation_begins_with_the_start_token_and_the_whole_prompt(
    model, pieces, soft_prompts, monkeypatch
):
    soft = soft_prompts(model)[2:]
    ids = torch.tensor([[END, *pieces(QUESTIONS[2])]])
    embeds = torch.cat([soft, model.model.get_input_embeddings()(ids)], dim=1)
    expected = model.model.generate(
        inputs_embeds=embeds, max_new_tokens=6, min_new_tokens=1, do_sample=False, eos_token_id=END
    )
    monkeypatch.setattr(model, "_text", lambda ids: ids)
    assert model.generate(soft, QUESTIONS[2:], num_beams=1, max_length=6) == expected.tolist()


def test_a_llama_without_its_end_token_is_told_of_the_other_kind(model_folder):
    folder = model_folder("llama", bos=None, tokenizer_settings={"eos": "<end>"})
    with pytest.raises(ConfigError, match="has no token </s>, .* Set model.language.kind: causal"):
        VicunaLanguageModel(str(folder))


def test_without_weights_texts_become_the_same_tokens(llama_folder):
    folder = str(llama_folder("tokenizer.json"))
    whole, bare = (VicunaLanguageModel(folder, max_txt_len=9, device=device) for device in ("cpu", "meta"))
    question, answer = "what color is the circle?", "two blue stars and a green square"
    assert bare.to_learn([question], [answer]) == whole.to_learn([question], [answer])
    (found,) = TextLengths(bare).learned([question], [answer])
    assert found.is_cut and not found.is_lost
    assert found.learned == len(bare.tokenizer(answer, add_special_tokens=False).input_ids) + 1
