"""Samples in a chat template are what transformers renders, with the soft prompts in the image's place."""

from __future__ import annotations

import pytest
import torch

from evlgen.common.errors import ConfigError
from evlgen.models.language import CausalLanguageModel, OPTLanguageModel
from evlgen.models.language.chat import IMAGE, ChatTemplate

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = "<|im_start|>system\nYou see an image.<|im_end|>\n" + CHATML
# as LLaMA 2's: no header before an answer, a start token for each pair of turns
BRACKETS = (
    "{% for message in messages %}{% if message.role == 'user' %}"
    "<s>[INST] {{ message.content | trim }} [/INST]"
    "{% else %} {{ message.content | trim }} </s>{% endif %}{% endfor %}"
)
# as Qwen 3's: the answer has a part before it that the start of the turn has not
THINKING = CHATML.replace(
    "{{ message.content }}",
    "{% if message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}",
)
QUESTIONS = ["what color is the circle?", "", "how many stars are there on the hill?"]
ANSWERS = ["red", "two blue stars and a small cat", "no"]


@pytest.fixture
def build(model_folder):
    def make(template, family="qwen2", **options):
        settings = {"chat_template": template} if template else {}
        folder = model_folder(family, tokenizer_settings=settings)
        kind = OPTLanguageModel if family == "opt" else CausalLanguageModel
        return kind(str(folder), chat_template=True, **options).eval()

    return make


def rendered(model, question, answer=None):
    """transformers' tokens of the conversation before and after the image, which is one token here."""
    tokenizer = model.tokenizer
    tokenizer.add_tokens(IMAGE, special_tokens=True)
    messages = [{"role": "user", "content": IMAGE + question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=answer is None, tokenize=True, return_dict=False
    )
    place = ids.index(tokenizer.convert_tokens_to_ids(IMAGE))
    return ids[:place], ids[place + 1 :]


@pytest.mark.parametrize("template", [CHATML, SYSTEM, BRACKETS, THINKING])
def test_a_prompt_is_the_rendered_template(build, template):
    model = build(template)
    for question in QUESTIONS:
        assert model._question(question) == rendered(build(template), question)


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (SYSTEM, "<|im_end|>"), (BRACKETS, "</s>"), (THINKING, "<|im_end|>")],
)
def test_a_question_and_its_answer_are_the_rendered_conversation(build, template, end):
    model = build(template)
    end = model.tokenizer.convert_tokens_to_ids(end)
    assert model.end_token_ids[0] == end
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        before, after = rendered(build(template), question, answer)
        sample = model._turns(question, answer)
        last = len(after) - after[::-1].index(end)  # a template's newline behind its last end says nothing
        assert sample.before == before
        assert sample.read + sample.learned == after[:last]
        assert (sample.before, sample.read) == model._question(question), "generation begins as training does"


@pytest.mark.parametrize("family", ["qwen2", "opt"])
@torch.no_grad()
def test_the_loss_is_transformers_own_over_the_answer(build, soft_prompts, family):
    model = build(SYSTEM, family)
    soft = soft_prompts(model)
    total, count = 0.0, 0
    embed = model.model.get_input_embeddings()
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for one, question, answer in zip(soft, QUESTIONS, ANSWERS, strict=True):
        before, after = rendered(build(SYSTEM, family), question, answer)
        after = after[: len(after) - after[::-1].index(end)]
        learned = len(after) - len(rendered(build(SYSTEM, family), question)[1])
        embeds = torch.cat([embed(torch.tensor(before)), one, embed(torch.tensor(after))])[None]
        labels = torch.tensor([[-100] * (embeds.shape[1] - learned) + after[-learned:]])
        total += model.model(inputs_embeds=embeds, labels=labels).loss.item() * learned
        count += learned
    loss, tokens = model.loss(soft, QUESTIONS, ANSWERS)
    assert tokens == count
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


@torch.no_grad()
def test_a_caption_answers_the_prompt(build, soft_prompts):
    model = build(CHATML, prompt="a photo of")
    soft = soft_prompts(model)
    expected = model.loss(soft, ["a photo of"] * 3, ANSWERS)[0]
    assert torch.equal(model.loss(soft, ANSWERS)[0], expected)
    assert torch.equal(model.loss(soft, [f"a photo of {text}" for text in ANSWERS])[0], expected)


@pytest.mark.parametrize("num_beams", [1, 4])
@torch.no_grad()
def test_texts_of_a_batch_are_those_of_each_alone(build, soft_prompts, num_beams):
    model = build(SYSTEM)
    soft = soft_prompts(model)
    options = {"num_beams": num_beams, "max_length": 8, "min_length": 3}
    together = model.generate(soft, QUESTIONS, **options)
    alone = [model.generate(soft[i : i + 1], [q], **options)[0] for i, q in enumerate(QUESTIONS)]
    assert together == alone and len(set(together)) > 1


@torch.no_grad()
def test_generation_reads_the_rendered_template_and_ends_with_the_turn(build, soft_prompts):
    model = build(CHATML)
    soft = soft_prompts(model)[:1]
    before, after = rendered(build(CHATML), QUESTIONS[0])
    embed = model.model.get_input_embeddings()
    embeds = torch.cat([embed(torch.tensor(before)), soft[0], embed(torch.tensor(after))])[None]
    ids = model.model.generate(
        inputs_embeds=embeds,
        max_new_tokens=8,
        min_new_tokens=1,
        do_sample=False,
        eos_token_id=model.end_token_ids,
        pad_token_id=0,
    )
    assert model.generate(soft, QUESTIONS[:1], num_beams=1, max_length=8) == [model._text(ids[0].tolist())]
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    words = model._token_ids("a red circle")
    assert model._text([*words, end, *words]) == "a red circle"


def test_a_long_answer_loses_words_and_not_its_end(build):
    model = build(CHATML, max_txt_len=5, max_output_txt_len=3)
    sample = model._turns("how many stars are there on the hill?", "two blue stars and a small cat")
    words = model._token_ids("two blue stars and a small cat")
    assert sample.learned == [*words[:2], model.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    question = model._token_ids("how many stars are there on the hill?")
    kept = model.tokenizer.decode(question[-5:]).strip()
    assert sample.read == model._chat.question(kept)[1]


def test_a_tokenizer_without_a_template_is_named(build):
    with pytest.raises(ConfigError, match="model.language.chat_template: the tokenizer of .* has no chat"):
        build(None)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('only tools') }}", "only tools"),
        ("{% for message in messages %}{{ message.role }}{% endfor %}", "leaves out what the user says"),
        ("{% for message in messages %}", "cannot take an image and a question"),
    ],
)
def test_a_template_that_takes_no_such_message_is_named(build, template, why):
    with pytest.raises(ConfigError, match=why):
        build(template)


def test_a_template_without_an_end_gets_the_tokenizers(tokenizer_of):
    template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = tokenizer_of("<s>", chat_template=template)
    chat = ChatTemplate(tokenizer, "x", [tokenizer.eos_token_id])
    ids = chat.answer("red", 9)
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids[:-1]).strip() == "red"
