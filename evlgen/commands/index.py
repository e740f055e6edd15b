"""``python -m evlgen index``."""

from __future__ import annotations

import argparse

from evlgen.commands.arguments import (
    add_allow_downloads,
    add_common,
    add_options,
    allow_downloads,
    fail_for,
    positive,
)
from evlgen.common.safe_text import printable

HELP = "write an index of images, for `search`"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", nargs="+", metavar="FOLDER", help="folders of images, which are walked, or image files"
    )
    parser.add_argument(
        "--output", required=True, metavar="INDEX", help="the file; what is in it already is not read again"
    )
    parser.add_argument("--batch-size", type=positive, default=32, help="images at once")
    add_model(parser)
    add_common(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    """What names a model of BLIP-2's first stage."""
    parser.add_argument("--cfg-path", help="project or model file of a first stage (model.arch: blip2)")
    parser.add_argument(
        "--checkpoint",
        help="folder of a run, of a checkpoint or of save_pretrained; with --cfg-path also a published .pth",
    )
    add_allow_downloads(parser)
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    import os

    from evlgen.captioning import default_device
    from evlgen.common.errors import ConfigError
    from evlgen.common.logs import quiet_libraries
    from evlgen.common.plugins import load_plugins
    from evlgen.image_search import index_images
    from evlgen.models.zoo import load_model_of

    load_plugins(args.plugins, None)
    quiet_libraries()
    if args.cfg_path is None and args.checkpoint is None:
        raise ConfigError("name a first stage (model.arch: blip2) with --checkpoint or --cfg-path.")
    device = default_device()
    model = load_model_of(args.cfg_path, args.checkpoint, args.options, device, allow_downloads(args))
    # what `search` finds by itself: a checkpoint that says what model it is of
    folder = args.checkpoint if args.cfg_path is None and os.path.isdir(args.checkpoint) else None
    left_out: list[str] = []
    count = index_images(
        args.images,
        args.output,
        model,
        checkpoint=folder and os.path.abspath(folder),
        batch_size=args.batch_size,
        left_out=left_out,
    )
    print(printable(f"{args.output}: {count} images"), flush=True)
    fail_for(left_out, args.images, "indexed")
    return 0
