"""``python -m evlgen data check``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from evlgen.commands.arguments import add_run_arguments

if TYPE_CHECKING:
    from collections.abc import Callable

    from evlgen.common.config import Config

HELP = "read every sample of a project's datasets: counts, what is broken, text lengths, contact sheets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument(
        "--splits", nargs="+", metavar="SPLIT", help="splits to look at; otherwise all that are here"
    )
    parser.add_argument("--num-workers", type=int, help="processes that read; otherwise run.num_workers")
    parser.add_argument(
        "--to", metavar="DIR", help="folder of the report; otherwise `check` below run.output_dir"
    )


def run(args: argparse.Namespace) -> int:
    import json
    import os
    from pathlib import Path

    from evlgen.assemble import ready_builders
    from evlgen.common.config import Config
    from evlgen.common.io import write_atomically
    from evlgen.datasets.checking import check_split, find_shared, told, write_sheet, write_skipped
    from evlgen.datasets.stream import StreamDataset

    cfg = Config.load(args.cfg_path, args.options, args.plugins)
    builders = ready_builders(cfg)
    folder = Path(os.path.expanduser(args.to or os.path.join(cfg.run.output_dir, "check")))
    workers = cfg.run.num_workers if args.num_workers is None else args.num_workers
    count_tokens, unit = _counter(cfg)
    limits = _limits(cfg) if unit == "tokens" else {}
    reports = []
    for name, split in _wanted(builders, args.splits):
        dataset = builders[name].get_split(split)
        if isinstance(dataset, StreamDataset):
            dataset = dataset.listed()
        report = check_split(f"{name}/{split}", dataset, count_tokens, workers, cfg.run.seed)
        reports.append(report)
        print("\n".join(told(report, limits, unit)), flush=True)
        if write_sheet(report, dataset, sheet := folder / f"{name}_{split}.png"):
            print(f"  some of them: {sheet}", flush=True)
    for line in find_shared(reports):
        print(line)
    write_skipped(reports, folder / "skipped.jsonl")
    content = {report.name: report.to_json(limits, unit) for report in reports}
    write_atomically(folder / "report.json", json.dumps(content, indent=1))
    print(f"report: {folder / 'report.json'}; broken samples: {folder / 'skipped.jsonl'}")
    too_many = [r for r in reports if len(r.skipped) > cfg.run.max_skipped_share * r.num_samples]
    for report in too_many:
        share = len(report.skipped) / report.num_samples
        print(
            f"{report.name}: {share:.1%} are broken, more than run.max_skipped_share "
            f"({cfg.run.max_skipped_share:.1%}) allows: a run would stop"
        )
    return 1 if too_many else 0


def _wanted(builders: dict, splits: list[str] | None) -> list[tuple[str, str]]:
    """(dataset, split) pairs to look at: those named, or all whose files are here. What is left out is said.

    Raises:
        ConfigError: no dataset has a split that was named.
        DataError: nothing is here.
    """
    from evlgen.common.errors import ConfigError, DataError, did_you_mean

    known = sorted({split for builder in builders.values() for split in builder.splits})
    for split in splits or ():
        if split not in known:
            raise ConfigError(
                f"--splits: no dataset has a split '{split}'.{did_you_mean(split, known)} Splits: "
                f"{', '.join(known)}."
            )
    wanted, missing = [], []
    for name, builder in builders.items():
        for split in builder.splits:
            if splits and split not in splits:
                continue
            lines = builder.missing([split])
            missing += lines
            wanted += [] if lines else [(name, split)]
    missing = list(dict.fromkeys(missing))
    if not wanted or (splits and missing):
        raise DataError("this data is not on this machine:\n" + "\n".join(f"  - {line}" for line in missing))
    for line in missing:
        print(f"not looked at: {line}")
    return wanted


def _counter(cfg: Config) -> tuple[Callable[[str], int], str]:
    """How texts are measured: in tokens of the language model where its tokenizer is here, else in words."""
    from evlgen.common.hub import missing_model
    from evlgen.models.language.loading import find_folder, read_tokenizer

    text = cfg.model.get("text") or {}
    name = (cfg.model.get("language") or {}).get("name") or text.get("tokenizer")
    if not name or missing_model(name):
        print(f"texts are counted in words: the tokenizer of {name} is not on this machine")
        return lambda text: len(text.split()), "words"
    tokenizer = read_tokenizer(name, find_folder(name))
    return lambda text: len(tokenizer(text).input_ids), "tokens"


def _limits(cfg: Config) -> dict[str, int]:
    """How many tokens of each text of a sample the model reads."""
    read = cfg.model.get("max_txt_len")
    learned = cfg.model.get("max_output_txt_len") or read
    limits = {"text_input": read, "text_output": learned}
    return {key: limit for key, limit in limits.items() if limit is not None}
