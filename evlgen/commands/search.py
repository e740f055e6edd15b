"""``python -m evlgen search``."""

from __future__ import annotations

import argparse

from evlgen.commands.arguments import add_common, allow_downloads, positive
from evlgen.commands.index import add_model

HELP = "find images of an index by a text or by an image"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", metavar="INDEX", help="the file that `evlgen index` wrote")
    parser.add_argument("query", metavar="QUERY", help="a text, or the path of an image")
    parser.add_argument("-k", type=positive, default=10, help="how many images")
    parser.add_argument(
        "--rerank", type=positive, default=None, metavar="N", help="order the best N by image-text matching"
    )
    add_model(parser)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    import os

    from evlgen.captioning import default_device
    from evlgen.common.errors import ConfigError
    from evlgen.common.logs import quiet_libraries
    from evlgen.common.plugins import load_plugins
    from evlgen.common.safe_text import printable
    from evlgen.image_search import ImageIndex
    from evlgen.media.images import open_image
    from evlgen.models.zoo import load_model_of

    load_plugins(args.plugins, None)
    quiet_libraries()
    index = ImageIndex.open(args.index)
    checkpoint = args.checkpoint
    if checkpoint is None and args.cfg_path is None:
        checkpoint = index.made_by.get("checkpoint")
        if not checkpoint or not os.path.isdir(checkpoint):
            where = f", which was at {checkpoint}" if checkpoint else ""
            raise ConfigError(f"name the model that made {args.index}{where}, with --checkpoint.")
    model = load_model_of(args.cfg_path, checkpoint, args.options, default_device(), allow_downloads(args))
    query = open_image(args.query) if os.path.isfile(args.query) else args.query
    for path, score in index.search(model, query, args.k, args.rerank or 0):
        print(printable(f"{score:.4f}  {path}"), flush=True)
    return 0
