"""Merging by one scatter over a merge map, against the textbook form (gather + ``scatter_reduce``).

    python benchmarks/token_merging.py

Forward and backward, matching included, at the sizes of the published connector: B=16, N=257, C=768, r=19, 12
    heads.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from harness import check_equal, compare
from reference import textbook_matching

from evlgen.models.token_merging import match_tokens, merge_mean


def main() -> None:
    torch.manual_seed(0)
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


if __name__ == "__main__":
    main()
