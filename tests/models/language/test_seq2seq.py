"""Encoder-decoders as readers of soft prompts: losses and texts are transformers' own."""

from __future__ import annotations

import pytest
import torch

from evlgen.common.errors import CheckpointError, ConfigError
from evlgen.config.model_config import LanguageConfig, ModelConfig
from evlgen.models.language import OPTLanguageModel, Seq2SeqLanguageModel, build_language_model
from evlgen.models.text_lengths import TextLength, TextLengths

QUESTIONS = ["what color is the circle?", "", "how many stars are there on the hill?"]
ANSWERS = ["red", "two blue stars and a small cat", "no"]
FAMILIES = ("t5", "flan-t5", "bart", "marian")


@pytest.fixture(scope="module", params=FAMILIES)
def model(seq2seq_folder, request):
    return Seq2SeqLanguageModel(str(seq2seq_folder(request.param)), max_txt_len=16).eval()


def encoder_inputs(model, soft, texts):
    """One sample at a time, without padding."""
    for one, text in zip(soft, texts, strict=True):
        ids = torch.tensor([model.tokenizer(text).input_ids[:16]])
        yield torch.cat([one[None], model._embed_words(ids)], dim=1)


@torch.no_grad()
def test_words_reach_the_encoder_as_by_their_ids(model):
    ids = torch.tensor([model.tokenizer(QUESTIONS[2]).input_ids])
    encoder = model.model.get_encoder()
    expected = encoder(input_ids=ids).last_hidden_state
    given = encoder(inputs_embeds=model._embed_words(ids)).last_hidden_state
    assert torch.allclose(given, expected, atol=1e-5)
    weight = model.model.get_input_embeddings().weight
    factor = 32**0.5 if model.model.config.model_type in ("bart", "marian") else 1.0
    assert model.embedding_rms() == pytest.approx(factor * weight.square().mean().sqrt().item(), rel=1e-4)


@torch.no_grad()
def test_the_loss_is_transformers_own_over_the_output(model, soft_prompts):
    soft = soft_prompts(model)
    total, count = 0.0, 0
    for embeds, text in zip(encoder_inputs(model, soft, QUESTIONS), ANSWERS, strict=True):
        labels = model.tokenizer(text, return_tensors="pt").input_ids
        total += model.model(inputs_embeds=embeds, labels=labels).loss.item() * labels.numel()
        count += labels.numel()
    loss, tokens = model.loss(soft, QUESTIONS, ANSWERS)
    assert tokens == count and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


@torch.no_grad()
def test_losses_of_tokens_are_those_of_the_choices_that_wrote_them(model, soft_prompts):
    soft = soft_prompts(model)
    torch.manual_seed(0)
    freely = {"use_nucleus_sampling": True, "top_p": 1.0, "top_k": None, "min_length": 0, "max_length": 4}
    texts = model.generate_tokens(soft, QUESTIONS, **freely)
    losses, counts = model.token_losses(soft, QUESTIONS, texts)
    assert counts.tolist() == [len(text) for text in texts]
    for i, embeds in enumerate(encoder_inputs(model, soft, QUESTIONS)):
        labels = torch.tensor([texts[i]])
        expected = model.model(inputs_embeds=embeds, labels=labels).loss.item() * labels.numel()
        assert losses[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_what_ends_a_text_is_one_of_its_end_tokens(model, soft_prompts):
    end = torch.tensor([model.tokenizer.eos_token_id])
    head = model.model.get_output_embeddings()
    likely = head.register_forward_hook(lambda head, given, logits: logits.index_fill(-1, end, 1e4))
    texts = model.generate_tokens(soft_prompts(model), QUESTIONS, num_beams=1, max_length=3, min_length=0)
    likely.remove()
    assert all(ids[-1] in model.end_token_ids for ids in texts), (texts, model.end_token_ids)


@torch.no_grad()
def test_a_caption_is_what_the_decoder_learns(seq2seq_folder, soft_prompts):
    model = Seq2SeqLanguageModel(str(seq2seq_folder("t5")), prompt="a photo of").eval()
    soft = soft_prompts(model)
    expected = model.loss(soft, ["a photo of"] * 3, ANSWERS)[0]
    assert torch.equal(model.loss(soft, ANSWERS)[0], expected)
    assert torch.equal(model.loss(soft, [f"a photo of {text}" for text in ANSWERS])[0], expected)
    plain = Seq2SeqLanguageModel(str(seq2seq_folder("t5"))).eval()
    assert torch.equal(plain.loss(soft, ANSWERS)[0], plain.loss(soft, [""] * 3, ANSWERS)[0])


def test_gradients_reach_every_soft_prompt(model, soft_prompts):
    soft = soft_prompts(model).requires_grad_()
    model.loss(soft, QUESTIONS, ANSWERS)[0].backward()
    assert (soft.grad.abs().amax(2) > 0).all()


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 4}, {"num_beams": 3, "min_length": 5}])
@torch.no_grad()
def test_texts_are_those_transformers_gives_each_alone(model, soft_prompts, options):
    soft = soft_prompts(model)
    texts = model.generate(soft, QUESTIONS, max_length=8, **options)
    expected = [
        model.model.generate(
            inputs_embeds=embeds,
            max_new_tokens=8,
            min_new_tokens=options.get("min_length", 1),
            num_beams=options["num_beams"],
            do_sample=False,
        )
        for embeds in encoder_inputs(model, soft, QUESTIONS)
    ]
    assert texts == [model.tokenizer.decode(ids[0], skip_special_tokens=True).strip() for ids in expected]


@torch.no_grad()
def test_texts_differ_with_images_and_questions(seq2seq_folder, soft_prompts):
    model = Seq2SeqLanguageModel(str(seq2seq_folder("flan-t5"))).eval()
    soft = soft_prompts(model)
    assert len(set(model.generate(soft, [""] * 3, num_beams=1, max_length=6))) > 1
    assert len(set(model.generate(soft[:1].expand(3, -1, -1), QUESTIONS, num_beams=1, max_length=6))) > 1


@torch.no_grad()
def test_sampling_and_several_captions(model, soft_prompts):
    soft = soft_prompts(model)
    torch.manual_seed(0)
    first = model.generate(soft, QUESTIONS, use_nucleus_sampling=True, num_captions=3, max_length=5)
    torch.manual_seed(0)
    assert first == model.generate(soft, QUESTIONS, use_nucleus_sampling=True, num_captions=3, max_length=5)
    assert len(first) == 9
    assert len(model.generate(soft, QUESTIONS, num_beams=4, num_captions=2, max_length=5)) == 6


@torch.no_grad()
def test_long_texts_are_cut_before_their_end_token(seq2seq_folder):
    model = Seq2SeqLanguageModel(str(seq2seq_folder("t5")), max_txt_len=6, max_output_txt_len=4)
    end = model.tokenizer.eos_token_id
    words = model._token_ids("how many stars are there on the hill?")
    (sample,) = model.to_learn(["how many stars are there on the hill?"], ["two blue stars and a cat"])
    assert sample.read == [*words[-5:], end]
    assert sample.learned == [*model._token_ids("two blue stars and a cat")[:3], end]


@pytest.mark.parametrize(("family", "published"), [("flan-t5", torch.nn.functional.gelu), ("t5", torch.relu)])
def test_flan_t5_computes_the_exact_gelu_as_published(seq2seq_folder, family, published):
    """lavis/models/blip2_models/blip2_t5.py: ``t5_config.dense_act_fn = "gelu"``."""
    model = Seq2SeqLanguageModel(str(seq2seq_folder(family)))
    x = torch.linspace(-4, 4, 101)
    for stack in (model.model.encoder, model.model.decoder):
        for block in stack.block:
            assert torch.equal(block.layer[-1].DenseReluDense.act(x), published(x))


@pytest.mark.parametrize(("family", "is_cut"), [("t5", False), ("bart", True)])
def test_the_words_after_a_question_stay(seq2seq_folder, family, is_cut):
    """Published code does not cut what T5 is asked; BART has a table of positions."""
    question = "Question: what color is the circle that is on the hill? Short answer:"
    model = Seq2SeqLanguageModel(str(seq2seq_folder(family)), max_txt_len=10)
    whole = [*model._token_ids(question), model.tokenizer.eos_token_id]
    tail = [*model._token_ids(" Short answer:"), model.tokenizer.eos_token_id]
    (asked,) = model.to_read([question])
    assert asked.read == (whole[-10:] if is_cut else whole)
    (learned,) = model.to_learn([question], ["red"])
    assert learned.read == whole[-10:] and learned.read[-len(tail) :] == tail


@torch.no_grad()
def test_positions_are_limited_where_the_model_has_a_table(seq2seq_folder, soft_prompts):
    model = Seq2SeqLanguageModel(str(seq2seq_folder("bart")), max_txt_len=100)
    with pytest.raises(ConfigError, match="the language model has 48. Lower model.max_txt_len"):
        model.loss(soft_prompts(model), ["a red circle " * 30] * 3, ANSWERS)
    with pytest.raises(ConfigError, match="the language model has 48. Lower max_length"):
        model.generate(soft_prompts(model), QUESTIONS, max_length=50)


def test_bf16_weights(seq2seq_folder, soft_prompts):
    cfg = ModelConfig("blip2_t5", language=LanguageConfig(str(seq2seq_folder("flan-t5")), precision="bf16"))
    model = build_language_model(cfg, "opt")
    assert type(model) is Seq2SeqLanguageModel and model.dtype == torch.bfloat16
    exact = Seq2SeqLanguageModel(str(seq2seq_folder("flan-t5")))
    soft = soft_prompts(exact)
    loss = model.loss(soft, QUESTIONS, ANSWERS)[0]
    assert loss.item() == pytest.approx(exact.loss(soft, QUESTIONS, ANSWERS)[0].item(), rel=0.05)


def test_what_does_not_fit_is_named(seq2seq_folder):
    folder = str(seq2seq_folder("t5"))
    with pytest.raises(CheckpointError, match="is a t5 model, which model.language.kind 'opt' does not read"):
        OPTLanguageModel(folder)
    with pytest.raises(ConfigError, match="kind 'seq2seq' has no place for one"):
        Seq2SeqLanguageModel(folder, chat_template=True)


def test_input_and_output_are_measured_against_limits_of_their_own(seq2seq_folder):
    def language(**limits):
        return Seq2SeqLanguageModel(str(seq2seq_folder("t5")), device="meta", **limits)

    read, learned = (len(language().tokenizer(text).input_ids) for text in (QUESTIONS[0], ANSWERS[1]))
    limits = {"max_txt_len": read, "max_output_txt_len": learned}
    for key, is_cut in ((None, False), *((key, True) for key in limits)):
        smaller = {**limits, **({key: limits[key] - 1} if key else {})}
        found = TextLengths(language(**smaller)).learned(QUESTIONS[:1], ANSWERS[1:2])
        assert found == [TextLength(read, learned, is_cut)]
    assert TextLengths(language(max_output_txt_len=1)).learned(QUESTIONS[:1], ANSWERS[1:2])[0].is_lost
