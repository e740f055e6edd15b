"""Flickr8k in its published layout: ``Flickr8k.token.txt`` and the lists of file names of its splits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evlgen.common.errors import DataError
from evlgen.common.registry import registry
from evlgen.datasets.base_dataset import BadRecord
from evlgen.datasets.caption_builders import CaptionBuilder
from evlgen.datasets.compact_records import PackedRecords
from evlgen.datasets.media import Media
from evlgen.datasets.records import refuse_bad


@registry.register_builder("flickr8k")
class Flickr8kBuilder(CaptionBuilder):
    """Flickr8k: 8,000 photographs with five captions each, in its official split of 6,000, 1,000 and 1,000
    (Hodosh, Young and Hockenmaier, *Framing Image Description as a Ranking Task*, JAIR 2013).

    A split's ``storage`` is the list of captions, whose lines are ``name.jpg#0 <tab> caption``, and then the
    list of the split's file names, one in a line.
    """

    DEFAULT_CONFIG = "configs/datasets/flickr8k.yaml"

    def _records(self, split: str, media: Media, captioned: bool) -> PackedRecords:
        files = [path for path, _ in self.annotation_files(split)]
        if len(files) != 2:
            raise DataError(
                f"datasets.{self.name}.build_info.annotations.{split}.storage must name two files: the list "
                "of captions (Flickr8k.token.txt) and the list of the split's file names."
            )
        records = PackedRecords(split_records(*files))
        refuse_bad(records)
        return records


def split_records(captions: Path, names: Path) -> Iterator[dict[str, Any] | BadRecord]:
    """The records of a split in the order of its list: ``visual``, a file name, and ``caption``, a list.

    A line that is not a caption is a `BadRecord`, and so is a name without captions.

    Raises:
        DataError: a file cannot be read, or the list is empty.
    """
    known: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(captions), start=1):
        name, tab, text = line.partition("\t")
        name, mark, _ = name.rpartition("#")
        if tab and mark and name and text.strip():
            known.setdefault(name, []).append(text.strip())
        elif line.strip():
            reason = f"it is not of the form 'name.jpg#0<tab>caption': {line[:80]!r}."
            yield BadRecord(f"line {number} of {captions.name}", reason)
    wanted = list(dict.fromkeys(filter(None, map(str.strip, _lines(names)))))
    if not wanted:
        raise DataError(f"{names} names no images.")
    for name in wanted:
        if name in known:
            yield {"visual": name, "caption": known[name]}
        else:
            yield BadRecord(name, f"{captions.name} has no caption of it.", "no caption")


def _lines(path: str | os.PathLike) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"annotation {path} cannot be read: {error}") from error
