"""``python -m evlgen visualize``."""

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

HELP = "draw which patches of each image become one soft prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image or video files, addresses, or folders, which are walked",
    )
    parser.add_argument("--cfg-path", help="project or model file; its model's merging is drawn")
    parser.add_argument(
        "--checkpoint",
        help="folder of a run, of a checkpoint or of save_pretrained; with --cfg-path also a published .pth",
    )
    add_allow_downloads(parser)
    add_options(parser)
    parser.add_argument(
        "--layers", default="all", help="all, last, or numbers such as 1,6,12; the last is always drawn"
    )
    parser.add_argument(
        "--output",
        default="merging.png",
        metavar="FILE|FOLDER",
        help="an image file for one sheet of all, or a folder for one sheet each (default: merging.png)",
    )
    parser.add_argument(
        "--compare-untrained",
        action="store_true",
        help="below each image, the same with a connector that has not been trained",
    )
    parser.add_argument("--seed", type=int, help="of the untrained one (default: the project's run.seed)")
    parser.add_argument("--frames", type=positive, default=4, help="of each video at most, evenly spaced")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    from evlgen.common.logs import quiet_libraries
    from evlgen.common.plugins import load_plugins
    from evlgen.common.safe_text import printable

    load_plugins(args.plugins, None)
    quiet_libraries()
    from evlgen.visualization.files import visualize_files

    left_out: list[str] = []
    for path in visualize_files(
        args.images,
        output=args.output,
        cfg_path=args.cfg_path,
        checkpoint=args.checkpoint,
        options=args.options,
        layers=args.layers,
        compare_untrained=args.compare_untrained,
        seed=args.seed,
        num_frames=args.frames,
        left_out=left_out,
        allow_downloads=allow_downloads(args),
    ):
        print(printable(path), flush=True)
    fail_for(left_out, args.images, "drawn")
    return 0
