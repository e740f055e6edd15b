"""Captions per second against transformers' ``Blip2ForConditionalGeneration.generate``.

    python benchmarks/inference.py [--batch 1 16] [--beams 1 5] [--precision fp32] [--rounds 5]

The same sizes of ViT and language model as in `step`, random weights, and as many soft prompts: 29, here
from a TomeFormer, there from a Q-Former of BERT-base size with cross-attention in every second layer. Both
write exactly 20 new tokens for each picture, so that none is done early.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from harness import compare
from step import our_model, write_weights
from textbook import Sizes
from transformers import Blip2Config, Blip2ForConditionalGeneration

from evlgen.common.logs import quiet_libraries
from evlgen.common.precision import dtype_of

NEW_TOKENS = 20
IMAGE_TOKEN = 7  # any token: BLIP-2 marks with it where soft prompts go


def blip2(sizes: Sizes, num_soft_prompts: int, dtype: torch.dtype) -> Blip2ForConditionalGeneration:
    """BLIP-2 of these sizes, random weights."""
    config = Blip2Config(
        vision_config={
            "hidden_size": sizes.vision_dim,
            "intermediate_size": 4 * sizes.vision_dim,
            "num_hidden_layers": sizes.vision_kwargs["depth"],
            "num_attention_heads": sizes.vision_kwargs["num_heads"],
            "image_size": sizes.image_size,
            "patch_size": sizes.vision_kwargs["patch_size"],
        },
        qformer_config={
            "hidden_size": sizes.hidden,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "intermediate_size": sizes.intermediate,
            "encoder_hidden_size": sizes.vision_dim,
        },
        text_config=sizes.opt_config().to_dict(),
        num_query_tokens=num_soft_prompts,
        image_token_index=IMAGE_TOKEN,
    )
    torch.manual_seed(0)
    return Blip2ForConditionalGeneration(config).to(dtype).eval()


def generators(sizes: Sizes, folder: Path, precision: str) -> tuple[Callable, Callable]:
    """Ours and BLIP-2's: (pictures, beams) -> number of captions."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype_of(precision, device)
    model = our_model(sizes, folder, precision, device).to(device).eval()
    num_soft_prompts = model.connector.num_soft_prompts(model.vision.num_tokens)
    other = blip2(sizes, num_soft_prompts, dtype).to(device)
    prompt = torch.tensor([[IMAGE_TOKEN] * num_soft_prompts + [2]], device=device)

    def ours(pictures: torch.Tensor, beams: int) -> int:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            texts = model.generate(
                {"image": pictures}, num_beams=beams, max_length=NEW_TOKENS, min_length=NEW_TOKENS
            )
        return len(texts)

    @torch.no_grad()
    def theirs(pictures: torch.Tensor, beams: int) -> int:
        ids = other.generate(
            pixel_values=pictures.to(device, dtype),
            input_ids=prompt.expand(len(pictures), -1),
            num_beams=beams,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
        )
        assert (ids[:, -NEW_TOKENS:] >= 0).all()
        return len(ids)

    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    quiet_libraries()
    sizes = Sizes()
    with tempfile.TemporaryDirectory() as name:
        write_weights(sizes, Path(name))
        ours, theirs = generators(sizes, Path(name), args.precision)
    for batch in args.batch:
        pictures = torch.randn(batch, 3, sizes.image_size, sizes.image_size)
        for beams in args.beams:
            print(f"batch {batch}, {f'beam {beams}' if beams > 1 else 'greedy'}, {args.precision}")
            one, two = (partial(make, pictures, beams) for make in (ours, theirs))
            found = compare(one, two, args.rounds, 1, names=("ours", "BLIP-2 of transformers")).show()
            rates = [batch / side.median for side in (found.ours, found.other)]
            print(f"  captions per second: {rates[0]:.2f} against {rates[1]:.2f}")


if __name__ == "__main__":
    main()
