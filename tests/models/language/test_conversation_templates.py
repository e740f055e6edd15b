"""What is learned of a conversation, in templates of real models: compared with finding it token by token."""
# ruff: noqa: E501 - the templates are as they are published

from __future__ import annotations

import pytest

from evlgen.common.errors import ConfigError, DataError
from evlgen.models.language.chat import _REMEMBERED, ChatTemplate, read_template
from evlgen.processors.turns import read_turns

ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}" + ALTERNATE + "{% if "
    "loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\n' + system_message + "
    "'\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}" + ALTERNATE + "{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role "
    "+ '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{'<start_of_turn>model\n'}}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token "
    "}}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
PHI_3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}"
    "{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + "
    "message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + "
    "message['content'] + eos_token }}{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GLM_4 = (
    "[gMASK]<sop>{% for item in messages %}<|{{ item['role'] }}|>\n{{ item['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SMOLLM_2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    + CHATML.removeprefix("{% for message in messages %}")
)
MARKED = CHATML.replace(
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}",
)
#: name -> template, what stands before an answer at generation, what ends its turn
TEMPLATES = {
    "OpenHermes-2.5 (ChatML)": (CHATML, "<|im_start|>assistant\n", "<|im_end|>"),
    "SmolLM2-Instruct": (SMOLLM_2, "<|im_start|>assistant\n", "<|im_end|>"),
    "Llama-2-chat": (LLAMA_2, " [/INST]", " </s>"),
    "Llama-3-Instruct": (LLAMA_3, "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "Mistral-7B-Instruct-v0.2": (MISTRAL, " [/INST]", "</s>"),
    "gemma-it": (GEMMA, "<start_of_turn>model\n", "<end_of_turn>"),
    "zephyr-7b": (ZEPHYR, "<|assistant|>\n", "</s>"),
    "Phi-3-mini": (PHI_3, "<|assistant|>\n", "<|end|>"),
    "deepseek-llm-7b-chat": (DEEPSEEK, "Assistant:", "</s>"),
    "vicuna_v1": (read_template("vicuna_v1"), " ASSISTANT:", "</s>"),
    "marked (generation)": (MARKED, "<|im_start|>assistant\n", "<|im_end|>"),
}
SPECIAL = [
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "[gMASK]", "<sop>", "<image>"),
]
TALK = [
    ("user", "what color is the circle?"),
    ("assistant", "it is red"),
    ("user", "how many stars are there?"),
    ("assistant", "two"),
]


@pytest.fixture(scope="module")
def template_of(tokenizer_of):
    tokenizer = tokenizer_of("<s>", extra_special_tokens=SPECIAL)

    def make(template):
        return ChatTemplate(tokenizer, "model", [tokenizer.eos_token_id], template)

    return make


def messages_of(talk):
    return [{"role": role, "content": text} for role, text in talk]


def learned_slowly(tokenizer, whole, header, end):
    """Tokens of a rendered conversation, and of each whether it is in an answer: its characters are those
    that decoding one more token adds."""
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    inside = set()
    for answer in ("it is red", "two"):
        start = whole.index(header, whole.index({"two": "stars are"}.get(answer, "the circle"))) + len(header)
        stop = whole.index(end, whole.index(answer, start)) + len(end)
        inside |= set(range(start, stop))
    labels, length = [], 0
    for count in range(1, len(ids) + 1):
        longer = len(tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False))
        labels.append(set(range(length, longer)) <= inside)
        length = longer
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == whole
    return list(zip(ids, labels, strict=True))


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_learned_is_what_a_slow_way_finds(template_of, name):
    template, header, end = TEMPLATES[name]
    chat = template_of(template)
    whole = chat.tokenizer.apply_chat_template(messages_of(TALK), chat_template=template, tokenize=False)
    row = chat.conversation(read_turns(messages_of(TALK)))
    found = [(token, segment.learned) for segment in row for token in segment.ids]
    slow = learned_slowly(chat.tokenizer, whole, header, end)
    assert [token for token, learned in found if learned] == [token for token, learned in slow if learned]
    assert chat.tokenizer.decode([t for t, _ in found]) == whole


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_goes_on_where_training_begins_to_learn(template_of, name):
    chat = template_of(TEMPLATES[name][0])
    row = chat.conversation(read_turns(messages_of(TALK)))
    before = [
        token for segment in row[: max(i for i, s in enumerate(row) if s.learned)] for token in segment.ids
    ]
    asked = chat.conversation(read_turns(messages_of(TALK[:-1])), answers_next=True)
    assert [token for segment in asked for token in segment.ids] == before


def test_a_turn_without_an_end_token_gets_one_and_the_next_role_may_be_it(template_of, tokenizer_of):
    chat = template_of(read_template("question_answer"))
    end = chat.tokenizer.eos_token_id
    learned = [s.ids for s in chat.conversation(read_turns(messages_of(TALK))) if s.learned]
    assert [ids for ids in learned if ids == [end]] == [[end], [end]]
    user = chat.tokenizer.convert_tokens_to_ids("<|user|>")
    glm = ChatTemplate(chat.tokenizer, "model", [end, user], GLM_4)
    learned = [token for s in glm.conversation(read_turns(messages_of(TALK))) if s.learned for token in s.ids]
    assert learned.count(user) == 1 and learned.count(end) == 1


def test_images_stand_at_their_places_and_words_of_people_are_words(template_of):
    chat = template_of(CHATML)
    content = [
        {"type": "image"},
        {"type": "text", "text": "is <image> or <|im_"},
        {"type": "text", "text": "end|> a \ufffc?"},
        {"type": "image"},
    ]
    row = chat.conversation(read_turns([{"role": "user", "content": content}, *messages_of(TALK[1:2])]))
    kinds = ["image" if s.is_visual else chat.tokenizer.decode(s.ids) for s in row]
    assert kinds[:4] == ["<|im_start|>user\n", "image", "is <image> or <|im_end|> a \ufffc?", "image"]
    controls = set(chat.tokenizer.added_tokens_decoder)
    assert controls.isdisjoint(row[2].ids)
    assert sum(token in controls for s in row for token in s.ids) == 4


def test_turns_that_a_template_does_not_take_are_named(template_of):
    system = [{"role": "system", "content": "be short"}, *messages_of(TALK)]
    with pytest.raises(DataError, match="System role not supported"):
        template_of(GEMMA).conversation(read_turns(system))
    with pytest.raises(DataError, match="roles must alternate"):
        template_of(MISTRAL).conversation(
            read_turns([*messages_of(TALK), *messages_of(TALK)[-1:], *system[:1]])
        )
    seen = [{"role": "system", "content": [{"type": "image"}, {"type": "text", "text": "look"}]}]
    no_system = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    with pytest.raises(
        DataError, match=r"leaves out an image in turn 1 \(system\): move it to a user's turn"
    ):
        template_of(no_system).conversation(read_turns([*seen, *messages_of(TALK)]))
    deaf = "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}"
    with pytest.raises(DataError, match="it has no place for what the assistant says"):
        template_of(deaf).conversation(read_turns(messages_of(TALK)))


def test_a_template_that_is_nowhere(template_of):
    with pytest.raises(ConfigError, match=r"'vicuna' is neither a file .*Did you mean 'vicuna_v1'\?"):
        read_template("vicuna")


def test_a_conversation_that_comes_again_is_not_put_into_the_template_again(template_of, monkeypatch):
    """A batch is looked at for what can be learned, and then learned."""
    chat = template_of(CHATML)
    turns = read_turns(messages_of(TALK))
    rows = [chat.conversation(turns), chat.conversation(turns[:3], answers_next=True)]
    monkeypatch.setattr(chat, "_rendered", None)
    monkeypatch.setattr(chat, "tokenizer", None)
    again = read_turns(messages_of(TALK))
    assert [chat.conversation(again), chat.conversation(again[:3], answers_next=True)] == rows
    with pytest.raises(TypeError):
        chat.conversation(again[:2])


def test_conversations_that_came_long_ago_are_forgotten(template_of):
    chat = template_of(CHATML)
    for number in range(2 * _REMEMBERED):
        chat.conversation(read_turns([{"role": "user", "content": str(number)}]))
    assert len(chat._recent) == _REMEMBERED
