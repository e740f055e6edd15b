"""``python -m evlgen data``: what is done with a dataset before a run.

Each action has a file, ``data_<action>.py``, with ``HELP``, ``add_arguments(parser)`` and ``run(args)``.
"""

from __future__ import annotations

import argparse
import importlib

HELP = "look over a dataset, or write it into shards"

#: In the order in which ``--help`` shows them.
ACTIONS = ("check", "pack")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="data_action", required=True, metavar="ACTION")
    for name in ACTIONS:
        module = importlib.import_module(f"evlgen.commands.data_{name}")
        action = actions.add_parser(name, help=module.HELP)
        module.add_arguments(action)
        action.set_defaults(run_action=module.run)


def run(args: argparse.Namespace) -> int:
    return args.run_action(args)
