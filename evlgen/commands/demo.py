"""``python -m evlgen demo``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from evlgen.commands.arguments import add_allow_downloads, add_common, positive
from evlgen.commands.serve import above_zero, port
from evlgen.common.safe_text import printable

if TYPE_CHECKING:
    from evlgen.models.base_model import BaseModel

HELP = "show models on a web page: captions, answers, merging"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="folders of runs, of checkpoints or of save_pretrained, or user/name on the hub, side by side "
        "(default: the bundled Shapes captioner, and the captioner of photographs where its parts are there)",
    )
    add_allow_downloads(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=port, default=7860, help="0: any that is free (default: 7860)")
    parser.add_argument("--prompt", help="what a question is put into, with a slot; see evlgen serve")
    parser.add_argument("--frames", type=positive, default=4, help="of each video at most, evenly spaced")
    parser.add_argument(
        "--max-file-mb", type=above_zero, default=20.0, metavar="MB", help="of an upload (default: 20)"
    )
    parser.add_argument(
        "--max-megapixels", type=above_zero, default=32.0, metavar="MP", help="of an image (default: 32)"
    )
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    import tempfile
    from pathlib import Path

    from evlgen.common.errors import ConfigError
    from evlgen.common.logs import quiet_libraries
    from evlgen.common.plugins import load_plugins
    from evlgen.demo.serve import example_files, make_app, prepare, run_app
    from evlgen.serving.limits import Limits
    from evlgen.serving.listening import bind

    load_plugins(args.plugins, None)
    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="evlgen-demo-", ignore_cleanup_errors=True) as folder:
        prepare(Path(folder) / "uploads")
        try:
            import gradio  # noqa: F401
        except ModuleNotFoundError as error:
            raise ConfigError(
                f'the demo needs the package {error.name}: pip install "evlgen[demo]"'
            ) from error
        from evlgen.demo.exhibit import Exhibit
        from evlgen.demo.page import build_page

        listening = bind(args.host, args.port)
        host, number = listening.getsockname()[:2]
        is_local = host in ("127.0.0.1", "::1")
        if not is_local:
            _warn_open(host)
        limits = Limits(body_bytes=int(args.max_file_mb * 1e6), image_pixels=int(args.max_megapixels * 1e6))
        exhibits = [Exhibit(title, model, args.prompt) for title, model in _models(args)]
        page = build_page(exhibits, example_files(Path(folder)), limits, args.frames)
        app = make_app(page, limits, is_local)
        listening.listen()
        shown = f"[{host}]" if ":" in host else host
        titles = printable(", ".join(e.title for e in exhibits))
        print(f"{titles} at http://{shown}:{number}/", flush=True)
        run_app(app, listening, limits)
    return 0


def _models(args: argparse.Namespace) -> list[tuple[str, BaseModel]]:
    """The models by what they are called: the last names of their paths, numbered where they are equal."""
    import os

    from evlgen.captioning import default_device
    from evlgen.config.consent import ask_on_terminal
    from evlgen.models.zoo import load_model_of

    consent = args.allow_downloads or ask_on_terminal
    found: list[tuple[str, BaseModel]] = []
    for checkpoint in args.checkpoints or _default_checkpoints():
        name = "shapes" if checkpoint is None else os.path.basename(os.path.normpath(checkpoint))
        count = sum(title.partition(" #")[0] == name for title, _ in found)
        title = f"{name} #{count + 1}" if count else name
        found.append((title, load_model_of(None, checkpoint, (), default_device(), consent)))
    return found


def _default_checkpoints() -> list[str | None]:
    """The bundled model, and that of photographs where this is a checkout and its frozen parts are in the
    cache."""
    from pathlib import Path

    import evlgen
    from evlgen.common.registry import registry
    from evlgen.config.config import load_model_file

    folder = Path(evlgen.__file__).resolve().parent.parent / "checkpoints" / "photos"
    if not (folder / "config.yaml").is_file():
        return [None]
    cfg = load_model_file(folder / "config.yaml")
    is_complete = not registry.get_model_class(cfg.arch).missing(cfg)
    return [None, str(folder)] if is_complete else [None]


def _warn_open(host: str) -> None:
    import logging

    logging.getLogger(__name__).warning(
        "the page is at %s, without a password: whoever reaches this machine can use the models.", host
    )
