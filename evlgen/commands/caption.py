"""``python -m evlgen caption``."""

from __future__ import annotations

import argparse
from typing import Any

from evlgen.commands.arguments import (
    add_allow_downloads,
    add_common,
    add_options,
    allow_downloads,
    fail_for,
    positive,
)

HELP = "write a caption for each image, or video"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image files (or videos, for a model of videos), addresses, or folders, which are walked",
    )
    parser.add_argument(
        "--output",
        metavar="FILE.jsonl",
        help="write the captions there instead: resumable, and shared by processes that torchrun starts",
    )
    parser.add_argument("--batch-size", type=positive, default=16, help="images at once")
    parser.add_argument("--cfg-path", help="project or model file; its model writes the captions")
    parser.add_argument(
        "--checkpoint",
        help="folder of a run, of a checkpoint or of save_pretrained; with --cfg-path also a published .pth",
    )
    add_allow_downloads(parser)
    add_options(parser)
    parser.add_argument("--prompt", help="the text a caption continues")
    parser.add_argument("--num-beams", type=positive, default=5)
    parser.add_argument("--max-length", type=positive, default=30, help="new tokens at most")
    parser.add_argument("--frames", type=positive, default=4, help="of each video at most, evenly spaced")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    from evlgen.common.logs import quiet_libraries
    from evlgen.common.plugins import load_plugins
    from evlgen.common.safe_text import printable

    load_plugins(args.plugins, None)
    quiet_libraries()
    if args.output is not None:
        return _to_file(args)
    from evlgen.captioning import caption_files

    left_out: list[str] = []
    allow = allow_downloads(args)
    for path, caption in caption_files(
        args.images, left_out=left_out, allow_downloads=allow, **_settings(args)
    ):
        print(printable(f"{path}: {caption}"), flush=True)
    fail_for(left_out, args.images, "captioned")
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    keys = ("cfg_path", "checkpoint", "options", "prompt", "num_beams", "max_length", "batch_size")
    return {"num_frames": args.frames, **{key: getattr(args, key) for key in keys}}


def _to_file(args: argparse.Namespace) -> int:
    """``--output``. Files that cannot be read are listed, and change nothing about the exit status."""
    import os

    from evlgen.captions_file import caption_to_file
    from evlgen.common.safe_text import printable
    from evlgen.config.consent import ask_on_terminal

    found = caption_to_file(
        args.images,
        args.output,
        **_settings(args),
        allow_downloads=args.allow_downloads or ask_on_terminal,
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
    )
    if found is None:
        return 0
    captions, failures = found
    print(printable(f"{args.output}: {captions} captions"), flush=True)
    if failures:
        print(printable(f"{args.output}.failed: {failures} files that could not be read"), flush=True)
    return 0
