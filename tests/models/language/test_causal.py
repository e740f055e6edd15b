"""Causal language models of many families: losses and texts are transformers' own."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from evlgen.common.errors import CheckpointError, ConfigError
from evlgen.common.registry import registry
from evlgen.config.model_config import LanguageConfig, LoraConfig, ModelConfig
from evlgen.models.language import CausalLanguageModel, build_language_model

FAMILIES = (
    "opt",
    "llama",
    "qwen2",
    "qwen3",
    "gpt_neox",
    "gemma",
    "gemma2",
    "gemma3",
    "cohere",
    "granite",
    "bloom",
    "mamba",
)
CHANGES_LOGITS = ("gemma2", "gemma3", "cohere", "granite")  # by a cap, a scale, after the output layer
QUESTIONS = ["what color is the circle?", "", "how many stars are there on the hill?"]
ANSWERS = ["red", "two blue stars and a small cat", "no"]


@pytest.fixture(scope="module")
def language(model_folder):
    """Builds a model of a family once: ``language("gemma2")``."""
    built = {}

    def build(family, **options):
        key = json.dumps([family, options], sort_keys=True)
        if key not in built:
            built[key] = CausalLanguageModel(str(model_folder(family)), **options).eval()
        return built[key]

    return build


def reference_loss(language, soft_prompts, samples):
    """The mean over tokens by transformers' own loss, one sample at a time and without padding."""
    total, count = 0.0, 0
    embed = language.model.get_input_embeddings()
    for soft, (before, read, learned) in zip(soft_prompts, samples, strict=True):
        around = [embed(torch.tensor(ids, dtype=torch.long)) for ids in (before, read + learned)]
        embeds = torch.cat([around[0], soft, around[1]])[None]
        labels = torch.tensor([[-100] * (len(before) + len(soft) + len(read)) + learned])
        total += language.model(inputs_embeds=embeds, labels=labels).loss.item() * len(learned)
        count += len(learned)
    return total / count, count


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_loss_is_transformers_own_over_the_output_alone(language, soft_prompts, family):
    model = language(family)
    soft = soft_prompts(model)
    tokenizer = model.tokenizer

    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    samples = [
        ([tokenizer.bos_token_id], ids(a), [*ids(f" {b}" if a else b), tokenizer.eos_token_id])
        for a, b in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    expected, count = reference_loss(model, soft, samples)
    loss, tokens = model.loss(soft, QUESTIONS, ANSWERS)
    assert tokens == count
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_the_loss_of_captions_is_over_all_but_the_prompt(language, soft_prompts):
    model = language("qwen3", prompt="a photo of")
    soft = soft_prompts(model, 2)
    tokenizer = model.tokenizer
    prompt = tokenizer("a photo of", add_special_tokens=False).input_ids
    samples = [
        ([tokenizer.bos_token_id], prompt, [*tokenizer.encode(text)[1:], tokenizer.eos_token_id])
        for text in (" a red circle", " two cats")
    ]
    expected, count = reference_loss(model, soft, samples)
    for texts in (["a photo of a red circle", "a photo of two cats"], ["a red circle", "two cats"]):
        loss, tokens = model.loss(soft, texts)
        assert tokens == count
        assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_where_a_label_is_are_those_of_the_whole_forward(language, soft_prompts, family):
    """Capped, scaled and shifted logits included."""
    model = language(family).requires_grad_(False)
    embeds = torch.cat([soft_prompts(model), soft_prompts(model).flip(0)], dim=1)
    rows, columns = torch.tensor([0, 0, 2]), torch.tensor([1, 4, 5])
    whole = model.model(inputs_embeds=embeds).logits
    seen = []
    handle = model.model.get_output_embeddings().register_forward_hook(
        lambda *args: seen.append(args[2].shape)
    )
    targets = torch.tensor([7, 3, 5])
    right = F.cross_entropy(whole[rows, columns], targets, reduction="none")
    for _ in range(2):  # the first tells whether anything comes after the output layer
        found = model._predictions_at(rows, columns, targets, inputs_embeds=embeds)
        assert torch.allclose(found.logits(), whole[rows, columns], atol=1e-5)
        assert torch.allclose(found.losses(), right, atol=1e-5)
    handle.remove()
    assert max(shape[:-1].numel() for shape in seen) == 3, "the output layer reads three positions at most"
    assert model._ends_with_head is (family not in CHANGES_LOGITS)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_soft_prompts_start_at_the_size_of_what_the_model_is_given(language, family):
    model = language(family)
    ids = torch.arange(len(model.tokenizer))[None]
    given = model.model.get_input_embeddings()(ids)
    by_ids = model.model(input_ids=ids[:, :20]).logits
    assert torch.allclose(model.model(inputs_embeds=given[:, :20]).logits, by_ids, atol=1e-4)
    weight = model.model.get_input_embeddings().weight
    factor = 32**0.5 if family.startswith("gemma") else 1.0
    assert model.embedding_rms() == pytest.approx(factor * weight.square().mean().sqrt().item(), rel=1e-4)


PROMPTS = ["a photo of", "", "Question: what color is the circle? Short answer:"]


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_texts_of_a_batch_are_those_of_each_alone(language, soft_prompts, family, num_beams):
    model = language(family)
    soft = soft_prompts(model)
    options = {"num_beams": num_beams, "max_length": 8, "min_length": 3}
    together = model.generate(soft, PROMPTS, **options)
    alone = [model.generate(soft[i : i + 1], [p], **options)[0] for i, p in enumerate(PROMPTS)]
    assert together == alone
    assert len(set(together)) > 1


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy_texts_are_the_likeliest_tokens_one_after_the_other(language, soft_prompts, family):
    model = language(family)
    soft = soft_prompts(model)[2:]
    embed = model.model.get_input_embeddings()
    prompt = model.tokenizer(PROMPTS[2], add_special_tokens=False, return_tensors="pt").input_ids
    start = torch.tensor([[model.tokenizer.bos_token_id]])
    embeds, ids = torch.cat([embed(start), soft, embed(prompt)], dim=1), []
    for _ in range(6):
        scores = model.model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
        if not ids:
            scores[model.end_token_ids] = -torch.inf  # min_length is 1
        ids.append(scores.argmax().item())
        if ids[-1] in model.end_token_ids:
            break
        embeds = torch.cat([embeds, embed(torch.tensor([[ids[-1]]]))], dim=1)
    expected = model._text(ids)
    assert model.generate(soft, PROMPTS[2:], num_beams=1, max_length=6) == [expected]


def test_gradients_of_soft_prompts_are_those_of_each_sample_alone(language, soft_prompts):
    model = language("llama")
    soft = soft_prompts(model).requires_grad_()
    model.loss(soft, QUESTIONS, ANSWERS)[0].backward()
    assert (soft.grad.abs().amax(2) > 0).all()
    alone = soft_prompts(model)[:1].requires_grad_()
    loss, count = model.loss(alone, QUESTIONS[:1], ANSWERS[:1])
    (loss * count).backward()
    _, all_tokens = model.loss(soft, QUESTIONS, ANSWERS)
    assert torch.allclose(soft.grad[:1] * all_tokens, alone.grad, atol=1e-5)


def test_a_tokenizer_without_start_and_pad_tokens_serves(model_folder, soft_prompts):
    folder = model_folder("qwen2", bos=None, tokenizer_settings={"pad": None})
    model = CausalLanguageModel(str(folder))
    assert model._start == [] and model.tokenizer.pad_token_id is None
    soft = soft_prompts(model)
    assert model.loss(soft, QUESTIONS, ANSWERS)[0].isfinite()
    together = model.generate(soft, PROMPTS, num_beams=2, max_length=4)
    assert together[0] == model.generate(soft[:1], PROMPTS[:1], num_beams=2, max_length=4)[0]


def test_every_end_token_of_the_generation_config_ends_a_text(
    model_folder, soft_prompts, tmp_path, monkeypatch
):
    plain = CausalLanguageModel(str(model_folder("llama")))
    soft = soft_prompts(plain, 1)
    monkeypatch.setattr(plain, "_text", lambda ids: ids)
    (ids,) = plain.generate(soft, [""], num_beams=1, max_length=8)
    folder = shutil.copytree(model_folder("llama"), tmp_path / "ends")
    ends = [plain.tokenizer.eos_token_id, ids[4]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    model = CausalLanguageModel(str(folder))
    assert model.end_token_ids == ends
    (text,) = model.generate(soft, [""], num_beams=1, max_length=8)
    first = ids.index(ids[4])
    assert text == plain.tokenizer.decode(ids[:first]).strip() and 0 < first < 7


def test_long_texts_lose_words_and_never_their_end(model_folder):
    model = CausalLanguageModel(str(model_folder("llama")), max_txt_len=4, max_output_txt_len=3)
    (sample,) = model._to_learn(["what color is the circle on the hill?"], ["two blue stars and a cat"])
    read = model._token_ids("what color is the circle on the hill?")
    assert sample.read == read[-4:]
    assert sample.learned == [
        *model._token_ids(" two blue stars and a cat")[:2],
        model.tokenizer.eos_token_id,
    ]


def test_positions_are_limited_where_the_model_limits_them(language, soft_prompts):
    model = language("llama")
    with pytest.raises(ConfigError, match="positions, and the language model has 64. Lower max_length"):
        model.generate(soft_prompts(model), PROMPTS, max_length=80)
    with pytest.raises(ConfigError, match="the language model has 64. Lower model.max_txt_len"):
        language("llama", max_txt_len=200).loss(soft_prompts(model, 1), ["a red circle " * 40])
    unlimited = language("bloom")
    assert len(unlimited.generate(soft_prompts(unlimited), PROMPTS, num_beams=1, max_length=80)) == 3


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_frozen_weights_in_the_configs_precision(model_folder, soft_prompts, precision):
    cfg = ModelConfig("evlgen_opt", language=LanguageConfig(str(model_folder("gemma2")), precision=precision))
    model = build_language_model(cfg, "opt")
    assert model.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    assert model.loss(soft_prompts(model), QUESTIONS, ANSWERS)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "preferred", "kind"),
    [
        ("opt", "opt", "opt"),
        ("opt", "vicuna", "opt"),
        ("llama", "vicuna", "vicuna"),
        ("llama", "opt", "causal"),
        ("qwen3", "seq2seq", "causal"),
        ("opt", "causal", "causal"),
    ],
)
def test_the_kind_is_the_architectures_where_it_reads_the_model(model_folder, family, preferred, kind):
    cfg = ModelConfig("evlgen_opt", language=LanguageConfig(str(model_folder(family)), precision="fp32"))
    assert type(build_language_model(cfg, preferred)).KIND == kind


@pytest.mark.parametrize(("kind", "family"), [("opt", "qwen2"), ("vicuna", "opt"), ("seq2seq", "llama")])
def test_a_kind_that_does_not_read_the_model_is_named(model_folder, kind, family):
    cfg = ModelConfig("evlgen_opt", language=LanguageConfig(str(model_folder(family)), kind=kind))
    with pytest.raises(CheckpointError, match=f"is a {family} model, which model.language.kind '{kind}'"):
        build_language_model(cfg, "opt")


@pytest.mark.parametrize("config", [{}, {"model_type": "bert"}, {"model_type": "t5"}, {"model_type": ["x"]}])
def test_what_is_no_decoder_is_not_read_as_one(config):
    assert not CausalLanguageModel.reads(config)
    assert registry.get_language_model_class("seq2seq").reads(config) is (config.get("model_type") == "t5")


@pytest.mark.parametrize(
    ("settings", "key"), [({"lora": LoraConfig()}, "lora"), ({"quantization": "8bit"}, "quantization")]
)
def test_adapters_and_quantisation_are_for_frozen_models(model_folder, settings, key):
    cfg = ModelConfig(
        "evlgen_opt", language=LanguageConfig(str(model_folder("llama")), freeze=False, **settings)
    )
    with pytest.raises(ConfigError, match=f"model.language.{key} is for a frozen language model"):
        build_language_model(cfg, "opt")


def test_a_model_without_an_end_token_is_named(model_folder):
    folder = model_folder("qwen2", tokenizer_settings={"eos": None}, eos_token_id=None)
    with pytest.raises(ConfigError, match="has no end token, .* Set `eos_token` in its"):
        CausalLanguageModel(str(folder))
