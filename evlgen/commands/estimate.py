"""``python -m evlgen estimate``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from evlgen.commands.arguments import add_run_arguments

if TYPE_CHECKING:
    from evlgen.config.config import Config
    from evlgen.estimate import Estimate

HELP = "what training a project costs, before it is started: memory by part, samples a second, hours"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument(
        "--rate",
        type=float,
        metavar="TFLOPS",
        help="of matrix products on that card; else measured here",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="what that card computes in; else as this machine"
    )
    parser.add_argument("--text-tokens", type=int, default=16, help="of a text, about (default 16)")
    parser.add_argument("--frames", type=int, default=8, help="of a video (default 8)")


def run(args: argparse.Namespace) -> int:
    from evlgen.config.config import load_stages

    stages = load_stages(args.cfg_path, args.options, args.plugins)

    from evlgen.common.logs import quiet_libraries

    quiet_libraries()
    for cfg in stages:
        if cfg.stage is not None:
            print(f"{cfg.stage.name}:")
        _report(cfg, args)
    return 0


def _report(cfg: Config, args: argparse.Namespace) -> None:
    from evlgen.estimate import estimate, measured_rate

    precision = args.precision or cfg.run.precision
    together = any(section.get("captions_together") for section in cfg.sections.values())
    num_texts = 5 if together else 1
    if cfg.run.task == "captioning_scst":
        num_texts = cfg.run.scst_samples
    has_average = cfg.run.ema_decay is not None
    found = estimate(cfg.model, precision, args.text_tokens, num_texts, args.frames, has_average)
    rate = args.rate * 1e12 if args.rate else measured_rate(precision)
    print("\n".join(lines(found, cfg, rate, measured=not args.rate)))


def lines(found: Estimate, cfg: Config, rate: float, measured: bool) -> list[str]:
    """The report."""
    from evlgen.estimate import REACHED

    run, batch = cfg.run, cfg.run.batch_size_train
    table = [f"{'':<11}{'frozen':>10}{'trained':>10}{'memory':>11}{'forward of a sample':>22}"]
    for name, part in found.parts.items():
        frozen, trained = _millions(part.frozen), _millions(part.trained)
        numbers = f"{_gigabytes(part.bytes):>11}{part.forward / 1e9:>16.1f} GMACs"
        table.append(f"{name:<11}{frozen:>10}{trained:>10}{numbers}")
    flops = found.flops_kept if run.cache_vision else found.flops
    fastest = rate / flops
    step = [
        f"a sample: {found.num_soft_prompts} soft prompts, {found.num_text_tokens} tokens learned; "
        f"a batch of {batch} keeps {_gigabytes(found.kept(batch))} for the backward pass",
        f"memory at the peak: about {_gigabytes(found.memory(batch))}, and what libraries take themselves",
        f"operations: {flops / 1e9:.1f} GFLOP a sample"
        + (" (vision tokens kept: run.cache_vision)" if run.cache_vision else ""),
        f"speed: {_count(fastest)} samples/s if all were matrix products at "
        f"{rate / 1e12:.3g} TFLOP/s ({'measured here' if measured else '--rate'}); "
        f"{_count(REACHED * fastest)} at the half that training steps reach",
    ]
    return [*table, *step, *_length(run, batch, REACHED * fastest)]


def _length(run: Any, batch: int, speed: float) -> list[str]:
    if run.max_seconds:
        return [f"the run: {_hours(run.max_seconds)}, about {_count(run.max_seconds * speed)} samples"]
    if run.max_iters:
        samples = run.max_iters * batch
        return [f"the run: {samples:,} samples in {run.max_iters:,} iterations, {_hours(samples / speed)}"]
    return [f"the run: {run.max_epoch} epochs; a million samples take {_hours(1e6 / speed)}"]


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _millions(count: int) -> str:
    return "-" if not count else f"{count / 1e6:,.1f} M"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:,.0f} min"
