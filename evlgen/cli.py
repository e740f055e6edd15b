"""The command line: ``train.py``, ``evaluate.py`` and ``python -m evlgen``."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence

from evlgen.common.errors import EVLGenError, Interrupted, ProcessLost
from evlgen.common.launcher import is_first, tell_launcher


def train(argv: Sequence[str] | None = None) -> int:
    """``train.py``: runs a project file. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train, validate and test what a project file describes."
    )
    _add_run_arguments(parser)
    return guarded(lambda args: _run(args, evaluate=False), parser, argv)


def evaluate(argv: Sequence[str] | None = None) -> int:
    """``evaluate.py``: evaluates a project file's model on its test splits. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description="Evaluate what a project file describes, on its test splits."
    )
    _add_run_arguments(parser)
    return guarded(lambda args: _run(args, evaluate=True), parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m evlgen``. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="evlgen", description="Visually conditioned language generation.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, is_evaluation in (("train", False), ("evaluate", True)):
        command = commands.add_parser(name, help=f"{name} what a project file describes (as {name}.py)")
        _add_run_arguments(command)
        command.set_defaults(action=lambda args, e=is_evaluation: _run(args, evaluate=e))
    models = commands.add_parser("models", help="list the architectures and their model types")
    _add_common(models)
    models.set_defaults(action=_models)
    caption = commands.add_parser("caption", help="write a caption for each picture")
    caption.add_argument(
        "images", nargs="+", metavar="IMAGE", help="picture files, addresses or folders of pictures"
    )
    caption.add_argument("--cfg-path", help="project or model file; its model writes the captions")
    caption.add_argument(
        "--checkpoint",
        help="folder of a run, of a checkpoint or of save_pretrained; with --cfg-path also a published .pth",
    )
    caption.add_argument(
        "--options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change the configuration",
    )
    caption.add_argument("--prompt", help="the text a caption continues")
    caption.add_argument("--num-beams", type=_positive, default=5)
    caption.add_argument("--max-length", type=_positive, default=30, help="new tokens at most")
    _add_common(caption)
    caption.set_defaults(action=_caption)
    return guarded(lambda args: args.action(args), parser, argv)


def guarded(action: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser, argv) -> int:
    """Runs a command; what a user can mend is shown in a line or two, without a traceback unless
    ``--debug``."""
    args = parser.parse_args(argv)
    from evlgen.common.logs import log_to_terminal

    log_to_terminal(args.debug)
    try:
        return action(args) or 0
    except Interrupted as stop:
        if is_first():
            print(stop, file=sys.stderr)
        return stop.exit_code
    except EVLGenError as error:
        tell_launcher(str(error), follows_another=isinstance(error, ProcessLost))
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception:
        tell_launcher(traceback.format_exc())
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cfg-path", required=True, help="project file; looked up as given, then inside the package"
    )
    parser.add_argument(
        "--options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change the configuration: run.batch_size_train=32",
    )
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugins",
        nargs="+",
        action="extend",
        default=[],
        metavar="MODULE",
        help="modules or .py files that register parts",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks and debug messages")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


def _run(args: argparse.Namespace, evaluate: bool) -> int:
    from evlgen.common.config import Config

    options = [*args.options, "run.evaluate=true"] if evaluate else args.options
    cfg = Config.load(args.cfg_path, options, args.plugins)
    from evlgen.common.logs import quiet_libraries

    quiet_libraries()
    from evlgen.assemble import run

    run(cfg)
    return 0


def _models(args: argparse.Namespace) -> int:
    from evlgen.common.plugins import load_plugins
    from evlgen.models.zoo import model_zoo

    load_plugins(args.plugins, None)
    print(model_zoo)
    return 0


def _caption(args: argparse.Namespace) -> int:
    from evlgen.common.logs import quiet_libraries
    from evlgen.common.plugins import load_plugins

    load_plugins(args.plugins, None)
    quiet_libraries()
    from evlgen.captioning import caption_files

    for path, caption in caption_files(
        args.images,
        cfg_path=args.cfg_path,
        checkpoint=args.checkpoint,
        options=args.options,
        prompt=args.prompt,
        num_beams=args.num_beams,
        max_length=args.max_length,
    ):
        print(f"{path}: {caption}", flush=True)
    return 0
