"""The command line: ``train.py``, ``evaluate.py`` and ``python -m evlgen``."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from evlgen.commands import COMMANDS
from evlgen.commands.arguments import add_run_arguments, allow_downloads
from evlgen.console import guarded


def train(argv: Sequence[str] | None = None) -> int:
    """``train.py``: runs a project file. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train, validate and test what a project file describes."
    )
    add_run_arguments(parser)
    return guarded(lambda args: _run(args, evaluate=False), parser, argv)


def evaluate(argv: Sequence[str] | None = None) -> int:
    """``evaluate.py``: evaluates a project file's model on its test splits. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description="Evaluate what a project file describes, on its test splits."
    )
    add_run_arguments(parser)
    return guarded(lambda args: _run(args, evaluate=True), parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m evlgen``. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="evlgen", description="Visually conditioned language generation.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, is_evaluation in (("train", False), ("evaluate", True)):
        command = commands.add_parser(name, help=f"{name} what a project file describes (as {name}.py)")
        add_run_arguments(command)
        command.set_defaults(action=lambda args, e=is_evaluation: _run(args, evaluate=e))
    for name in COMMANDS:
        module = importlib.import_module(f"evlgen.commands.{name}")
        command = commands.add_parser(name, help=module.HELP)
        module.add_arguments(command)
        command.set_defaults(action=module.run)
    return guarded(lambda args: args.action(args), parser, argv)


def _run(args: argparse.Namespace, evaluate: bool) -> int:
    from evlgen.config.config import Config, load_stages
    from evlgen.config.consent import check_project
    from evlgen.first_look import look_for_files

    options = [*args.options, *(["run.evaluate=true"] if evaluate else [])]
    look_for_files(args.cfg_path, options, args.plugins)
    if evaluate:  # of a file with stages what the last one trains
        stages = [Config.load(args.cfg_path, options, args.plugins)]
    else:
        stages = load_stages(args.cfg_path, args.options, args.plugins)
    for cfg in stages:
        check_project(cfg, allow_downloads(args))
    from evlgen.common.logs import quiet_libraries

    quiet_libraries()
    from evlgen.assemble import run_stages, writing_named

    with writing_named(stages[-1].run.output_dir):
        run_stages(stages)
    return 0
