"""A captioner in plain PyTorch: no runner, no YAML, no registry. Read it from top to bottom.

    python examples/minimal.py                    # trains in minutes on two cores, captions a drawn image
    python examples/minimal.py --iterations 300 photo.png

A frozen vision encoder turns an image into 65 visual tokens. The connector, a TomeFormer, is all that
learns: it merges them into 17 soft prompts. A frozen language model reads these and writes the caption. Both
frozen parts come with the package; the training images, coloured shapes, are drawn in memory.

It is what ``python train.py --cfg-path projects/shapes/caption.yaml --options run.precision=fp32`` trains,
loss by loss (tests/test_minimal.py). The runner adds checkpoints, resuming, several GPUs, mixed precision,
validation, metrics and logs; docs/how-it-works.md follows one image through it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor, nn

from evlgen.datasets.shapes_dataset import ShapesCaptionDataset
from evlgen.loaders.data import BatchPlan, train_loader
from evlgen.models.connectors import ConnectorInputs, TomeFormer
from evlgen.models.language import OPTLanguageModel
from evlgen.models.vision import TimmEncoder
from evlgen.processors.image import BlipImageEvalProcessor
from evlgen.processors.text import BlipCaptionProcessor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Captioner(nn.Module):
    """Vision encoder -> connector -> language model. Only ``norm`` and ``connector`` are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = TimmEncoder(  # any timm model: TimmEncoder("vit_base_patch16_clip_224.openai")
            "vit_tiny_patch16_224",
            image_size=64,
            pretrained="evlgen://assets/shapes/vision.safetensors",
            kwargs={"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 3.0},
        )
        self.language = OPTLanguageModel("evlgen://assets/shapes/language", max_txt_len=48)
        self.vision.eval().requires_grad_(False)
        self.language.eval().requires_grad_(False)
        self.norm = nn.LayerNorm(self.vision.embed_dim)
        self.connector = TomeFormer(
            # soft prompts start at the scale of the word embeddings
            ConnectorInputs.behind(self.vision, self.language.embed_dim, self.language.embedding_rms()),
            num_layers=3,
            r=16,  # pairs of tokens that merge in each layer: 65 -> 49 -> 33 -> 17
            hidden_size=128,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )

    def soft_prompts(self, pixels: Tensor) -> Tensor:
        """[B, 3, 64, 64] -> [B, 17, C]."""
        with torch.no_grad():
            tokens = self.vision(pixels)  # [B, 65, 128]
        return self.connector(self.norm(tokens))

    def forward(self, pixels: Tensor, captions: list[str]) -> Tensor:
        """The mean next-token loss of the captions after the images' soft prompts."""
        loss, _num_tokens = self.language.loss(self.soft_prompts(pixels), captions)
        return loss

    @torch.no_grad()
    def caption(self, pixels: Tensor) -> list[str]:
        """[B, 3, 64, 64] -> B captions."""
        prompts = self.soft_prompts(pixels)
        return self.language.generate(prompts, [""] * len(prompts), num_beams=1, max_length=40)


def shapes(model: Captioner, split: str, size: int) -> ShapesCaptionDataset:
    """Images of the Shapes world with their captions, drawn when they are asked for."""
    vision = model.vision
    pixels = BlipImageEvalProcessor(vision.image_size, vision.image_mean, vision.image_std)
    return ShapesCaptionDataset(split, size, 0, pixels, BlipCaptionProcessor())


def make_optimizer(model: Captioner) -> torch.optim.AdamW:
    """AdamW over what is trained; biases and norms do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, fused=True)


def learning_rate(step: int, num_steps: int, warmup: int, peak: float = 2e-3, lowest: float = 2e-5) -> float:
    """Linear to ``peak`` during the warm-up, then half a cosine down to ``lowest``."""
    if step < warmup:
        return lowest + (peak - lowest) * step / warmup
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def train(
    model: Captioner, num_steps: int = 1600, batch_size: int = 64, warmup: int = 50, seed: int = 42
) -> Iterator[float]:
    """Trains the connector; yields the loss of each step."""
    dataset = shapes(model, "train", 20000)
    # a DataLoader whose every batch follows from the seed alone
    plan = BatchPlan([len(dataset)], batch_size, seed)
    batches = iter(train_loader({"shapes_caption": dataset}, plan, num_workers=0, pin_memory=False))
    optimizer = make_optimizer(model)
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, warmup)
        batch = next(batches)
        loss = model(batch["image"].to(DEVICE), batch["text_input"])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a captioner on the Shapes world.")
    parser.add_argument("images", nargs="*", help="files to caption; without any, held-out drawn images")
    parser.add_argument("--iterations", type=int, default=1600)
    args = parser.parse_args()
    torch.manual_seed(42)  # the connector's first weights
    model = Captioner().to(DEVICE)
    for step, loss in enumerate(train(model, args.iterations), start=1):
        if step % 50 == 0 or step == args.iterations:
            print(f"step {step}  loss {loss:.4f}", flush=True)
    held_out = shapes(model, "test", 6)
    images = [Image.open(file) for file in args.images] or [held_out.image(i) for i in range(6)]
    pixels = torch.stack([held_out.vis_processor(image) for image in images]).to(DEVICE)
    for name, caption in zip(args.images or range(6), model.caption(pixels), strict=True):
        print(f"{name}: {caption}" + ("" if args.images else f"   (true: {held_out.is_true(caption, name)})"))


if __name__ == "__main__":
    main()
