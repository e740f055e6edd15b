"""``python -m evlgen push``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evlgen.commands.arguments import add_common, add_options

if TYPE_CHECKING:
    from evlgen.models.publishing.card import Sample

HELP = "put a checkpoint on the Hugging Face hub, with a card"
_NUM_SAMPLES = 6
_LARGEST = 224  # pixels of a sample's longer side


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="folder of a run (its best checkpoint is taken), of a checkpoint, or of save_pretrained",
    )
    parser.add_argument("name", metavar="USER/NAME", help="repository; made where there is none")
    parser.add_argument("--private", action="store_true", default=None, help="where it is made here")
    parser.add_argument("--branch", help="to push to (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--message", default="Checkpoint of evlgen", help="of the commit")
    parser.add_argument(
        "--with-parts",
        action="store_true",
        help="copy frozen parts that lie on this machine alone, where their licences allow it",
    )
    parser.add_argument("--licence", help="of the trained weights, as the hub names it: apache-2.0")
    parser.add_argument("--text", metavar="FILE", help="Markdown of your own for the top of the card")
    parser.add_argument("--samples", metavar="FOLDER", help="images to show in the card with their captions")
    parser.add_argument(
        "--samples-licence",
        metavar="TEXT",
        help="of these images, and where they are from; needed to show them",
    )
    parser.add_argument(
        "--dry-run", metavar="FOLDER", help="write what would be pushed into a new folder, and push nothing"
    )
    add_options(parser)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    from evlgen.common.logs import quiet_libraries
    from evlgen.common.plugins import load_plugins
    from evlgen.common.safe_text import printable

    load_plugins(args.plugins, None)
    quiet_libraries()
    from evlgen.models.publishing.publish import prepare_folder, publish

    prepare = {
        "options": args.options,
        "with_parts": args.with_parts,
        "licence": args.licence,
        "text": _text(args.text),
        "make_samples": _sampler(args),
    }
    if args.dry_run is not None:
        folder = _new_folder(args.dry_run)
        prepare_folder(args.checkpoint, folder, args.name, **prepare)
        print(printable(f"{folder}: nothing was pushed"))
        return 0
    address = publish(
        args.checkpoint,
        args.name,
        message=args.message,
        private=args.private,
        branch=args.branch,
        create_pr=args.create_pr,
        **prepare,
    )
    print(printable(address))
    return 0


def _text(path: str | None) -> str | None:
    from evlgen.common.errors import DataError
    from evlgen.files.io import read_bytes

    if path is None:
        return None
    try:
        return read_bytes(Path(path).expanduser(), 1 << 20).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text {path} cannot be read as text: {error}.") from error


def _new_folder(name: str) -> Path:
    from evlgen.common.errors import ConfigError

    folder = Path(name).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--dry-run {folder} exists and is not empty. Name a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sampler(args: argparse.Namespace) -> Any:
    """What makes the card's samples: of the user's images, whose licence has to be stated, or of drawn ones
    where the model was trained on these."""
    from evlgen.common.errors import ConfigError

    if args.samples is not None and not args.samples_licence:
        raise ConfigError(
            "--samples shows images to everybody: state where they are from and under which licence with "
            '--samples-licence "photographs of my own, CC BY 4.0".'
        )

    def make(config: Mapping[str, Any], folder: Path) -> Sequence[Sample]:
        if args.samples is not None:
            from evlgen.media.frames import find_files

            paths = find_files([args.samples], videos=False)[:_NUM_SAMPLES]
            return _captioned(paths, args.samples_licence, folder)
        if "shapes_caption" in (config.get("datasets") or {}):
            section = config["datasets"]["shapes_caption"]
            return _captioned(_drawn(folder, int(section.get("seed") or 0)), "drawn by EVLGen", folder)
        return ()

    def _captioned(paths: Sequence[str], source: str, folder: Path) -> Sequence[Sample]:
        from evlgen.captioning import caption_files
        from evlgen.models.publishing.card import Sample
        from evlgen.models.publishing.folder import checkpoint_of

        found = caption_files(paths, checkpoint=str(checkpoint_of(args.checkpoint)))
        return [
            Sample(_thumbnail(path, folder, number), caption, source)
            for number, (path, caption) in enumerate(found)
        ]

    return make


def _drawn(folder: Path, seed: int) -> list[str]:
    from PIL import Image

    from evlgen.datasets.shapes.world import draw, scene

    paths = [str(folder / f"{number}.png") for number in range(_NUM_SAMPLES)]
    for number, path in enumerate(paths):
        Image.fromarray(draw(scene("test", number, seed))).save(path)
    return paths


def _thumbnail(path: str, folder: Path, number: int) -> str:
    """Writes a small copy without the file's metadata (places, cameras); its name."""
    from evlgen.media.images import open_image

    image = open_image(path)
    image.thumbnail((_LARGEST, _LARGEST))
    name = f"{number}.png"
    image.save(folder / name)
    return name
