"""What two processes cost: a training step with the exchange of gradients against the same step without.

    torchrun --standalone --nproc-per-node 2 benchmarks/ddp.py [--batch 4] [--rounds 7] [--small]

All processes do each way at the same time and in turn, the same work in each; a step is as long as that of
the slowest. Ours (DDP, buckets that are exchanged while the backward pass goes on) is measured against no
exchange and against one exchange after the backward pass; with four batches a step, which exchange once,
against an exchange after each batch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from harness import spread
from step import LEARNING_RATE, WEIGHT_DECAY, batches, our_model, write_weights
from textbook import Sizes

from evlgen.common.logs import quiet_libraries
from evlgen.config.run_config import RunConfig
from evlgen.runners.distribution import Distribution, make_accelerator
from evlgen.runners.optimizer import build_optimizer

ACCUMULATED = 4
#: A TomeFormer of 28 million weights: 113 MB of gradients.
SIZES = dataclasses.replace(
    Sizes(layers=4, language_layers=2, vocabulary=5000, dropout=0.0),
    vision_kwargs={"patch_size": 14, "embed_dim": 384, "depth": 2, "num_heads": 6},
)
SMALL = dataclasses.replace(
    SIZES,
    **{"hidden": 128, "heads": 4, "intermediate": 512, "vision_dim": 32, "image_size": 56, "r": 2},
    **{"language_layers": 1, "language_dim": 32, "language_heads": 2, "vocabulary": 1000},
    vision_kwargs={"patch_size": 14, "embed_dim": 32, "depth": 1, "num_heads": 2},
)


class Steps:
    """The ways to make a step, over the same model on all processes."""

    def __init__(self, sizes: Sizes, batch: int, folder: Path) -> None:
        run = RunConfig(max_iters=1, precision="fp32")
        self.accelerator = make_accelerator(run)
        self.model = our_model(sizes, folder, "fp32", self.accelerator.device)
        self.distribution = Distribution(self.accelerator, self.model, run)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.model, LEARNING_RATE, WEIGHT_DECAY)
        self.distribution.wrapped.train()
        self.batches = batches(sizes, batch, self.accelerator.device)

    def backward(self, exchange: bool) -> None:
        """One batch's forward and backward pass."""
        with contextlib.nullcontext() if exchange else self.distribution.accumulating():
            self.accelerator.backward(self.distribution.wrapped(next(self.batches))["loss"])

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def ddp(self) -> None:
        self.backward(exchange=True)
        self.update()

    def no_exchange(self) -> None:
        self.backward(exchange=False)
        self.update()

    def exchange_afterwards(self) -> None:
        self.backward(exchange=False)
        gradients = torch.cat([p.grad.flatten() for p in self.trained])
        dist.all_reduce(gradients)
        gradients /= self.accelerator.num_processes
        for p, own in zip(self.trained, gradients.split([p.numel() for p in self.trained]), strict=True):
            p.grad.copy_(own.view_as(p))
        self.update()

    def accumulated(self) -> None:
        for left in reversed(range(ACCUMULATED)):
            self.backward(exchange=not left)
        self.update()

    def accumulated_exchanging(self) -> None:
        for _ in range(ACCUMULATED):
            self.backward(exchange=True)
        self.update()


def measure(calls: dict[str, Callable[[], None]], rounds: int, is_first: bool) -> None:
    """Prints the seconds of each, in turn, and how many times those of the first."""
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(2 + rounds):
        for name in calls if number % 2 else reversed(calls):
            dist.barrier()
            started, worked = time.perf_counter(), time.process_time()
            calls[name]()
            times = torch.tensor([time.perf_counter() - started, time.process_time() - worked])
            dist.all_reduce(times, dist.ReduceOp.MAX)
            if number > 1:
                wall[name].append(times[0].item())
                cpu[name].append(times[1].item())
    if not is_first:
        return
    base = next(iter(calls))
    width = max(map(len, calls))
    for name in calls:
        ratios = [
            statistics.median(a / b for a, b in zip(t[name], t[base], strict=True)) for t in (wall, cpu)
        ]
        print(f"  {name:<{width}}  {spread(wall[name])}   {ratios[0]:.3f}, of processor time {ratios[1]:.3f}")


def exchanges(steps: Steps) -> None:
    """Prints when buckets are exchanged: in the backward pass of a step, and of an accumulated one. Comes
    last, as DDP does not give its hook back."""
    began: list[float] = []

    def hook(state, bucket):  # DDP refuses annotations that are text
        began.append(time.perf_counter())
        sent = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return sent.get_future().then(lambda done: done.value()[0])

    steps.distribution.wrapped.register_comm_hook(None, hook)
    loss = steps.distribution.wrapped(next(steps.batches))["loss"]
    started = time.perf_counter()
    steps.accelerator.backward(loss)
    ended = time.perf_counter()
    steps.update()
    buckets, part = len(began), (began[0] - started) / (ended - started)
    began.clear()
    steps.accumulated()
    if steps.accelerator.is_main_process:
        print(f"gradients: {buckets} buckets, the first exchanged after {part:.2f} of the backward pass")
        print(f"{ACCUMULATED} batches a step: {len(began)} buckets exchanged")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="a model of some seconds, for a dry run")
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    sizes = SMALL if args.small else SIZES
    with tempfile.TemporaryDirectory() as folder:
        write_weights(sizes, Path(folder))
        steps = Steps(sizes, args.batch, Path(folder))
    is_first = steps.accelerator.is_main_process
    if is_first:
        count = sum(p.numel() for p in steps.trained)
        print(
            f"{dist.get_world_size()} processes, batch {args.batch} each, {count / 1e6:.1f} million weights"
        )
    calls = {"no exchange": steps.no_exchange, "ours": steps.ddp, "afterwards": steps.exchange_afterwards}
    measure(calls, args.rounds, is_first)
    if is_first:
        print(f"{ACCUMULATED} batches a step")
    calls = {"ours": steps.accumulated, "after each batch": steps.accumulated_exchanging}
    measure(calls, args.rounds, is_first)
    exchanges(steps)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
