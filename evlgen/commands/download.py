"""``python -m evlgen download``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evlgen.commands.arguments import add_debug
from evlgen.common.safe_text import printable

if TYPE_CHECKING:
    from evlgen.config.catalogue import Entry, Item

HELP = "get published datasets: annotations, images, videos"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="such as coco or vqav2; without one: what there is"
    )
    parser.add_argument(
        "--to", metavar="DIR", help="the data root (default: EVLGEN_CACHE, else ~/.cache/evlgen)"
    )
    parser.add_argument("--only", choices=("annotations", "images", "videos"), help="this kind of files")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument(
        "--keep-archives", action="store_true", help="keep zip and tar files after they are unpacked"
    )
    add_debug(parser)


def run(args: argparse.Namespace) -> int:
    from evlgen.config.catalogue import catalogue, find_entry
    from evlgen.files.io import cache_root

    root = Path(args.to).expanduser().resolve() if args.to else cache_root()
    if not args.names:
        _print_catalogue(catalogue(), root)
        return 0
    return _download([find_entry(name) for name in dict.fromkeys(args.names)], root, args)


def _print_catalogue(entries: Mapping[str, Entry], root: Path) -> None:
    from evlgen.config.catalogue import items_of

    print(printable(f"in {root}") + "\n")
    for name, entry in entries.items():
        print(f"{name:<12}{entry.title}")
        for line in (_in_short(items_of(entry), root), *entry.licences):
            print(f"{'':<12}{line}")
    print("\npython -m evlgen download NAME [--to DIR] [--only annotations|images|videos]")


def _in_short(items: Sequence[Item], root: Path) -> str:
    """``annotations: 3 of 5 here; images: 20.2 GB, 0 of 2 here; videos: by hand, 0 of 1 here``"""
    from evlgen.config.catalogue import KINDS
    from evlgen.datasets.dataset_download import state_of
    from evlgen.files.downloads import as_size

    parts = []
    for kind in KINDS:
        of_kind = [item for item in items if item.kind == kind]
        size = sum(item.size or 0 for item in of_kind)
        about = f"{as_size(size)}, " if size else ""
        if not any(item.can_be_fetched for item in of_kind):
            about = "by hand, "
        here = sum(state_of(item, root) == "here" for item in of_kind)
        parts += [f"{kind}: {about}{here} of {len(of_kind)} here"] if of_kind else []
    return "; ".join(parts)


def _download(entries: Sequence[Entry], root: Path, args: argparse.Namespace) -> int:
    from evlgen.common.errors import DataError, Interrupted
    from evlgen.common.safe_text import message_lines
    from evlgen.config.catalogue import items_of
    from evlgen.datasets.dataset_download import bring, check_room, state_of

    found = {item.key: item for entry in entries for item in items_of(entry)}
    items = [item for item in found.values() if args.only in (None, item.kind)]
    missing = _with_sizes([i for i in items if i.can_be_fetched and state_of(i, root) != "here"])
    _print_plan(entries, items, missing, root)
    if missing:
        check_room(missing, root, args.keep_archives)
        if not (args.yes or _is_agreed()):
            return 1
    failures = []
    for item in missing:
        try:
            bring(item, root, args.keep_archives)
        except DataError as error:
            failures.append(str(error))
        except KeyboardInterrupt:
            raise Interrupted("interrupted: the same command goes on from there.", 130) from None
    if failures:
        raise DataError(message_lines(failures))
    _print_end(entries, items, root)
    return 0


def _with_sizes(items: Sequence[Item]) -> list[Item]:
    """The items with the sizes that the catalogue does not have, as far as their servers say."""
    import dataclasses
    from concurrent.futures import ThreadPoolExecutor

    from evlgen.common.errors import DataError
    from evlgen.files.downloads import length_of

    def sized(item: Item) -> Item:
        try:
            return item if item.size or not item.url else dataclasses.replace(item, size=length_of(item.url))
        except DataError:
            return item  # fetching it will say what is wrong

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(sized, items))


def _print_plan(entries: Sequence[Entry], items: Sequence[Item], missing: Sequence[Item], root: Path) -> None:
    from evlgen.datasets.dataset_download import HAS_FILES, is_as_published, state_of

    for entry in entries:
        print(entry.title)
        for licence in entry.licences:
            print(f"  {licence}")
    print(printable(f"in {root}:"))
    to_fetch = {item.key: item for item in missing}
    states = [state_of(item, root) for item in items]
    for item, state in zip(items, states, strict=True):
        item = to_fetch.get(item.key, item)
        size = "" if state == "here" else _size_of([item]) if item.can_be_fetched else "by hand"
        note = "" if is_as_published(item, root) else ", and not the published file"
        print(f"  {item.shown:<60} {size:>12}  {state}{note}")
    if HAS_FILES in states:
        print(
            "Of folders that have files it is not known whether they are whole: what is there and the same "
            "stays.\nIf they are, --only annotations gets the rest."
        )
    print(f"to fetch: {_size_of(missing) if missing else 'nothing'}", flush=True)


def _is_agreed() -> bool:
    from evlgen.common.errors import ConfigError

    if not sys.stdin.isatty():
        raise ConfigError("there is nobody to ask: add --yes to download without a question.")
    try:
        return input("Download it? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _print_end(entries: Sequence[Entry], items: Sequence[Item], root: Path) -> None:
    from evlgen.config.catalogue import items_of
    from evlgen.datasets.dataset_download import state_of
    from evlgen.files.io import cache_root

    missing = {item.key for item in items if state_of(item, root) != "here"}
    for entry in entries:
        for item in items_of(entry):
            if item.key in missing:
                where = f"{root / item.storage} has to come by hand."
                print(printable(f"{where} {entry.by_hand.get(item.kind, '')}"))
    print(f"{len(items) - len(missing)} of {len(items)} files and archives are here.")
    setting = "" if root.resolve() == cache_root() else f"EVLGEN_CACHE={root} "
    for entry in entries:
        if entry.use:
            print(printable(f"use it: {setting}{entry.use}"))


def _size_of(items: Sequence[Item]) -> str:
    """About how much these are; what is not known is said."""
    from evlgen.files.downloads import as_size

    total = sum(item.size or 0 for item in items)
    unknown = sum(1 for item in items if item.can_be_fetched and not item.size)
    if not unknown:
        return as_size(total)
    files = "1 file" if unknown == 1 else f"{unknown} files"
    return f"{as_size(total)} and {files} of unknown size" if total else "size unknown"
