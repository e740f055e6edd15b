"""``python -m evlgen data pack``."""

from __future__ import annotations

import argparse
from pathlib import Path

from evlgen.commands.arguments import add_run_arguments, allow_downloads, positive

HELP = "write a dataset of captioned files into webdataset shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument(
        "--dataset", metavar="NAME", help="which of the project's datasets, where it has several"
    )
    parser.add_argument("--split", default="train", help="which of its splits (default: train)")
    parser.add_argument("--to", required=True, metavar="DIR", help="the folder of the shards")
    parser.add_argument(
        "--samples-per-shard", type=positive, default=1000, metavar="N", help="(default: 1000)"
    )


def run(args: argparse.Namespace) -> int:
    from evlgen.assemble import ready_builders
    from evlgen.config.config import Config
    from evlgen.config.consent import check_project
    from evlgen.config.yaml_io import dump_yaml
    from evlgen.datasets.packing import pack

    cfg = Config.load(args.cfg_path, args.options, args.plugins)
    check_project(cfg, allow_downloads(args))
    builders = ready_builders(cfg)
    name = _chosen(args.dataset, list(builders))
    dataset = builders[name].get_split(args.split)
    packed = pack(dataset, Path(args.to).expanduser().absolute(), args.samples_per_shard)
    left_out = f"; {packed.left_out} could not be read and are left out" if packed.left_out else ""
    left_out += f"; {packed.bad_rows} rows make no sample and are left out" if packed.bad_rows else ""
    print(f"# {packed.samples} samples with {packed.captions} captions{left_out}. To train on them:")
    shards = {"data_type": f"{dataset.media.what}s", "build_info": {"storage": packed.storage}}
    print(dump_yaml({"datasets": {"web_shards": shards}}), end="")
    return 0


def _chosen(name: str | None, known: list[str]) -> str:
    from evlgen.common.errors import ConfigError, did_you_mean

    if name is None and len(known) == 1:
        return known[0]
    if name not in known:
        hint = "" if name is None else did_you_mean(name, known)
        wrong = "which dataset?" if name is None else f"the project has no dataset '{name}'."
        raise ConfigError(f"--dataset: {wrong}{hint} It has: {', '.join(known)}.")
    return name
