"""Requests per second of ``evlgen serve``, and how long they take: batched against one at a time.

    python benchmarks/serve_load.py [--clients 1 8 32] [--requests 400] [--check 10000] [CHECKPOINT]

Two servers run in processes of their own, one with ``--max-batch 64`` and one with ``--max-batch 1``. They
are measured in turn with the same requests, by this process. Then 64 clients send ``--check`` requests to the
first. Each is about a scene of its own of the Shapes world, and no two of these scenes have the same caption,
so that an answer shows which request it belongs to. The captions to expect are computed in this process,
without a server. ``--check`` needs the bundled model. Options of ``evlgen serve`` go to both servers.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import io
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field

import torch
from PIL import Image

from evlgen.datasets.shapes.world import draw, scene
from evlgen.models.zoo import load_model_of
from evlgen.serving.answering import Answerer, Ask
from evlgen.serving.app import DEFAULT_TOKENS

BATCH = 64
CHECKING_CLIENTS = 64
ROUNDS = 3  # in which the two servers are measured in turn


@dataclass
class Found:
    """What came back of one measurement: seconds of each request and of all, (scene, answer) by request."""

    seconds: list[float] = field(default_factory=list)
    answers: dict[int, tuple[int, str, str]] = field(default_factory=dict)
    failures: collections.Counter = field(default_factory=collections.Counter)
    surplus: int = 0  # connections on which more came than was asked for
    total: float = 0.0

    @property
    def rate(self) -> float:
        return len(self.seconds) / self.total

    def percentile(self, percent: int) -> float:
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[percent - 1]


class Server:
    """A server process."""

    def __init__(self, name: str, *options: str) -> None:
        self.name = name
        command = [sys.executable, "-m", "evlgen", "serve", "--port", "0", "--num-beams", "1", *options]
        environment = {key: value for key, value in os.environ.items() if key != "EVLGEN_API_KEY"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        line = self.process.stdout.readline()
        found = re.fullmatch(r"serving (\S+) at http://127\.0\.0\.1:(\d+)/v1\n", line)
        if found is None:
            raise SystemExit(f"the server {name} did not start: {line}")
        self.model, self.port = found[1], int(found[2])

    def body(self, number: int) -> bytes:
        """A request about a scene."""
        file = io.BytesIO()
        image_of(number).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}]
        return json.dumps({"model": self.model, "messages": [{"role": "user", "content": content}]}).encode()

    @property
    def num_answered(self) -> int:
        """Requests answered so far, as the server counts them."""
        page = urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30).read().decode()
        found = re.search(r'^evlgen_requests_total\{status="200"\} (\S+)', page, re.M)
        return round(float(found[1])) if found else 0

    def stop(self) -> None:
        self.process.terminate()
        code = self.process.wait(60)
        if code:
            raise SystemExit(f"the server {self.name} ended with {code}")


def image_of(number: int) -> Image.Image:
    """The image of a scene."""
    return Image.fromarray(draw(scene("test", number)))


async def post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to one request on an open connection."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
    return int(head.split()[1]), await reader.readexactly(length)


async def load(server: Server, scenes: list[int], num_clients: int) -> Found:
    """Sends one request for each of ``scenes``, by clients that each send their next request when they have
    the answer to their last."""
    bodies = {place: server.body(place) for place in scenes}
    found, waiting = Found(), collections.deque(enumerate(scenes))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        while waiting:
            number, place = waiting.popleft()
            started = time.perf_counter()
            status, body = await post(reader, writer, bodies[place])
            found.seconds.append(time.perf_counter() - started)
            if status != 200:
                found.failures[status] += 1
                continue
            answer = json.loads(body)
            found.answers[number] = place, answer["choices"][0]["message"]["content"], answer["id"]
        writer.write_eof()
        found.surplus += bool(await reader.read())
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(num_clients)))
    found.total = time.perf_counter() - started
    return found


def distinct_captions(wanted: int) -> dict[int, str]:
    """Scenes by number, each with its greedy caption, which no other of them has."""
    answerer = Answerer(load_model_of(None, None, [], "cpu", False))
    decoding = answerer.decoding(False, num_beams=1, max_length=DEFAULT_TOKENS)
    owners: dict[str, int] = {}
    numbers = filter(_has_three_looks, itertools.count())
    while len(owners) < wanted:
        part = list(itertools.islice(numbers, BATCH))
        asks = [Ask([answerer.pixels(image_of(number))], None, decoding) for number in part]
        for number, answer in zip(part, answerer.answer(asks), strict=True):
            owners.setdefault(answer.texts[0].text, number)
    return {number: caption for caption, number in itertools.islice(owners.items(), wanted)}


def _has_three_looks(number: int) -> bool:
    """Such scenes have the most captions."""
    return len({(shape.kind, shape.colour) for shape in scene("test", number).shapes}) == 3


def check(found: Found, captions: dict[int, str], num_answered: int) -> None:
    """Prints how many answers were lost, came twice, or are not those of their scenes.

    Args:
        captions: of each scene that was asked about once; all differ.
        num_answered: by the server's own count.

    Raises:
        SystemExit: any of these happened.
    """
    count = len(captions)
    names = collections.Counter(name for _, _, name in found.answers.values())
    texts = collections.Counter(text for _, text, _ in found.answers.values())
    owners = {caption: place for place, caption in captions.items()}
    wrong = [(place, text) for place, text, _ in found.answers.values() if text != captions[place]]
    of_others = sum(text in owners for _, text in wrong)
    lost = count - len(found.answers)
    failures = f" {dict(found.failures)}" if found.failures else ""
    doubled = found.surplus + sum(times - 1 for seen in (names, texts) for times in seen.values())
    print(
        f"{count:,} requests, {len(owners):,} different captions: {lost} lost{failures}, "
        f"{doubled} doubled, {of_others} another's, {len(wrong) - of_others} different otherwise; the server "
        f"counts {num_answered:,} answers; {found.rate:.0f} requests/s"
    )
    for place, text in wrong[:10]:
        print(f"scene {place}: '{text}', expected '{captions[place]}'")
    if lost or doubled or wrong or len(owners) != count or num_answered != count:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=400, help="of each measurement")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--check", type=int, default=10_000, help="requests whose answers are compared")
    args, options = parser.parse_known_args()
    torch.set_num_threads(1)
    options = [option for option in options if option != "--"]
    servers = [
        Server("batched", "--max-batch", str(BATCH), *options),
        Server("one at a time", "--max-batch", "1", *options),
    ]
    places = list(range(args.scenes))
    print("| clients | server | requests/s | p50 ms | p95 ms | p99 ms |\n|---|---|---|---|---|---|")
    for num_clients in args.clients:
        founds = [Found(), Found()]
        for number in range(ROUNDS):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            for which in order:
                scenes = [places[k % len(places)] for k in range(args.requests // ROUNDS)]
                part = asyncio.run(load(servers[which], scenes, num_clients))
                founds[which].seconds += part.seconds
                founds[which].total += part.total
                if part.failures:
                    raise SystemExit(f"{servers[which].name} refused requests: {dict(part.failures)}")
        for server, found in zip(servers, founds, strict=True):
            times = " | ".join(f"{1000 * found.percentile(percent):.0f}" for percent in (50, 95, 99))
            print(f"| {num_clients} | {server.name} | {found.rate:.1f} | {times} |", flush=True)
        print(f"times as many per second: {founds[0].rate / founds[1].rate:.2f}", flush=True)
    if args.check:
        captions = distinct_captions(args.check)
        before = servers[0].num_answered
        found = asyncio.run(load(servers[0], list(captions), CHECKING_CLIENTS))
        check(found, captions, servers[0].num_answered - before)
    for server in servers:
        server.stop()


if __name__ == "__main__":
    main()
