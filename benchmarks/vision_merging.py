"""Token merging inside the frozen vision encoder (``model.vision.tome_r``): what it saves, what it changes.

    python benchmarks/vision_merging.py [--model vit_base_patch16_224 --batch 4 --r 8] [--images 200]

Speed: an encoder of a published shape with random weights, with and without merging, in turn. These two do
not do the same work, which is the point, so what merging changes stands beside it: on the bundled Shapes
model, how far visual tokens that stayed alone are from those without merging, and how many captions of
held-out images are still true, with the bundled connector, which never saw merged tokens in training. The
distance is the cosine after the mean token, which all share, is taken off.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import transformers
from harness import compare
from PIL import Image
from torch import Tensor

from evlgen.common.logs import quiet_libraries
from evlgen.common.registry import registry
from evlgen.config.config import load_model_config
from evlgen.config.model_config import VisionConfig
from evlgen.datasets.shapes.checker import check
from evlgen.datasets.shapes.world import Scene, draw, scene
from evlgen.models.base_model import BaseModel
from evlgen.models.ops import use_fast_linear
from evlgen.models.token_merging import token_counts, unmerge
from evlgen.models.vision import VisionEncoder, build_vision_encoder
from evlgen.models.zoo import load_preprocess

RS = (0, 2, 4, 8)  # on Shapes: 65 tokens, 4 blocks


def random_encoder(name: str, r: int) -> VisionEncoder:
    """An encoder of a name's shape in float32, the same random weights for every r."""
    torch.manual_seed(0)
    cfg = VisionConfig(name, pretrained=False, precision="fp32", tome_r=r)
    encoder = build_vision_encoder(cfg).eval().requires_grad_(False)
    use_fast_linear(encoder)  # as a whole model does
    return encoder


@torch.no_grad()
def measure_speed(name: str, batch: int, r: int, rounds: int) -> None:
    merging, plain = random_encoder(name, r), random_encoder(name, 0)
    pixels = torch.randn(batch, 3, plain.image_size, plain.image_size)
    print(f"{name}, batch {batch}, {torch.get_num_threads()} threads, float32")
    print(f"  r = {r}: {plain.num_tokens} tokens -> {merging.num_tokens}")
    names = (f"r = {r}", "r = 0")
    compare(lambda: merging(pixels), lambda: plain(pixels), rounds, 1, tolerance=None, names=names).show()


def shapes_model(r: int) -> BaseModel:
    """The bundled model with r pairs merging in each block of its vision encoder."""
    cfg = load_model_config("evlgen_opt", "shapes", {"vision": {"tome_r": r}})
    return registry.get_model_class("evlgen_opt").from_config(cfg)


@torch.no_grad()
def measure_quality(count: int) -> None:
    scenes = [scene("test", i) for i in range(count)]
    plain = shapes_model(0)
    process = load_preprocess(plain)[0]["eval"]
    pixels = torch.stack([process(Image.fromarray(draw(s))) for s in scenes])
    original = plain.encode(pixels)
    for r in RS:
        details = shapes_model(r).vision.forward_details(pixels)
        tokens, merge_map = details["tokens"], details["merge_map"]
        put_back = unmerge(tokens, merge_map)  # each first token's value in its first place
        is_alone = token_counts(merge_map, tokens.shape[1]).gather(1, merge_map) == 1
        alone, merged = (mean_cosine(put_back, original, where) for where in (is_alone, ~is_alone))
        true, true_put_back = (true_captions(plain, each, scenes) for each in (tokens, put_back))
        share = is_alone.float().mean()
        print(
            f"  r = {r}: {tokens.shape[1]} visual tokens; cosine {alone:.4f} of the {share:.0%} alone, "
            f"{merged:.4f} of the others; true captions {true:.3f}, put back {true_put_back:.3f}",
            flush=True,
        )


def true_captions(model: BaseModel, tokens: Tensor, scenes: Sequence[Scene]) -> float:
    """The share of captions from visual tokens [B, N, C] that are true to the scene, nothing left out."""
    captions = [
        text
        for part in tokens.split(50)
        for text in model.generate({"visual_tokens": part}, num_beams=1, max_length=40)
    ]
    return sum(check(text, s).true for text, s in zip(captions, scenes, strict=True)) / len(scenes)


def mean_cosine(tokens: Tensor, original: Tensor, where: Tensor) -> float:
    """Of tokens [B, N, C] to the original ones, off the mean token that all share."""
    mean = original.mean((0, 1))
    return F.cosine_similarity(tokens - mean, original - mean, dim=-1)[where].mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224", help="a vision encoder's name")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--images", "--pictures", type=int, default=200, help="of the Shapes world; 0: speed alone"
    )
    args = parser.parse_args()
    quiet_libraries()
    transformers.utils.logging.disable_progress_bar()
    measure_speed(args.model, args.batch, args.r, args.rounds)
    if args.images:
        print(f"bundled Shapes model, {args.images} held-out images, greedy")
        measure_quality(args.images)


if __name__ == "__main__":
    main()
