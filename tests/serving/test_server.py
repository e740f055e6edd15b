"""The server as its clients see it."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from serving_requests import answer_of, data_url, encoded, image, question
from tokenizers import AddedToken
from transformers import PreTrainedModel

from evlgen.common.errors import ConfigError
from evlgen.config.model_config import GenerationConfig
from evlgen.demo.exhibit import Exhibit
from evlgen.models.language.chat import read_template
from evlgen.models.zoo import load_model
from evlgen.processors.turns import read_turns
from evlgen.serving.answering import Answer, Answerer, Ask, Stopped, Text
from evlgen.serving.limits import Limits
from evlgen.serving.listening import bind
from evlgen.serving.protocol import Chunks


def _client(running, key="anything", **options):
    return openai.OpenAI(base_url=f"{running.address}/v1", api_key=key, max_retries=0, **options)


def _ask(client, number, text=None, **settings):
    body = question(data_url(encoded(image(number))), text)
    return client.chat.completions.create(**body, **settings)


def test_openais_client_gets_what_the_model_writes(running, model):
    client = _client(running)
    assert [found.id for found in client.models.list()] == ["shapes"]
    assert client.models.retrieve("shapes").owned_by == "evlgen"
    (caption,) = model.generate(image(1), num_beams=1)
    answer = _ask(client, 1)
    assert answer.choices[0].message.content == caption
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(model.generate_tokens(_pixels(model, 1), num_beams=1)[0])
    (number,) = model.predict_answers(
        {"image": image(1), "text_input": "how many shapes are there?"},
        num_beams=1,
        prompt="Question: {} Short answer:",
    )
    assert _ask(client, 1, "how many shapes are there?").choices[0].message.content == number == "two"


def _pixels(model, number):
    from evlgen.models.pixels import pixels_of

    return {"image": pixels_of(model, image(number))}


def test_settings_of_decoding_are_heeded(running, model):
    client = _client(running)
    caption = _ask(client, 1).choices[0].message.content
    short = _ask(client, 1, max_tokens=3).choices[0]
    assert (short.message.content, short.finish_reason) == (" ".join(caption.split()[:3]), "length")
    ended = _ask(client, 1, stop=["nowhere", " square"]).choices[0]
    assert (ended.message.content, ended.finish_reason) == (caption.partition(" square")[0], "stop")
    one, two = (_ask(client, 1, n=3, temperature=1.5, seed=7).choices for _ in range(2))
    assert [c.message.content for c in one] == [c.message.content for c in two]
    assert len({c.message.content for c in one}) > 1 and [c.index for c in one] == [0, 1, 2]
    beams = model.generate(image(1), num_beams=3, num_captions=3)
    several = _ask(client, 1, n=3, temperature=0).choices
    assert [c.message.content for c in several] == beams


def test_a_stream_carries_the_same_text_and_its_usage(running):
    client = _client(running)
    whole = _ask(client, 2, n=2)
    options = {"include_usage": True}
    pieces = list(_ask(client, 2, n=2, stream=True, stream_options=options))
    texts = {0: "", 1: ""}
    for piece in pieces:
        for choice in piece.choices:
            texts[choice.index] += choice.delta.content or ""
    assert list(texts.values()) == [choice.message.content for choice in whole.choices]
    assert pieces[-1].usage == whole.usage and pieces[-1].choices == []
    assert len({piece.id for piece in pieces}) == 1


class _Held:
    """Holds a language model before its third token until it is let go."""

    def __init__(self, language) -> None:
        self.inner = next(m for m in language.modules() if isinstance(m, PreTrainedModel))
        self.tokens, self.let_go = 0, threading.Event()

    def _hold(self, *_) -> None:
        self.tokens += 1
        if self.tokens == 3:
            self.let_go.wait(30)

    def __enter__(self) -> _Held:
        self.handle = self.inner.register_forward_pre_hook(self._hold)
        return self

    def __exit__(self, *_) -> None:
        self.let_go.set()
        self.handle.remove()


def _counts(running) -> dict[str, int]:
    """Requests by status."""
    page = urllib.request.urlopen(f"{running.address}/metrics").read().decode()
    found = re.findall(r'^evlgen_requests_total\{status="(\d+)"\} (\S+)', page, re.M)
    return {status: int(float(count)) for status, count in found}


def _content(piece) -> str:
    return "".join(choice.delta.content or "" for choice in piece.choices)


def test_words_are_sent_as_they_are_written(running, model):
    client = _client(running)
    whole = _ask(client, 3).choices[0].message.content
    with _Held(model.language) as held:
        pieces = _ask(client, 3, stream=True)
        words = next(filter(None, map(_content, pieces)))
        assert whole.startswith(words) and len(words) < len(whole) and not held.let_go.is_set()
        held.let_go.set()
        rest = list(filter(None, map(_content, pieces)))
    assert words + "".join(rest) == whole and len(rest) > 2
    searched = {"stream": True, "extra_body": {"num_beams": 3}}
    assert len(list(filter(None, map(_content, _ask(client, 3, **searched))))) == 1


def test_a_streamed_text_ends_before_what_stops_it(running):
    client = _client(running)
    settings = {"stop": [" square", "a  b"], "max_tokens": 12}
    whole = _ask(client, 1, **settings).choices[0]
    pieces = list(_ask(client, 1, stream=True, **settings))
    assert "".join(map(_content, pieces)) == whole.message.content
    assert pieces[-1].choices[0].finish_reason == whole.finish_reason == "stop"


def test_what_may_become_a_stop_or_another_character_waits():
    chunks = Chunks("name", "model", 1, ["</s>"], with_usage=False)
    written = ["a", "a <", "a </", "a < b", "a < b \ufffd", "a < b é</s", "a < b é</s> c"]
    texts = [[piece["choices"][0]["delta"]["content"] for piece in chunks.more([text])] for text in written]
    assert texts == [["a"], [" "], [], ["< b"], [" "], ["é"], []]
    assert [p["choices"][0]["finish_reason"] for p in chunks.end(1, [Text(written[-1], 9, False)])] == [
        "stop"
    ]


def test_half_a_character_and_an_earlier_stop_wait():
    for stops, written, content in (
        ([], ["a", "a \ufffd\ufffd\ufffd", "a \U0001f600"], ["a", " ", "\U0001f600"]),
        (["abc", "b"], ["ab", "abc"], []),
        (["abc", "b"], ["ab", "abd"], ["a"]),
    ):
        chunks = Chunks("name", "model", 1, stops, with_usage=False)
        pieces = [piece for text in written for piece in chunks.more([text])]
        assert [piece["choices"][0]["delta"]["content"] for piece in pieces] == content
        assert chunks.continue_to([Text(written[-1], 9, False)])


class _Counted(str):
    """Counts how often a part of it is taken."""

    parts = 0

    def __getitem__(self, key):
        type(self).parts += 1
        return super().__getitem__(key)


def test_a_long_stop_is_compared_with_the_end_of_the_text_alone():
    chunks = Chunks("name", "model", 1, [_Counted("b" * 10_000)], with_usage=False)
    assert [piece["choices"][0]["delta"]["content"] for piece in chunks.more(["a bb"])] == ["a "]
    assert _Counted.parts <= len("a bb")


class FailingAnswerer(Answerer):
    """Writes two words, and then fails or, where ``says`` is a text, answers anew with that."""

    says: str | None = None

    def answer(self, requests: list[Ask], is_wanted=lambda: True) -> list[Answer]:
        requests[0].on_texts(["two words"])
        if self.says is None:
            raise RuntimeError("out of memory")
        return [Answer([Text(self.says, 3, False)], 1)]


def test_what_fails_behind_the_first_words_is_the_last_event(start, model):
    answerer = FailingAnswerer(model)
    with start(answerer=answerer) as running:
        for says, message in ((None, "the server failed"), ("three other words", "begun anew")):
            answerer.says = says
            pieces = _ask(_client(running), 1, stream=True)
            with pytest.raises(openai.APIError, match=message):
                for piece in pieces:
                    assert piece.choices[0].finish_reason is None
        answerer.says = "two words more"
        assert "".join(map(_content, _ask(_client(running), 1, stream=True))) == answerer.says
        _until(lambda: running.service._admitted == 0)
        assert _counts(running) == {"500": 2, "200": 1}, "a stream counts by how it ends"


def test_a_client_that_leaves_in_the_middle_of_a_stream_ends_its_text(running, model, caplog):
    before = _counts(running)
    with _Held(model.language) as held:
        pieces = _ask(_client(running), 4, stream=True, max_tokens=30)
        assert next(filter(None, map(_content, pieces)))
        pieces.close()
        _until(lambda: running.service._admitted == 0)
        held.let_go.set()
        _until(lambda: running.service.batcher.num_waiting == 0)
    assert _counts(running) == {**before, "499": before.get("499", 0) + 1}
    assert _ask(_client(running), 4).choices[0].message.content
    assert held.tokens <= 4
    gc.collect()
    assert "never retrieved" not in caplog.text


class LongAnswerer(Answerer):
    """Writes more than waits anywhere for a client that does not read."""

    def answer(self, requests: list[Ask], is_wanted=lambda: True) -> list[Answer]:
        texts = ["word " * (1 << 20) * count for count in range(1, 5)]
        for text in texts:
            requests[0].on_texts([text])
        return [Answer([Text(texts[-1], 9, False)], 1)]


def test_a_client_that_does_not_read_its_answer_is_cut_off(start, model):
    body = json.dumps(question(data_url(encoded(image())), stream=True)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"
    head += f"Content-Length: {len(body)}\nConnection: close\n"
    with start(Limits(send_seconds=1), LongAnswerer(model)) as running:
        with running.send(head, body):
            _until(lambda: running.server.server_state.connections)
            _until(lambda: not running.server.server_state.connections)
        with running.send(head, body) as reading:
            received = bytearray()
            while part := reading.recv(1 << 20):
                received += part
        assert received.count(b"word ") == 4 << 20 and b"[DONE]" in received


def test_many_clients_at_once_each_get_their_own_answer_in_batches(start, model):
    captions = model.generate([image(number) for number in range(24)], num_beams=1)
    assert len(set(captions)) > 15
    with start(Limits(max_batch=8, max_wait=0.05)) as running, ThreadPoolExecutor(24) as pool:
        client = _client(running)
        answers = list(pool.map(lambda number: _ask(client, number % 24), range(48)))
        assert [a.choices[0].message.content for a in answers] == captions * 2
        assert len({a.id for a in answers}) == 48
        page = urllib.request.urlopen(f"{running.address}/metrics").read().decode()
        assert re.search(r'^evlgen_requests_total\{status="200"\} 48', page, re.M)
        batches = int(float(re.search(r"^evlgen_batch_size_count (\S+)", page, re.M)[1]))
        assert 6 <= batches < 40


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model": "gpt-4o"}, 404, "model_not_found"),
        ({"messages": []}, 400, "invalid_request"),
        ({"messages": [{"role": "user", "content": "no image"}]}, 400, "missing_image"),
        ({"tools": []}, 400, "invalid_request"),
        ({"n": 0}, 400, "invalid_request"),
        ({"n": 1.5}, 400, "invalid_request"),
        ({"n": 9}, 400, "too_large"),
        ({"max_tokens": 257}, 400, "too_large"),
        ({"temperature": -1}, 400, "invalid_request"),
        ({"temperature": "hot"}, 400, "invalid_request"),
        ({"top_p": 0}, 400, "invalid_request"),
        ({"seed": 2**63}, 400, "invalid_request"),
        ({"stop": ["a"] * 5}, 400, "invalid_request"),
        ({"frequency_penalty": 0.5}, 400, "invalid_request"),
        ({"response_format": {"type": "json_object"}}, 400, "invalid_request"),
        ({"repetition_penalty": 1e-9}, 400, "invalid_request"),
        ({"max_tokens": None, "stop": None, "user": "me", "frequency_penalty": 0}, 200, None),
        ({"tools": None, "logit_bias": None, "top_logprobs": None, "verbosity": None}, 200, None),
    ],
)
def test_what_is_wrong_with_a_request_is_said(running, change, status, code):
    found, body = running.post({**question(data_url(encoded(image()))), **change})
    assert (found, body.get("error", {}).get("code")) == (status, code)
    if code == "invalid_request":
        assert body["error"]["param"].split(".")[0] == next(iter(change))


def _said(role, *parts):
    kinds = {str: lambda p: {"type": "text", "text": p}, int: lambda p: _image_part(p)}
    return {"role": role, "content": [kinds[type(part)](part) for part in parts]}


def _image_part(number):
    return {"type": "image_url", "image_url": {"url": data_url(encoded(image(number)))}}


def test_conversations_of_several_turns_and_images_are_answered_as_by_chat(running, model):
    def for_chat(message):
        parts = [
            {"type": "image", "image": image(part)}
            if isinstance(part, int)
            else {"type": "text", "text": part}
            for part in message[1:]
        ]
        return {"role": message[0], "content": parts}

    talks = [
        [("user", 1, "how many shapes?"), ("assistant", "two"), ("user", "is there a circle?")],
        [("user", 1, 2, "which is red?")],
        [("system", "be short"), ("user", "what is it?", 3)],
    ]
    client = _client(running)
    with ThreadPoolExecutor(3) as pool:
        answers = pool.map(
            lambda talk: client.chat.completions.create(
                model="shapes", messages=[_said(*message) for message in talk], max_tokens=6
            ),
            talks,
        )
    found = [answer.choices[0].message.content for answer in answers]
    assert found == [model.chat([for_chat(m) for m in talk], max_length=6) for talk in talks]


def test_conversations_that_cannot_be_answered_are_refused(running):
    one = _said("user", 1, "what?")
    for messages, words in (
        ([one, _said("assistant", "two")], "must be the user's"),
        ([one, _said("system", "late"), one], "only the first turn"),
        ([one, _said("user", "")], "empty"),
        ([_said("user", "hello")], "no image"),
        ([_said("user", *[1] * 9)], "at most 8"),
        ([_said("user", "x" * 40_000, 1)], "32000 characters"),
        ([{"role": "tool", "content": "x"}, one], "role"),
    ):
        status, body = running.post({"model": "shapes", "messages": messages})
        assert status == 400 and words in body["error"]["message"]


def test_a_model_of_conversations_reads_single_messages_as_such(start, model):
    talk = [{"role": "user", "content": "hello"}]
    with start(answerer=Answerer(model, only_turns=True)) as running:
        status, body = running.post({"model": "shapes", "messages": talk, "max_tokens": 4})
    assert status == 200
    assert body["choices"][0]["message"]["content"] == model.chat(talk, max_length=4)


def test_a_text_the_model_would_cut_is_refused_and_spoils_no_other_answer(start):
    limits = Limits(max_batch=4, max_wait=0.3)
    texts = ["how many shapes are there?", "why " * 60, "is there a circle?"]
    with start(limits) as running, ThreadPoolExecutor(3) as pool:
        bodies = [question(data_url(encoded(image())), text) for text in texts]
        answers = list(pool.map(running.post, bodies))
    assert [status for status, _ in answers] == [200, 400, 200]
    assert "tokens" in answers[1][1]["error"]["message"]
    assert running.post  # the server has stopped without trouble


@pytest.fixture
def talkative():
    """The bundled model with a chat template in its tokenizer, whose turns end with a token of their own that
    is not a special one; the model writes it in place of a newline."""
    model = load_model("evlgen_opt")
    language = model.language
    (newline,), end = language.end_token_ids, len(language.tokenizer)
    template = read_template("question_answer").replace(
        "Answer: {{ message.content }}", "Answer: {{ message.content }}<|end|>"
    )
    language.tokenizer.chat_template = template
    language.tokenizer.add_tokens([AddedToken("<|end|>", special=False)])
    language.model.resize_token_embeddings(end + 1)
    with torch.no_grad():
        rows = language.model.get_output_embeddings().weight
        rows[end], rows[newline] = rows[newline].clone(), 0
    return model


def test_a_turn_is_cut_where_its_templates_end_is_missing(talkative):
    asked = {"role": "user", "content": [{"type": "text", "text": "what is it?"}]}
    answerer, so_far = Answerer(talkative, only_turns=True), []

    def answer(most):
        how = answerer.decoding(False, num_beams=1, max_length=most)
        ask = Ask([], None, how, turns=read_turns([asked]), on_texts=so_far.append)
        return answerer.answer([ask])[0].texts[0]

    whole = answer(20)
    assert whole.text and "<|end|>" not in whole.text and whole.num_tokens < 20
    assert so_far[-1] == [whole.text] == [talkative.chat([asked])]
    assert "".join(talkative.chat([asked], stream=True)) == whole.text
    assert answer(whole.num_tokens) == whole and not whole.is_cut
    assert answer(whole.num_tokens - 1).is_cut


def test_captions_are_written_by_consensus_where_the_model_is_set_so(start):
    model = load_model("evlgen_opt")
    plain = model.generate([image(number) for number in range(6)], num_beams=1)
    model.generation = GenerationConfig(consensus=6)
    agreed = model.generate([image(number) for number in range(6)], num_beams=1)
    assert agreed != plain
    exhibit = Exhibit("shapes", model)
    assert [exhibit.captions([image(n)], 1, 30)[0].text for n in range(6)] == agreed
    number = plain.index(next(text for text, other in zip(plain, agreed, strict=True) if text != other))
    limits = Limits(max_batch=4, max_wait=0.3)
    with start(limits, Answerer(model)) as running, ThreadPoolExecutor(3) as pool:
        client = _client(running)
        pieces = pool.submit(lambda: list(_ask(client, number, stream=True)))
        answers = pool.map(lambda text: _ask(client, number, text), [None, "how many shapes are there?"])
        caption, answer = (found.choices[0].message.content for found in answers)
    assert caption == agreed[number] == "".join(map(_content, pieces.result()))
    assert answer in ("one", "two", "three", "four")


class SlowAnswerer(Answerer):
    """Answers when it may, and notes what it was asked."""

    def __init__(self, model) -> None:
        super().__init__(model)
        self.may_answer = threading.Event()
        self.batches: list[int] = []
        self.stopped = 0

    def answer(self, requests: list[Ask], is_wanted=lambda: True) -> list[Answer]:
        self.batches.append(len(requests))
        while not self.may_answer.wait(0.01):
            if not is_wanted():
                self.stopped += 1
                raise Stopped
        return [Answer([Text("done", 1, False)], 1) for _ in requests]


def _until(condition, seconds=10.0):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_a_full_queue_refuses_and_openais_client_tries_again(start, model):
    answerer = SlowAnswerer(model)
    with start(Limits(max_batch=1, queue=2), answerer) as running, ThreadPoolExecutor(4) as pool:
        client = _client(running)
        waiting = [pool.submit(_ask, client, number) for number in range(3)]
        _until(lambda: running.service._admitted == 3)
        with pytest.raises(openai.RateLimitError) as refused:
            _ask(client, 3)
        assert refused.value.response.headers["retry-after"] == "1"
        patient = pool.submit(_ask, client.with_options(max_retries=5), 3)
        time.sleep(0.1)
        answerer.may_answer.set()
        assert {f.result().choices[0].message.content for f in [*waiting, patient]} == {"done"}


def test_who_leaves_or_waits_too_long_is_not_computed(start, model):
    answerer = SlowAnswerer(model)
    with start(Limits(max_batch=1, seconds=1.5), answerer) as running:
        body = json.dumps(question(data_url(encoded(image())))).encode()
        head = "POST /v1/chat/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"
        head += f"Content-Length: {len(body)}\nConnection: close\n"
        first, second = running.send(head, body), running.send(head, body)
        _until(lambda: running.service.batcher.num_waiting == 1)
        second.close()
        first.close()
        _until(lambda: answerer.stopped == 1 and running.service._admitted == 0)
        with running.send(head, body) as third:
            status, answer = answer_of(third)
        assert (status, answer["error"]["code"]) == (504, "timeout")
        _until(lambda: answerer.stopped == 2)
        assert answerer.batches == [1, 1]
        page = urllib.request.urlopen(f"{running.address}/metrics").read().decode()
        assert 'evlgen_requests_total{status="499"} 2.0' in page and 'status="504"} 1.0' in page


def test_generation_stops_when_nobody_waits(model):
    answerer = Answerer(model)
    asked = Ask([answerer.pixels(image())], None, answerer.decoding(False, num_beams=1, max_length=30))
    (whole,) = answerer.answer([asked])
    counted = []

    def is_wanted():
        counted.append(1)
        return len(counted) < 4

    with pytest.raises(Stopped):
        answerer.answer([asked], is_wanted)
    assert len(counted) == 4 < whole.texts[0].num_tokens
    assert answerer.answer([asked]) == [whole]


def test_a_seed_gives_the_same_texts_in_any_company(model):
    answerer = Answerer(model)
    how = answerer.decoding(False, num_beams=1, max_length=30, use_nucleus_sampling=True, top_p=1.0)
    asked = Ask([answerer.pixels(image())], None, how, 5)
    assert asked.kind != Ask(asked.images, None, how, 5).kind
    assert answerer.answer([asked]) == answerer.answer([asked])


def test_a_key_is_asked_for_and_health_is_open(start):
    with start(api_key="sesame") as running:
        with pytest.raises(openai.AuthenticationError):
            _client(running, "open").models.list()
        assert _client(running, "sesame").models.list().data[0].id == "shapes"
        status, body = running.post(question("data:,"), "Authorization: Bearer café\n")
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert urllib.request.urlopen(f"{running.address}/health").status == 200
        with running.send("GET /metrics HTTP/1.1\nHost: localhost\nConnection: close\n") as connection:
            assert answer_of(connection)[0] == 401


def test_a_web_page_cannot_reach_a_local_server_under_its_own_name(start):
    with start(local_only=True) as running:
        for host, status in (("evil.example:80", 403), ("localhost:8000", 200), ("127.0.0.1", 200)):
            with running.send(f"GET /v1/models HTTP/1.1\nHost: {host}\nConnection: close\n") as connection:
                assert answer_of(connection)[0] == status


def test_other_paths_and_methods_answer_in_openais_form(running):
    status, body = running.post({}, path="/v1/completions")
    assert (status, body["error"]["code"]) == (404, "not_found")
    with running.send(
        "GET /v1/chat/completions HTTP/1.1\nHost: localhost\nConnection: close\n"
    ) as connection:
        assert answer_of(connection)[0] == 405


def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="port"):
            bind("127.0.0.1", taken.getsockname()[1])


def test_the_command_serves_the_bundled_model_and_drains_on_sigterm(forks, tmp_path):
    command = [forks.python, "-m", "evlgen", "serve", "--port", "0", "--max-wait", "1500"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "EVLGEN_API_KEY": "k"}
    log = open(tmp_path / "log", "w")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True)
    try:
        line = process.stdout.readline()
        address = re.fullmatch(r"serving shapes at (http://127\.0\.0\.1:\d+/v1)\n", line)[1]
        client = openai.OpenAI(base_url=address, api_key="k", max_retries=0)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(_ask, client, 1)
            _until(lambda: "in_progress 1" in _metrics(address, "k"))
            process.send_signal(signal.SIGTERM)
            assert waiting.result().choices[0].message.content
        assert process.wait(30) == 0
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        process.kill()
        log.close()


def _metrics(address, key):
    request = urllib.request.Request(address.replace("/v1", "/metrics"))
    request.add_header("Authorization", f"Bearer {key}")
    return urllib.request.urlopen(request).read().decode()
