"""Requests per second of ``evlgen serve``, and how long they take: batched against one at a time.

    python benchmarks/serve_load.py [--clients 1 8 32] [--requests 400] [--check 10000] [CHECKPOINT]

Two servers run in processes of their own, one with ``--max-batch 64`` and one with ``--max-batch 1``. They
are measured in turn with the same requests, by this process. Scenes of the Shapes world are asked about whose
captions all differ, so that an answer tells whose it is: then ``--check`` requests are sent by 64 clients,
and every one must get the caption that its scene gets when it is asked about alone.
Options of ``evlgen serve`` go to both servers.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import io
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field

from PIL import Image

from evlgen.datasets.shapes.world import draw, scene

CHECKING_CLIENTS = 64
ROUNDS = 3  # in which the two servers are measured in turn


@dataclass
class Found:
    """What came back of one measurement: seconds of each request and of all, (scene, answer) by request."""

    seconds: list[float] = field(default_factory=list)
    answers: dict[int, tuple[int, str, str]] = field(default_factory=dict)
    failures: collections.Counter = field(default_factory=collections.Counter)
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
        Image.fromarray(draw(scene("test", number))).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}]
        return json.dumps({"model": self.model, "messages": [{"role": "user", "content": content}]}).encode()

    def stop(self) -> None:
        self.process.terminate()
        code = self.process.wait(60)
        if code:
            raise SystemExit(f"the server {self.name} ended with {code}")


async def post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to one request on an open connection."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
    return int(head.split()[1]), await reader.readexactly(length)


async def load(server: Server, bodies: dict[int, bytes], scenes: list[int], num_clients: int) -> Found:
    """Sends one request for each of ``scenes``, by clients that each send their next request when they have
    the answer to their last."""
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
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(num_clients)))
    found.total = time.perf_counter() - started
    return found


def distinct_scenes(alone: Server, wanted: int) -> dict[int, str]:
    """Scenes by number, each with its caption, which no other of them has."""
    bodies = {number: alone.body(number) for number in range(2 * wanted)}
    found = asyncio.run(load(alone, bodies, list(bodies), 1))
    captions: dict[str, int] = {}
    for place, caption, _ in found.answers.values():
        captions.setdefault(caption, place)
    return {place: caption for caption, place in list(captions.items())[:wanted]}


def check(found: Found, captions: dict[int, str], count: int) -> None:
    """Prints how many of ``count`` answers were lost, came twice, or are not those of their scenes."""
    names = collections.Counter(name for _, _, name in found.answers.values())
    owners = {caption: place for place, caption in captions.items()}
    wrong = [(place, text) for place, text, _ in found.answers.values() if text != captions[place]]
    of_others = sum(text in owners for _, text in wrong)
    doubled = sum(times - 1 for times in names.values())
    print(
        f"{count:,} requests over {len(captions)} scenes: {count - len(found.answers)} lost "
        f"{dict(found.failures) or ''}, {doubled} doubled, {of_others} another's, {len(wrong) - of_others} "
        f"different otherwise; {found.rate:.0f} requests/s"
    )
    if len(found.answers) != count or doubled or wrong:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=400, help="of each measurement")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--check", type=int, default=10_000, help="requests whose answers are compared")
    args, options = parser.parse_known_args()
    options = [option for option in options if option != "--"]
    servers = [
        Server("batched", "--max-batch", "64", *options),
        Server("one at a time", "--max-batch", "1", *options),
    ]
    captions = distinct_scenes(servers[1], args.scenes)
    bodies = {place: servers[0].body(place) for place in captions}
    places = list(captions)
    print("| clients | server | requests/s | p50 ms | p95 ms | p99 ms |\n|---|---|---|---|---|---|")
    for num_clients in args.clients:
        founds = [Found(), Found()]
        for number in range(ROUNDS):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            for which in order:
                scenes = [places[k % len(places)] for k in range(args.requests // ROUNDS)]
                part = asyncio.run(load(servers[which], bodies, scenes, num_clients))
                founds[which].seconds += part.seconds
                founds[which].total += part.total
                if part.failures:
                    raise SystemExit(f"{servers[which].name} refused requests: {dict(part.failures)}")
        for server, found in zip(servers, founds, strict=True):
            times = " | ".join(f"{1000 * found.percentile(percent):.0f}" for percent in (50, 95, 99))
            print(f"| {num_clients} | {server.name} | {found.rate:.1f} | {times} |", flush=True)
        print(f"times as many per second: {founds[0].rate / founds[1].rate:.2f}", flush=True)
    if args.check:
        scenes = [places[k % len(places)] for k in range(args.check)]
        found = asyncio.run(load(servers[0], bodies, scenes, CHECKING_CLIENTS))
        check(found, captions, args.check)
    for server in servers:
        server.stop()


if __name__ == "__main__":
    main()
