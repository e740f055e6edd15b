"""Trains the bundled vision encoder of the Shapes world: a small timm ViT that names attributes, and never
sees a caption.

Every patch token says which kind, colour, size, row and column of shape covers its patch, if any; the class
token says which kinds and colours are in the image and how many shapes. All read-outs are linear and thrown
away afterwards.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import timm
import torch
from recipe import adamw, logger, report, save_half, start, train
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from evlgen.datasets.shapes.world import COLOURS, COLUMNS, KINDS, ROWS, SIZES, Scene, coverage, draw, scene

VISION_NAME = "vit_tiny_patch16_224"
VISION_KWARGS = dict(
    img_size=64,
    patch_size=8,
    embed_dim=128,
    depth=4,
    num_heads=4,
    mlp_ratio=3.0,
    num_classes=0,
    class_token=True,
)
ATTRIBUTES = {"kind": KINDS, "colour": tuple(COLOURS), "size": SIZES, "row": ROWS, "column": COLUMNS}
COVERED, UNCLEAR = 0.1, -100  # a patch covered by less than this share, but by something, is not asked about


class ReadOuts(nn.Module):
    """Linear read-outs: one per attribute on patch tokens (class 0: nothing), one multi-label on the class
    token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.ModuleDict({name: nn.Linear(width, 1 + len(v)) for name, v in ATTRIBUTES.items()})
        self.image = nn.Linear(width, len(KINDS) + len(COLOURS) + 3)


def patch_labels(item: Scene) -> np.ndarray:
    """For every attribute and patch the covering shape's class: int64 [attributes, 64], 0 for nothing."""
    covered = coverage(item).reshape(len(item.shapes), -1)
    owner, amount = covered.argmax(axis=0), covered.max(axis=0)
    labels = np.array(
        [[1 + values.index(getattr(s, name)) for s in item.shapes] for name, values in ATTRIBUTES.items()]
    )[:, owner]
    labels[:, amount < COVERED] = UNCLEAR
    labels[:, amount == 0] = 0
    return labels


def image_labels(item: Scene) -> np.ndarray:
    """Which kinds, colours and which number of shapes are there: float32 [6 + 8 + 3] of 0 and 1."""
    kinds, colours = {s.kind for s in item.shapes}, {s.colour for s in item.shapes}
    counts = [len(item.shapes) == n for n in (1, 2, 3)]
    return np.array([k in kinds for k in KINDS] + [c in colours for c in COLOURS] + counts, dtype=np.float32)


def batch(split: str, first: int, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels [B, 3, 64, 64] in -1..1, patch labels [B, attributes, 64], image labels [B, 17]."""
    scenes = [scene(split, i, seed) for i in range(first, first + size)]
    pixels = torch.from_numpy(np.stack([draw(s) for s in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1
    patches = torch.from_numpy(np.stack([patch_labels(s) for s in scenes]))
    return pixels, patches, torch.from_numpy(np.stack([image_labels(s) for s in scenes]))


def attribute_loss(
    vision: nn.Module, heads: ReadOuts, pixels: Tensor, patches: Tensor, image: Tensor
) -> Tensor:
    """Cross entropy over patches, those with a shape and those without weighing the same, plus the class
    token's."""
    tokens = vision.forward_features(pixels)  # [B, 65, C]
    loss = binary_cross_entropy_with_logits(heads.image(tokens[:, 0]), image)
    for i, head in enumerate(heads.patch.values()):
        label = patches[:, i].flatten()
        each = cross_entropy(head(tokens[:, 1:]).flatten(0, 1), label, ignore_index=UNCLEAR, reduction="none")
        loss = loss + each[label > 0].mean() + 0.5 * each[label == 0].mean()
    return loss


@torch.no_grad()
def accuracies(vision: nn.Module, heads: ReadOuts, seed: int, images: int = 500) -> dict[str, float]:
    """Fraction of right patch labels among patches with a shape, per attribute, on held-out images; and of
    empty ones."""
    vision.eval()
    pixels, patches, image = batch("val", 0, images, seed)
    tokens = vision.forward_features(pixels)
    right = {}
    for i, (name, head) in enumerate(heads.patch.items()):
        label, guess = patches[:, i], head(tokens[:, 1:]).argmax(-1)
        right[name] = (guess == label)[label > 0].float().mean().item()
        right["empty"] = (guess == label)[label == 0].float().mean().item()
    right["image"] = ((heads.image(tokens[:, 0]) > 0) == (image > 0)).all(1).float().mean().item()
    return {name: round(value, 4) for name, value in right.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder that gets vision.safetensors")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    start(args.seed, args.threads)
    vision = timm.create_model(VISION_NAME, pretrained=False, **VISION_KWARGS)
    heads = ReadOuts(vision.embed_dim)
    vision.train()
    minutes = train(
        [adamw([*vision.parameters(), *heads.parameters()], args.lr)],
        lambda step: attribute_loss(
            vision, heads, *batch("train", step * args.batch_size, args.batch_size, args.seed)
        ),
        args.steps,
    )
    save_half(vision.state_dict(), args.output / "vision.safetensors")
    parameters = sum(p.numel() for p in vision.parameters())
    logger.info("vision encoder: %d parameters", parameters)
    report(
        args.output / "vision.json",
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        minutes=round(minutes, 1),
        parameters=parameters,
        kwargs=VISION_KWARGS,
        accuracy=accuracies(vision, heads, args.seed),
    )


if __name__ == "__main__":
    main()
