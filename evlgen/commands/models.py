"""``python -m evlgen models``."""

from __future__ import annotations

import argparse

from evlgen.commands.arguments import add_common

HELP = "list the architectures and their model types"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    from evlgen.common.plugins import load_plugins
    from evlgen.models.zoo import model_zoo

    load_plugins(args.plugins, None)
    print(model_zoo)
    return 0
