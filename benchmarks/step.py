"""A training step of ours against the textbook step (`textbook`), each in a process of its own.

    python benchmarks/step.py [--precision fp32 bf16] [--rounds 7] [--batch 4]

Sizes: ViT 384 x 12 at 224/14 px (257 tokens), a BERT-base TomeFormer with r = 19, OPT-125m's shape with its
50,272 words; random weights, the same in both. The textbook computes in float32, as the published code does
on a CPU. First, with dropout off and at fixed weights, both must have the same losses and gradient norms on
the same batches; then they are timed with the published dropout. A step is forward, backward, the
gradient's norm (which a run watches, and the textbook does not) and AdamW.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from harness import InProcess, check_equal, compare_processes, run_processes
from safetensors.torch import load_file, save_file
from textbook import Sizes, Textbook
from transformers import AutoTokenizer

from evlgen.common.io import PACKAGE_ROOT
from evlgen.common.logs import quiet_libraries
from evlgen.common.registry import registry
from evlgen.datasets.shapes.captions import captions
from evlgen.datasets.shapes.world import scene
from evlgen.models.base_model import BaseModel
from evlgen.runners.distribution import make_accelerator
from evlgen.runners.optimizer import build_optimizer
from evlgen.runners.run_config import RunConfig
from evlgen.runners.spread import total_norm

TOKENIZER = PACKAGE_ROOT / "assets/shapes/language"
LEARNING_RATE, WEIGHT_DECAY = 1e-5, 0.05
# Within so much of each other: float32 must agree, bf16 has eight bits. Pairs of tokens that are equally
# alike but for rounding merge differently now and then, which the gradient shows more than the loss.
LOSSES = {"fp32": 1e-5, "bf16": 1e-2}
NORMS = {"fp32": 1e-2, "bf16": 5e-2}


def write_weights(sizes: Sizes, folder: Path) -> None:
    """Random weights: ``published.safetensors`` and the folder ``language``."""
    torch.manual_seed(0)
    model = Textbook(sizes, AutoTokenizer.from_pretrained(TOKENIZER))
    model.opt_model.save_pretrained(folder / "language")
    model.tokenizer.save_pretrained(folder / "language")
    save_file(
        {k: v for k, v in model.state_dict().items() if not k.startswith("opt_model.")},
        folder / "published.safetensors",
    )


def batches(sizes: Sizes, batch: int) -> Callable[[], dict]:
    """Pictures of noise and captions of the Shapes world, a new batch at each call."""
    generator = torch.Generator().manual_seed(1)
    texts = iter(range(10**9))

    def next_batch() -> dict:
        image = torch.randn(batch, 3, sizes.image_size, sizes.image_size, generator=generator)
        return {
            "image": image,
            "text_input": [captions(scene("train", next(texts)))[0] for _ in range(batch)],
        }

    return next_batch


def textbook_step(sizes: Sizes, batch: int, folder: Path) -> Callable[[], float]:
    """The textbook's step, in float32."""
    from transformers import OPTForCausalLM

    with torch.device("meta"):
        model = Textbook(sizes, AutoTokenizer.from_pretrained(TOKENIZER))
    model.opt_model = OPTForCausalLM.from_pretrained(
        folder / "language", attn_implementation="eager", dropout=sizes.dropout
    )
    model.opt_model.requires_grad_(False)
    model.load_state_dict(load_file(folder / "published.safetensors"), strict=False, assign=True)
    embeddings = model.VLconnector.embeddings
    embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1])[None]
    embeddings.token_type_ids = torch.zeros_like(embeddings.position_ids)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
    )
    next_batch = batches(sizes, batch)

    def step() -> float:
        loss = model(next_batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def check() -> list[float]:
        loss = model(next_batch())
        loss.backward()
        norm = total_norm([p.grad for p in trained])
        optimizer.zero_grad()
        return [loss.item(), norm]

    return step if sizes.dropout else check


def our_model(sizes: Sizes, folder: Path, precision: str, device: torch.device) -> BaseModel:
    """The same model, put together by this package."""
    model = registry.get_model_class("evlgen_opt").from_config(
        {
            "arch": "evlgen_opt",
            "checkpoint": str(folder / "published.safetensors"),
            "vision": {
                "name": sizes.vision,
                "image_size": sizes.image_size,
                "pretrained": False,
                "precision": precision,
                "kwargs": sizes.vision_kwargs,
            },
            "connector": {
                "name": "tomeformer",
                "num_layers": sizes.layers,
                "r": sizes.r,
                "hidden_size": sizes.hidden,
                "num_attention_heads": sizes.heads,
                "intermediate_size": sizes.intermediate,
                "hidden_dropout_prob": sizes.dropout,
                "attention_probs_dropout_prob": sizes.dropout,
            },
            "language": {"name": str(folder / "language"), "precision": precision},
        },
        device,
    )
    return model


def our_step(sizes: Sizes, batch: int, folder: Path, precision: str) -> Callable[[], float]:
    """Our step, as the runner makes it."""
    quiet_libraries()
    accelerator = make_accelerator(RunConfig(max_iters=1, precision=precision))
    model = our_model(sizes, folder, precision, accelerator.device)
    wrapped = accelerator.prepare_model(model.to(accelerator.device))
    wrapped.train()
    optimizer = build_optimizer(model, LEARNING_RATE, WEIGHT_DECAY)
    next_batch = batches(sizes, batch)

    def step() -> list[float]:
        loss = wrapped(next_batch())["loss"]
        accelerator.backward(loss)
        norm = total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if sizes.dropout:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return [loss.item(), norm]

    return step


def check_same_work(sizes: Sizes, batch: int, folder: Path, precision: str) -> None:
    """Raises `SystemExit` where losses or gradient norms differ."""
    sizes = dataclasses.replace(sizes, dropout=0.0)
    sides = run_processes(processes(sizes, batch, folder, precision), rounds=1, warm_up=2)
    for (loss, norm), (other_loss, other_norm) in zip(*(side.results for side in sides), strict=True):
        print(f"  loss {loss:.6f} / {other_loss:.6f}, norm of the gradient {norm:.4f} / {other_norm:.4f}")
        check_equal(loss, other_loss, LOSSES[precision])
        check_equal(norm, other_norm, NORMS[precision])


def processes(sizes: Sizes, batch: int, folder: Path, precision: str) -> tuple[InProcess, InProcess]:
    """Ours and the textbook's."""
    both = {"sizes": sizes, "batch": batch, "folder": folder}
    return (
        InProcess("ours", our_step, {**both, "precision": precision}),
        InProcess("textbook", textbook_step, both),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    quiet_libraries()
    sizes = Sizes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_weights(sizes, folder)
        for precision in args.precision:
            threads = torch.get_num_threads()
            print(f"{precision} against fp32 of the textbook, batch {args.batch}, {threads} threads")
            check_same_work(sizes, args.batch, folder, precision)
            ours, textbook = processes(sizes, args.batch, folder, precision)
            compare_processes(ours, textbook, args.rounds, tolerance=None).show()


if __name__ == "__main__":
    main()
