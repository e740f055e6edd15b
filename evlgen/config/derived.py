"""What follows from other keys of a configuration, filled in when it is loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from evlgen.common.registry import registry
from evlgen.config.layers import Layers
from evlgen.config.schema import parameters_of

logger = logging.getLogger(__name__)


def real_path(path: str) -> str:
    """A checkpoint on this machine without links in its folder's path: ``latest`` is about to point at the
    folder of the run that starts from it. Others, such as addresses, as they are."""
    if "://" in path or not os.path.exists(os.path.expanduser(path)):
        return path
    path = os.path.abspath(os.path.expanduser(path))
    if os.path.isdir(path):
        return os.path.realpath(path)
    # a file keeps its name, whose end says what it is: in the cache of the hub's client it is a link
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def fill_processors(
    datasets: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Mapping[str, Any]]
) -> None:
    """What the model decides goes into the processors that take it, unless the YAML says otherwise.

    Args:
        datasets: checked sections; changed in place.
        defaults: see `BaseModel.processor_defaults`.
    """
    for dataset in datasets.values():
        for key, follow in defaults.items():
            for section in (dataset.get(key) or {}).values():
                known = parameters_of(registry.get_processor_class(section["name"]))
                section |= {k: v for k, v in follow.items() if k in known and section.get(k) is None}


def drop_foreign_sources(
    datasets: Mapping[str, Mapping[str, Any]], layers: Layers, level: int = logging.INFO
) -> None:
    """Where a file of one's own stands in for a dataset's, the address, checksum and ground truth that are
    built in for the latter go. What somebody set stays.

    Args:
        datasets: checked sections; changed in place.
        level: of the lines in the log that say what goes.
    """
    for name, dataset in datasets.items():
        info = dataset.get("build_info") or {}
        path = f"datasets.{name}.build_info"
        truths = info.get("ground_truth") or {}
        parts = {f"annotations.{split}": part for split, part in info.get("annotations", {}).items()}
        parts |= {f"ground_truth.{split}": part for split, part in truths.items()}
        parts |= {key: info[key] for key in ("images", "videos") if info.get(key)}
        for key, part in parts.items():
            storage = f"{path}.{key}.storage"
            if part.get("storage") == part.get("url"):
                continue  # the published file, fetched: its sum is the one that is known
            left = [
                field
                for field in ("url", "md5")
                if field in part and layers.is_left_behind(f"{path}.{key}.{field}", storage)
            ]
            for field in left:
                del part[field]
            kind, _, split = key.partition(".")
            truth = f"ground_truth.{split}"
            if kind == "annotations" and split in truths:
                if layers.is_left_behind(f"{path}.{truth}.storage", storage):
                    del truths[split]
                    left.append(truth)
            if left:
                logger.log(
                    level,
                    "%s is '%s' (%s): left out what belongs to the dataset's own: %s",
                    storage,
                    part["storage"],
                    layers.source(storage),
                    ", ".join(left),
                )
