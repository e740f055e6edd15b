"""Merging by one scatter over a merge map, against the textbook form (gather + ``scatter_reduce``); and what
merging saves in the whole connector.

    python benchmarks/token_merging.py
    python benchmarks/token_merging.py --connector [--r 0,4,8,12,16,19] [--rounds 5] [--batch 4]

Without ``--connector``: forward and backward, matching included, at the sizes of the published connector:
B=16, N=257, C=768, r=19, 12 heads.

With it: the published connector as a whole (257 visual tokens of 1408 channels, BERT-base's 12 layers, 2560
channels out) for several r: tokens after each layer, multiplications and additions of the forward pass, and
the time of forward and backward relative to r=0, all in turn in one run. A table in Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from harness import Side, check_equal, compare, spread
from reference import textbook_matching

from evlgen.models.connectors import ConnectorInputs, TomeFormer
from evlgen.models.token_merging import limit_r, match_tokens, merge_mean

TOKENS, VISION, WIDTH, FEED_FORWARD, HEADS, LAYERS, LANGUAGE = 257, 1408, 768, 3072, 12, 12, 2560
PUBLISHED = (0, 4, 8, 12, 16, 19)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--connector", action="store_true", help="the whole connector for several r")
    parser.add_argument("--r", type=lambda text: [int(r) for r in text.split(",")], default=list(PUBLISHED))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.connector:
        compare_connectors(args.r, args.rounds, args.batch)
    else:
        compare_merging()


def compare_merging() -> None:
    """One layer's merging, against the textbook."""
    metric = torch.randn(16, 257, 64)
    x = torch.randn(16, 257, 768, requires_grad=True)
    out_grad = torch.randn(16, 238, 768)

    def ours_merge():
        return merge_mean(x, *match_tokens(metric, 19))

    def textbook_merge():
        return textbook_matching(metric, 19)(x)

    def run(merge):
        x.grad = None
        merge().backward(out_grad)
        return x.grad

    check_equal(ours_merge(), textbook_merge(), 1e-5)
    fixed = match_tokens(metric, 19)
    fixed_textbook = textbook_matching(metric, 19)
    print(f"token merging, {torch.get_num_threads()} threads, merging alone (forward + backward)")
    compare(lambda: run(lambda: merge_mean(x, *fixed)), lambda: run(lambda: fixed_textbook(x))).show()
    print("matching and merging (forward + backward)")
    compare(lambda: run(ours_merge), lambda: run(textbook_merge)).show()


def compare_connectors(values: list[int], rounds: int, batch: int, warm_up: int = 1) -> None:
    """The whole connector for each r, in turn, in this process; prints a table."""
    values = values if 0 in values else [0, *values]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    connector = TomeFormer(ConnectorInputs(VISION, LANGUAGE, TOKENS), num_layers=LAYERS).to(device).train()
    tokens = torch.randn(batch, TOKENS, VISION, device=device)
    sides = {r: Side(f"r={r}") for r in values}
    for number in range(warm_up + rounds):
        for r in values if number % 2 == 0 else reversed(values):
            taken, out = step(connector, tokens, r)
            if out != tokens_after(r)[-1]:
                raise SystemExit(f"r={r} leaves {out} tokens, not {tokens_after(r)[-1]}")
            if number >= warm_up:
                sides[r].seconds.append(taken)
    print(
        f"the published connector, batch {batch}, {device}, {torch.get_num_threads()} threads, "
        f"{rounds} rounds\n\n"
        "| r | tokens after layers 1 to 12 | GFLOP forward, an image | of r=0 | both passes | of r=0 |"
        "\n|---|---|---|---|---|---|"
    )
    whole, base = flops(0), sides[0].seconds
    for r in values:
        ratio = statistics.median(one / other for one, other in zip(sides[r].seconds, base, strict=True))
        shown = ", ".join(map(str, tokens_after(r)))
        print(
            f"| {r} | {shown} | {flops(r) / 1e9:.1f} | {flops(r) / whole:.2f} | {spread(sides[r].seconds)} "
            f"| {ratio:.2f} |"
        )


def step(connector: TomeFormer, tokens: torch.Tensor, r: int) -> tuple[float, int]:
    """Seconds of a forward and backward pass that merges r pairs in each layer, and the tokens left."""
    connector.r = [r] * LAYERS
    connector.zero_grad(set_to_none=True)
    synchronise()
    started = time.perf_counter()
    out = connector(tokens)
    out.sum().backward()
    synchronise()
    return time.perf_counter() - started, out.shape[1]


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tokens_after(r: int) -> list[int]:
    """How many tokens each layer leaves."""
    left, out = TOKENS, []
    for _ in range(LAYERS):
        left -= limit_r(left, r)
        out.append(left)
    return out


def flops(r: int) -> int:
    """Multiplications and additions in the matrix products of an image's forward pass, matching included."""
    total, before = 2 * TOKENS * VISION * WIDTH, TOKENS
    for after in tokens_after(r):
        total += 2 * before * WIDTH * 4 * WIDTH  # queries, keys, values and the output
        total += 2 * 2 * before * before * WIDTH  # scores and their weighted sum
        if after < before:
            total += 2 * (before // 2) * (before - before // 2) * (WIDTH // HEADS)  # similarity of A and B
        total += 2 * 2 * after * WIDTH * FEED_FORWARD
        before = after
    return total + 2 * before * WIDTH * LANGUAGE


if __name__ == "__main__":
    main()
