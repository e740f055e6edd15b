"""``python -m evlgen sweep``."""

from __future__ import annotations

import argparse

from evlgen.commands.compare import add_run_settings, run_comparison

HELP = "train with each of several values of one key: quality and training time"
PARENT = "output/sweep"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "axis", metavar="KEY=VALUE,VALUE", help="the key and its values: model.connector.r=0,8,19"
    )
    parser.add_argument("--cfg-path", required=True, help="project file; or first.yaml+second.yaml")
    parser.add_argument(
        "--budget",
        metavar="AMOUNT",
        help="training of each run, such as 120s or 500it (default: the project file's own length)",
    )
    add_run_settings(parser, PARENT)


def run(args: argparse.Namespace) -> int:
    from evlgen.comparison.parsing import Axis

    axis = Axis.parse(args.axis, "sweep")
    return run_comparison(args, [axis], ["sweep", args.axis], PARENT, swept=axis.key)
