"""A training step of ours against the textbook step (`textbook`), each in a process of its own.

    python benchmarks/step.py [--precision fp32 bf16] [--batch 4] [--rounds 7] [--profile]
    python benchmarks/step.py --published --batch 64 [--compile] [--profile]        (on a GPU)

Sizes: ViT 384 x 12 at 224/14 px (257 tokens), a BERT-base TomeFormer with r = 19, OPT-125m's shape with its
50,272 words; ``--published``: EVA-CLIP-g, the same TomeFormer, OPT-2.7b. Random weights, the same in both.
On a CPU the textbook computes in float32, as the published code does there; on a GPU in bf16 under
autocast, its frozen parts in bf16. First, with dropout off and at fixed weights, both must have the same
losses and gradient norms on the same batches; then they are timed with the published dropout. A step is
forward, backward, the gradient's norm (which a run watches, and the textbook does not) and AdamW.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from floor import profile
from harness import Comparison, InProcess, check_equal, compare_processes, run_processes
from safetensors.torch import load_file, save_file
from textbook import PUBLISHED, Sizes, Textbook
from torch import Tensor
from transformers import AutoTokenizer, OPTForCausalLM

from evlgen.common.logs import quiet_libraries
from evlgen.common.registry import registry
from evlgen.config.run_config import RunConfig
from evlgen.datasets.shapes.captions import captions
from evlgen.datasets.shapes.world import scene
from evlgen.files.io import PACKAGE_ROOT
from evlgen.loaders.data import to_device
from evlgen.models.base_model import BaseModel
from evlgen.runners.compilation import compile_blocks
from evlgen.runners.distribution import make_accelerator
from evlgen.runners.dtensor import total_norm
from evlgen.runners.optimizer import build_optimizer

TOKENIZER = PACKAGE_ROOT / "assets/shapes/language"
LEARNING_RATE, WEIGHT_DECAY = 1e-5, 0.05
# Within so much of each other: float32 must agree, bf16 has eight bits. Pairs of tokens that are equally
# alike but for rounding merge differently now and then, which the gradient shows more than the loss.
LOSSES = {"fp32": 1e-5, "bf16": 1e-2}
NORMS = {"fp32": 1e-2, "bf16": 5e-2}


def write_weights(sizes: Sizes, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Random weights: ``published.safetensors`` and the folder ``language``, frozen parts in a type."""
    torch.manual_seed(0)
    model = Textbook(sizes, AutoTokenizer.from_pretrained(TOKENIZER))
    model.opt_model.to(dtype).save_pretrained(folder / "language")
    model.tokenizer.save_pretrained(folder / "language")
    model.visual_encoder.to(dtype)
    rest = {k: v for k, v in model.state_dict().items() if not k.startswith("opt_model.")}
    save_file(rest, folder / "published.safetensors")


def batches(sizes: Sizes, batch: int, device: torch.device, count: int = 8) -> Iterator[dict[str, Any]]:
    """Images of noise and captions of the Shapes world, for ever the same few batches."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(count):
        image = torch.randn(batch, 3, sizes.image_size, sizes.image_size, generator=generator)
        texts = [captions(scene("train", number * batch + i))[0] for i in range(batch)]
        made.append(to_device({"image": image, "text_input": texts}, device))
    while True:
        yield from made


class TextbookStep:
    """The textbook's step."""

    def __init__(
        self, sizes: Sizes, folder: Path | None, precision: str, model: Textbook | None = None
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if precision == "bf16" and self.device.type == "cuda" else torch.float32
        self.model = (model or self._read(sizes, folder)).to(self.device).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
                {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
        )

    def _read(self, sizes: Sizes, folder: Path) -> Textbook:
        with init_empty_weights(include_buffers=False):  # EVA's k_bias is in no weights file
            model = Textbook(sizes, AutoTokenizer.from_pretrained(TOKENIZER))
        model.opt_model = OPTForCausalLM.from_pretrained(
            folder / "language", attn_implementation="eager", dropout=sizes.dropout, dtype=self.dtype
        )
        model.opt_model.requires_grad_(False)
        model.load_state_dict(load_file(folder / "published.safetensors"), strict=False, assign=True)
        return model

    def __call__(self, samples: dict[str, Any]) -> float:
        loss = self._backward(samples)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def check(self, samples: dict[str, Any]) -> list[float]:
        """The loss and the gradient's norm; weights stay as they are."""
        return _loss_and_norm(self._backward(samples), self.optimizer)

    def _backward(self, samples: dict[str, Any]) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(samples)
        loss.backward()
        return loss.detach()


class OurStep:
    """Our step, as the runner makes it."""

    def __init__(
        self,
        sizes: Sizes,
        folder: Path | None,
        precision: str,
        compiled: bool = False,
        model: BaseModel | None = None,
    ) -> None:
        quiet_libraries()
        self.accelerator = make_accelerator(RunConfig(max_iters=1, precision=precision))
        self.device = self.accelerator.device
        self.model = (model or our_model(sizes, folder, precision, self.device)).to(self.device)
        self.wrapped = self.accelerator.prepare_model(self.model)
        if compiled:
            compile_blocks(self.model)
        self.wrapped.train()
        self.optimizer = build_optimizer(self.model, LEARNING_RATE, WEIGHT_DECAY)

    def __call__(self, samples: dict[str, Any], meanwhile: Callable[[], None] = lambda: None) -> float:
        """A step; ``meanwhile`` is called where its backward pass is under way on a GPU."""
        loss = self._backward(samples)
        meanwhile()
        total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def check(self, samples: dict[str, Any]) -> list[float]:
        """The loss and the gradient's norm; weights stay as they are."""
        return _loss_and_norm(self._backward(samples), self.optimizer)

    def _backward(self, samples: dict[str, Any]) -> Tensor:
        loss = self.wrapped(samples)["loss"]
        self.accelerator.backward(loss)
        return loss.detach()


def our_model(sizes: Sizes, folder: Path, precision: str, device: torch.device) -> BaseModel:
    """The same model, put together by this package."""
    section = our_section(sizes, folder / "language", precision)
    return registry.get_model_class("evlgen_opt").from_config(
        {**section, "checkpoint": str(folder / "published.safetensors")}, device
    )


def our_section(sizes: Sizes, language: Path, precision: str) -> dict[str, Any]:
    """Its configuration."""
    return {
        "arch": "evlgen_opt",
        "max_txt_len": sizes.max_txt_len,
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
        "language": {"name": str(language), "precision": precision},
    }


def _loss_and_norm(loss: Tensor, optimizer: torch.optim.Optimizer) -> list[float]:
    norm = total_norm([p.grad for group in optimizer.param_groups for p in group["params"]])
    optimizer.zero_grad()
    return [loss.item(), norm]


def stepping(kind: type, batch: int, sizes: Sizes, check: bool = False, **options: Any) -> Callable[[], Any]:
    """What a process of its own calls: one step over the next batch."""
    step = kind(sizes, **options)
    following = batches(sizes, batch, step.device)
    return lambda: (step.check if check else step)(next(following))


def check_same_work(sizes: Sizes, batch: int, folder: Path, precision: str, compiled: bool = False) -> None:
    """Raises `SystemExit` where losses or gradient norms differ."""
    plain = dataclasses.replace(sizes, dropout=0.0)
    both = {"batch": batch, "sizes": plain, "check": True, "folder": folder, "precision": precision}
    sides = [
        InProcess("ours", stepping, {**both, "kind": OurStep, "compiled": compiled}),
        InProcess("textbook", stepping, {**both, "kind": TextbookStep}),
    ]
    ours, textbook = run_processes(sides, rounds=1, warm_up=2)
    for (loss, norm), (other_loss, other_norm) in zip(ours.results, textbook.results, strict=True):
        print(f"  loss {loss:.6f} / {other_loss:.6f}, norm of the gradient {norm:.4f} / {other_norm:.4f}")
        check_equal(loss, other_loss, LOSSES[precision])
        check_equal(norm, other_norm, NORMS[precision])


def measure(
    sizes: Sizes, batch: int, folder: Path, precision: str, rounds: int, compiled: bool = False
) -> Comparison:
    """Times both."""
    both = {"batch": batch, "sizes": sizes, "folder": folder, "precision": precision}
    ours = InProcess("ours", stepping, {**both, "kind": OurStep, "compiled": compiled})
    textbook = InProcess("textbook", stepping, {**both, "kind": TextbookStep})
    return compare_processes(ours, textbook, rounds, warm_up=3, tolerance=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--published", action="store_true", help="the published sizes: for a GPU")
    parser.add_argument("--compile", action="store_true", help="our step with torch.compile as well")
    parser.add_argument("--profile", action="store_true", help="our time against that of the products alone")
    args = parser.parse_args()
    quiet_libraries()
    sizes = PUBLISHED if args.published else Sizes()
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_weights(sizes, folder, torch.bfloat16 if args.published else torch.float32)
        for precision in args.precision or (["bf16"] if args.published else ["fp32", "bf16"]):
            for compiled in [False, True] if args.compile else [False]:
                how = ", compiled" if compiled else ""
                print(f"{precision}{how} against the textbook, batch {args.batch}, {device}", flush=True)
                check_same_work(sizes, args.batch, folder, precision, compiled)
                found = measure(sizes, args.batch, folder, precision, args.rounds, compiled).show()
                rates = [args.batch / side.median for side in (found.ours, found.other)]
                print(f"  samples per second: {rates[0]:.2f} against {rates[1]:.2f}", flush=True)
            if args.profile:
                step = OurStep(sizes, folder, precision)
                following = batches(sizes, args.batch, step.device)
                profile(lambda step=step, following=following: step(next(following)))


if __name__ == "__main__":
    main()
