"""Images that are learned from and scored too: their scores are no measure of new ones."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from evlgen.datasets.archive_media import split_cell
from evlgen.datasets.base_dataset import MediaDataset
from evlgen.datasets.conversation_dataset import ConversationDataset
from evlgen.datasets.records import good

logger = logging.getLogger(__name__)


def warn_of_overlap(
    name: str, splits: Mapping[str, Any], learned: Collection[str], scored: Collection[str]
) -> None:
    """Warns of each scored split that has images or videos which are learned from. They are compared by
    their paths, those in tables by their bytes; what is streamed or drawn is not looked at.

    Args:
        name: of the dataset.
        splits: its datasets by split.
        learned, scored: names of splits, some of which it may lack.
    """
    kinds = (MediaDataset, ConversationDataset)
    with_files = {split: data for split, data in splits.items() if isinstance(data, kinds)}
    files = {split: set(_paths(data)) for split, data in with_files.items() if split in scored}
    shared: dict[str, set[str]] = {split: set() for split in files}
    for split in [split for split in with_files if split in learned] if files else ():
        for path in _paths(with_files[split]):
            for other in files:
                if path in files[other]:
                    shared[other].add(path)
    for split, found in shared.items():
        if found:
            logger.warning(
                "%s: %d of the %d files of split '%s' are trained on too: its scores say little about new "
                "ones. Keep them out of training, or score another split",
                *(name, len(found), len(files[split]), split),
            )


def _paths(dataset: MediaDataset | ConversationDataset) -> Iterator[str]:
    names: Iterator[str]
    if isinstance(dataset, ConversationDataset):
        names = (name for record in good(dataset.records) for _, name in record["visuals"])
    else:
        names = (record["visual"] for record in good(dataset.records))
    for name, _ in itertools.groupby(names):
        cell = split_cell(name)
        yield cell.digest if cell and cell.digest else os.path.join(dataset.media.root, name)
