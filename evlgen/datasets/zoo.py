"""Loading datasets by name, under LAVIS's names."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from evlgen.common.errors import ConfigError, DataError
from evlgen.common.registry import registry
from evlgen.common.safe_text import message_lines
from evlgen.config.config import load_dataset_config
from evlgen.config.layers import PROCESSOR_SECTIONS
from evlgen.datasets.base_builder import ROLES
from evlgen.datasets.base_dataset import BaseDataset
from evlgen.files.io import cache_root
from evlgen.processors.base_processor import UnchangedProcessor

logger = logging.getLogger(__name__)


def load_dataset(
    name: str,
    cfg_path: str | Path | None = None,
    vis_path: str | Path | None = None,
    data_type: str | None = None,
) -> dict[str, BaseDataset]:
    """The splits of a registered dataset, by name: ``load_dataset("coco_caption")["train"][0]``.

    A split whose files are not on this machine is left out with a warning.

    Without processors in a file of one's own, samples hold images (or video) and texts as they are.

    Args:
        name: a registered dataset; see `dataset_zoo`.
        cfg_path: YAML file with a ``datasets`` section, over the dataset's own.
        vis_path: folder of the images or videos; a relative one starts at the data root, as in LAVIS.
        data_type: which of them, ``images`` or ``videos``; by default what the dataset has.

    Raises:
        RegistryError: no dataset has this name.
        ConfigError: the file, ``vis_path`` or ``data_type`` does not fit the dataset.
        DataError: no split's files are there, with how to get them; or some are damaged.
    """
    section, own_processors = load_dataset_config(name, cfg_path)
    builder_class = registry.get_builder_class(section.pop("builder", name))
    if vis_path is not None:
        info, kind = section.get("build_info") or {}, data_type or section.get("data_type") or "images"
        if kind not in info or kind not in ("images", "videos"):
            raise ConfigError(f"dataset '{name}' has no folder of {kind} that vis_path could name.")
        info[kind] = {"storage": str(vis_path)}
    for key in PROCESSOR_SECTIONS:
        section[key] = own_processors.get(key) or {}
    builder = builder_class(name=name, cache_root=cache_root(), **section)
    for processors in (builder.vis_processors, builder.text_processors):
        for role in ROLES:
            processors.setdefault(role, UnchangedProcessor())
    missing = {split: builder.missing([split]) for split in builder.splits}
    there = [split for split, lines in missing.items() if not lines]
    left_out = message_lines(dict.fromkeys(line for lines in missing.values() for line in lines))
    if not there:
        raise DataError(left_out)
    if left_out:
        logger.warning("splits that are not on this machine are left out:\n%s", left_out)
    return {split: builder.get_split(split) for split in there}


class DatasetZoo:
    """The registered datasets; printing it shows their names."""

    def get_names(self) -> list[str]:
        """Names that `load_dataset` knows."""
        return registry.list_datasets()

    def __iter__(self) -> Iterator[str]:
        return iter(self.get_names())

    def __len__(self) -> int:
        return len(self.get_names())

    def __repr__(self) -> str:
        return "\n".join(self.get_names())


dataset_zoo = DatasetZoo()
