"""``python -m evlgen report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from evlgen.commands.arguments import add_debug

HELP = "write one HTML page of a run, or of several beside each other"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUN_FOLDER", help="what training wrote, such as output/shapes/latest"
    )
    parser.add_argument(
        "--output", metavar="FILE.html", help="(default: report.html in the first run's folder)"
    )
    add_debug(parser)


def run(args: argparse.Namespace) -> int:
    """Writes the page; prints where."""
    from evlgen.common.errors import DataError
    from evlgen.common.safe_text import printable
    from evlgen.config.layers import display
    from evlgen.files.io import write_atomically
    from evlgen.report.run_folder import RunFolder
    from evlgen.report.run_page import run_page

    runs = [RunFolder(Path(name)) for name in args.runs]
    output = Path(args.output).expanduser() if args.output else runs[0].path / "report.html"
    try:
        write_atomically(output, run_page(runs))
    except OSError as error:
        raise DataError(f"--output {output} cannot be written ({error.strerror or error}).") from error
    print(printable(display(output.absolute())))
    return 0
