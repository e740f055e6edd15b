"""Peak memory of a training step on videos with the encoder's activations recomputed, against kept ones.

A frozen ViT of 39 blocks with temporal attention in each, a TomeFormer and an OPT, random weights. Each step
runs in a process of its own; both must give the same loss and the same gradient norm.

    python benchmarks/video_memory.py [--frames 4] [--batch 4]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from harness import InProcess, compare_processes

from evlgen.common.logs import quiet_libraries
from evlgen.common.registry import registry
from evlgen.files.io import PACKAGE_ROOT
from evlgen.models.vision.temporal import temporal_modules

CAPTION = "a man riding a wave on top of a surfboard"


def make_step(grad_checkpoint: bool | str, frames: int, batch: int) -> Callable[[], Any]:
    """A forward and backward pass; it returns the loss and the norm of the gradient."""
    quiet_libraries()
    torch.manual_seed(0)
    model = registry.get_model_class("evlgen_video_opt").from_config(
        {
            "arch": "evlgen_video_opt",
            "vision": {
                "name": "vit_small_patch16_224",
                "kwargs": {"depth": 39},  # as deep as EVA-CLIP-g
                "pretrained": False,
                "precision": "fp32",
                "temporal": {"form": "average"},
                "grad_checkpoint": grad_checkpoint,
            },
            "connector": {"name": "tomeformer", "num_layers": 6, "r": 19, "hidden_size": 384}
            | {"num_attention_heads": 6, "intermediate_size": 1536},
            "language": {"name": str(PACKAGE_ROOT / "assets/shapes/language"), "precision": "fp32"},
        }
    )
    for module in temporal_modules(model.vision):
        torch.nn.init.constant_(module.alpha, 0.1)
    model.train()
    videos = torch.randn(batch, 3, frames, 224, 224)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    def step() -> torch.Tensor:
        torch.manual_seed(1)
        model.zero_grad()
        loss = model({"image": videos.to(device), "text_input": [CAPTION] * batch})["loss"]
        loss.backward()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        return torch.stack([loss.detach(), torch.stack(norms).norm()]).cpu()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    sizes = {"frames": args.frames, "batch": args.batch}
    for name, how in (("recomputed", True), ("recomputed, offloaded", "offload")):
        print(f"{args.batch} videos of {args.frames} frames, activations {name}", flush=True)
        ours = InProcess(name, make_step, {"grad_checkpoint": how, **sizes})
        kept = InProcess("kept", make_step, {"grad_checkpoint": False, **sizes})
        compare_processes(ours, kept, args.rounds, warm_up=1).show()


if __name__ == "__main__":
    main()
