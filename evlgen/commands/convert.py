"""``python -m evlgen convert``."""

from __future__ import annotations

import argparse

from evlgen.commands.arguments import add_common, add_options

HELP = "turn a published .pth, or BLIP-2, InstructBLIP or LLaVA in transformers' format, into ours, or back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="IN",
        help="a published .pth, a folder or hub id in transformers' format, or a folder of this project",
    )
    parser.add_argument("target", metavar="OUT", help="the folder, or the .pth, to write")
    parser.add_argument(
        "--to", choices=("own", "published", "transformers"), required=True, help="the layout of OUT"
    )
    parser.add_argument(
        "--cfg-path", help="YAML with the model section; without it the one that comes with IN is taken"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    add_options(parser)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    from evlgen.common.plugins import load_plugins
    from evlgen.common.safe_text import printable
    from evlgen.models.published.conversion import convert

    load_plugins(args.plugins, None)
    print(printable(convert(args.source, args.target, args.to, args.cfg_path, args.options, args.force)))
    return 0
