"""Over many requests of many clients no answer is lost, doubled or another's.

A request carries a number in the pixels of its image and one in its text, and the model's part is played by
one that reads both: each answer can be that of one request only. The rest is the server, whole.
``benchmarks/serve_load.py --check 10000`` does the same with the captions of the bundled model.
"""

from __future__ import annotations

import asyncio
import collections
import json
import random
import re
import urllib.request

import numpy as np
import pytest
from PIL import Image
from serving_requests import data_url, encoded, question

from evlgen.serving.answering import Answer, Answerer, Text
from evlgen.serving.limits import Limits

CLIENTS = 64
SIDE = 64  # pixels of an image: 4 x 4 fields, each a bit


class NumberReader(Answerer):
    """Reads the number in the image."""

    def answer(self, requests, is_wanted=lambda: True):
        return [
            Answer(
                [
                    Text(f"{self.number(request.images[0])} {request.text} {place}", 1, False)
                    for place in range(request.decoding.num_captions)
                ],
                1,
            )
            for request in requests
        ]

    @staticmethod
    def number(image) -> int:
        fields = image.mean(0).unflatten(0, (4, -1)).unflatten(2, (4, -1)).mean((1, 3))
        bits = fields.flatten() > image.mean(0)[0, 0]  # the first field is always black
        return sum(1 << place for place, bit in enumerate(bits.tolist()) if bit) >> 1


def numbered(number: int) -> Image.Image:
    """An image with a number below 32,768."""
    bits = np.array([number << 1 >> place & 1 for place in range(16)], dtype=np.uint8).reshape(4, 4)
    return Image.fromarray(np.kron(bits * 255, np.ones((SIDE // 4, SIDE // 4), np.uint8))).convert("RGB")


async def ask(port: int, numbers: collections.deque, found: list, leaves: random.Random) -> None:
    """One client: sends its next request when it has the answer to its last, and leaves now and then before
    one to a request that nobody else makes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while numbers:
        number = numbers.popleft()
        await send(writer, number)
        status, answer = await receive(reader)
        found.append((number, status, answer))
        if leaves.random() < 0.03:
            _, leaving = await asyncio.open_connection("127.0.0.1", port)
            await send(leaving, 20_000 + number % 10_000)
            leaving.transport.abort()
    writer.write_eof()
    assert await reader.read() == b"", "more came than was asked for"
    writer.close()


async def send(writer: asyncio.StreamWriter, number: int) -> None:
    body = question(data_url(encoded(numbered(number))), f"t{number}", n=1 + number % 2)
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
    await writer.drain()


async def receive(reader: asyncio.StreamReader) -> tuple[int, dict]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
    return int(head.split()[1]), json.loads(await reader.readexactly(length))


def test_numbers_are_read_as_they_are_drawn(model):
    reader = NumberReader(model)
    for number in (0, 1, 2, 9_999, 20_001, 32_767):
        assert reader.number(reader.pixels(numbered(number))) == number


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_answer_is_lost_doubled_or_anothers(start, model, count):
    found: list = []
    numbers, leaves = collections.deque(range(count)), random.Random(0)
    with start(Limits(max_batch=16, max_wait=0.05, seconds=120), NumberReader(model)) as running:

        async def all_clients() -> None:
            await asyncio.gather(*(ask(running.port, numbers, found, leaves) for _ in range(CLIENTS)))

        asyncio.run(all_clients())
        page = urllib.request.urlopen(f"{running.address}/metrics").read().decode()
    assert collections.Counter(status for _, status, _ in found) == {200: count}
    assert sorted(number for number, _, _ in found) == list(range(count)), "lost, or doubled"
    for number, _, answer in found:
        texts = [choice["message"]["content"] for choice in answer["choices"]]
        assert texts == [f"{number} t{number} {place}" for place in range(1 + number % 2)], "another's"
    assert len({answer["id"] for _, _, answer in found}) == count

    def counted(name: str) -> int:
        return int(float(re.search(rf"^evlgen_{re.escape(name)} (\S+)", page, re.M)[1]))

    assert count <= counted('requests_total{status="200"}')
    assert counted("batch_size_count") < count, "requests are answered in batches"
    print(
        f"{count:,} requests of {CLIENTS} clients, {counted('batch_size_count'):,} batches: each has its own"
    )
