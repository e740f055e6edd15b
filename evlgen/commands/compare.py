"""``python -m evlgen compare``."""

from __future__ import annotations

import argparse
import shlex

from evlgen.commands.arguments import add_allow_downloads, add_common, add_options, allow_downloads, positive

HELP = "train configurations side by side under one budget, and report"
PARENT = "output/compare"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE.yaml",
        help="project files; first.yaml+second.yaml is a run in two stages, of which the second starts from "
        "the first's weights",
    )
    parser.add_argument("--cfg-path", help="in their place one project file, changed by --grid")
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=VALUE,VALUE",
        help="an axis, such as model.connector.name=tomeformer,mlp; several make a product",
    )
    parser.add_argument(
        "--budget",
        required=True,
        metavar="AMOUNT",
        help="training of each run: seconds (120s, 2min, 1h) or iterations (500it)",
    )
    add_run_settings(parser, PARENT)


def add_run_settings(parser: argparse.ArgumentParser, parent: str) -> None:
    """What `compare` and `sweep` share."""
    parser.add_argument("--seeds", default="42", metavar="N,N", help="a run with each (default: 42)")
    parser.add_argument(
        "--evaluate-every",
        metavar="AMOUNT",
        help="training between two evaluations, in the budget's unit (default: a sixth of the budget)",
    )
    parser.add_argument("--split", help="what is evaluated on (default: the first file's validation split)")
    parser.add_argument(
        "--evaluate-samples",
        type=positive,
        metavar="N",
        default=256,
        help="how many samples of it, spread evenly (default: 256)",
    )
    parser.add_argument(
        "--stage-split",
        metavar="SHARE",
        help="of a run in stages, the first's share of the budget (default: equal shares)",
    )
    parser.add_argument(
        "--interleave",
        action="store_true",
        help="runs take turns from one evaluation to the next, so that a changing load hits all alike",
    )
    parser.add_argument("--output", metavar="DIR", help=f"(default: {parent}/<date-time>)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the comparison in --output (default: the newest one): what is finished is kept",
    )
    add_options(parser)
    add_allow_downloads(parser)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    from evlgen.common.errors import ConfigError
    from evlgen.comparison.parsing import Axis

    if bool(args.files) == bool(args.cfg_path):
        raise ConfigError("name either project files to compare, or one with --cfg-path and the --grid.")
    if bool(args.cfg_path) != bool(args.grid):
        raise ConfigError("--cfg-path and --grid go together: what to change, and how.")
    axes = [Axis.parse(text) for text in args.grid]
    return run_comparison(args, axes, ["compare", *args.files], PARENT)


def run_comparison(args: argparse.Namespace, axes: list, words: list[str], parent: str, swept=None) -> int:
    """Plans, runs and reports. Returns 1 where a run failed."""
    import logging

    from evlgen.common.logs import quiet_libraries
    from evlgen.comparison.compare import compare, new_folder, resumed_folder
    from evlgen.comparison.parsing import Amount, parse_seeds
    from evlgen.comparison.plan import Settings, plan
    from evlgen.comparison.table import as_text

    settings = Settings(
        budget=Amount.parse(args.budget, "--budget") if args.budget else None,
        evaluate_every=Amount.parse(args.evaluate_every, "--evaluate-every") if args.evaluate_every else None,
        seeds=tuple(parse_seeds(args.seeds)),
        split=args.split,
        samples=args.evaluate_samples,
        stage_split=args.stage_split,
        options=tuple(args.options),
        plugins=tuple(args.plugins),
    )
    if not args.debug:  # each reading would say which keys a new part replaces
        logging.getLogger("evlgen.config.layers").setLevel(logging.WARNING)
    quiet_libraries()
    files = getattr(args, "files", [])
    settings, configurations = plan(settings, files, args.cfg_path, axes, allow_downloads(args))
    if args.resume:
        folder = resumed_folder(args.output, parent, settings, configurations)
    else:
        folder = new_folder(args.output, parent)
    print(f"{len(configurations) * len(settings.seeds)} runs, in {_shown(folder)}", flush=True)
    report = compare(settings, configurations, folder, command(args, words), args.interleave, swept)
    print(f"\n{as_text(report)}\n\n{_shown(folder / ('sweep.html' if swept else 'report.html'))}")
    finished = all(r["status"] == "finished" for c in report["configurations"] for r in c["runs"])
    return 0 if finished else 1


def command(args: argparse.Namespace, words: list[str]) -> str:
    """The command line, as a report shows it: without the folder and what does not change the numbers."""
    words = ["python", "-m", "evlgen", *words]
    names = ("cfg_path", "grid", "budget", "seeds", "evaluate_every", "split", "evaluate_samples")
    for name in (*names, "stage_split", "interleave", "options", "plugins"):
        value = getattr(args, name, None)
        flag = f"--{name.replace('_', '-')}"
        if name == "grid":
            words += [word for axis in value or () for word in (flag, axis)]
        elif value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, *value] if value else []
        elif value not in (None, False):
            words += [flag, str(value)]
    return shlex.join(words)


def _shown(path) -> str:
    from evlgen.common.safe_text import printable
    from evlgen.config.layers import display

    return printable(display(path))
