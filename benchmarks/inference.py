"""Captions per second against transformers' ``Blip2ForConditionalGeneration.generate``.

    python benchmarks/inference.py [--batch 1 16] [--beams 1 5] [--precision fp32] [--rounds 5]

The same sizes of ViT and language model as in `step`, random weights, and as many soft prompts: 29, here
from a TomeFormer, there from a Q-Former of BERT-base size with cross-attention in every second layer. Both
write exactly 20 new tokens for each image, so that none is done early. The two connectors do not cost the
same: a TomeFormer reads 257 tokens, a Q-Former 29 queries. So the language model is measured alone as well:
the same weights, the same soft prompts, and the same texts in the end.
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
from transformers import AutoModelForCausalLM, Blip2Config, Blip2ForConditionalGeneration

from evlgen.common.logs import quiet_libraries
from evlgen.common.precision import dtype_of
from evlgen.models.base_model import BaseModel

NEW_TOKENS = 20
IMAGE_TOKEN = 7  # any token: BLIP-2 marks with it where soft prompts go


def blip2(sizes: Sizes, num_soft_prompts: int, dtype: torch.dtype) -> Blip2ForConditionalGeneration:
    """BLIP-2 of these sizes, random weights."""
    config = Blip2Config(
        vision_config={
            "hidden_size": sizes.vision_dim,
            "intermediate_size": sizes.vision_intermediate,
            "num_hidden_layers": sizes.vision_kwargs["depth"],
            "num_attention_heads": sizes.vision_heads,
            "image_size": sizes.image_size,
            "patch_size": sizes.vision_kwargs.get("patch_size", 14),
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
    """Ours and BLIP-2's: (images, beams) -> number of captions."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype_of(precision, device)
    model = our_model(sizes, folder, precision, device).to(device).eval()
    num_soft_prompts = model.connector.num_soft_prompts(model.vision.num_tokens)
    return captioners(model, blip2(sizes, num_soft_prompts, dtype).to(device), dtype)


def captioners(
    model: BaseModel, other: Blip2ForConditionalGeneration, dtype: torch.dtype
) -> tuple[Callable, Callable]:
    """As `generators`, of models that are built already."""
    device, num_soft_prompts = model.device, other.config.num_query_tokens
    prompt = torch.tensor([[IMAGE_TOKEN] * num_soft_prompts + [2]], device=device)

    def ours(images: torch.Tensor, beams: int) -> int:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            texts = model.generate(
                {"image": images}, num_beams=beams, max_length=NEW_TOKENS, min_length=NEW_TOKENS
            )
        return len(texts)

    @torch.no_grad()
    def theirs(images: torch.Tensor, beams: int) -> int:
        ids = other.generate(
            pixel_values=images.to(device, dtype),
            input_ids=prompt.expand(len(images), -1),
            num_beams=beams,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
        )
        if ids.shape[1] not in (NEW_TOKENS, NEW_TOKENS + prompt.shape[1]):
            raise SystemExit(f"BLIP-2 wrote {ids.shape[1]} tokens, not {NEW_TOKENS}: no figure")
        return len(ids)

    return ours, theirs


def language_generators(sizes: Sizes, folder: Path) -> tuple[Callable, Callable]:
    """Our language model's and transformers' ``generate`` over the same weights: (soft prompts, beams) ->
    texts, which must be the same."""
    model = our_model(sizes, folder, "fp32", torch.device("cpu")).eval().language
    other = AutoModelForCausalLM.from_pretrained(folder / "language", attn_implementation="sdpa").eval()
    start = torch.tensor([[model.tokenizer.bos_token_id]])

    def ours(soft_prompts: torch.Tensor, beams: int) -> list[str]:
        prompts = [""] * len(soft_prompts)
        return model.generate(
            soft_prompts, prompts, num_beams=beams, max_length=NEW_TOKENS, min_length=NEW_TOKENS
        )

    @torch.no_grad()
    def theirs(soft_prompts: torch.Tensor, beams: int) -> list[str]:
        text = other.get_input_embeddings()(start).expand(len(soft_prompts), -1, -1)
        ids = other.generate(
            inputs_embeds=torch.cat([soft_prompts, text], dim=1),
            attention_mask=torch.ones(len(soft_prompts), soft_prompts.shape[1] + 1, dtype=torch.long),
            num_beams=beams,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            eos_token_id=model.end_token_id,
            pad_token_id=model.tokenizer.pad_token_id,
        )
        return [text.strip() for text in model.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    return ours, theirs


def measure(
    what: str, makers: tuple[Callable, Callable], inputs: torch.Tensor, beams: int, rounds: int
) -> None:
    """Prints both times, their ratio and captions per second."""
    print(f"{what}, batch {len(inputs)}, {f'beam {beams}' if beams > 1 else 'greedy'}")
    one, two = (partial(make, inputs, beams) for make in makers)
    found = compare(one, two, rounds, 1, names=("ours", "transformers")).show()
    rates = [len(inputs) / side.median for side in (found.ours, found.other)]
    print(f"  captions per second: {rates[0]:.2f} against {rates[1]:.2f}")


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
        whole = generators(sizes, Path(name), args.precision)
        language = language_generators(sizes, Path(name))
    for batch in args.batch:
        images = torch.randn(batch, 3, sizes.image_size, sizes.image_size)
        soft_prompts = torch.randn(batch, 29, sizes.language_dim)
        for beams in args.beams:
            measure(f"images to captions, {args.precision}", whole, images, beams, args.rounds)
            measure("soft prompts to captions, fp32", language, soft_prompts, beams, args.rounds)


if __name__ == "__main__":
    main()
