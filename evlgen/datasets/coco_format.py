"""COCO's own caption files (``captions_val2014.json``), and others in their layout: nocaps'."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from evlgen.common.errors import DataError
from evlgen.datasets.annotations import describe, is_id, known_as
from evlgen.datasets.base_dataset import BadRecord

_FOLDER = re.compile(r"(?:train|val|test|unlabeled)20\d\d")  # COCO's folders of images, named by their zips
_PROBES = 20


def is_coco_format(content: Any) -> bool:
    """Whether a file has the layout ``{"images": [..], ..}``."""
    return isinstance(content, Mapping) and isinstance(content.get("images"), list)


def coco_items(content: Mapping[str, Any], path: str | os.PathLike, root: Path | None) -> Iterator[Any]:
    """The images of a file ``{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}``
    as records of the other layout, ``{"image", "image_id", "caption": [..]}``; without ``caption`` where the
    file has no annotations (nocaps' test set). A caption of no image comes last, as a `BadRecord`.

    Args:
        root: the media folder. COCO's file names lack the folder that its images are in; see `Folders`.

    Raises:
        DataError: annotations are no list.
    """
    annotations = content.get("annotations", [])
    if not isinstance(annotations, list):
        raise DataError(f"annotation {path}: 'annotations' must be a list, not {describe(annotations)}.")
    captions, strays = _captions(content["images"], annotations, path)
    folders = Folders(content["images"], path, root)
    for image in content["images"]:
        if not isinstance(image, Mapping) or not isinstance(image.get("file_name"), str):
            yield image
            continue
        item: dict[str, Any] = {"image": folders.place(image["file_name"])}
        if is_id(image.get("id")):
            item["image_id"] = image["id"]
        if annotations:
            item["caption"] = captions[image["id"]] if is_id(image.get("id")) else []
        yield item
    yield from strays


def _captions(
    images: list[Any], annotations: list[Any], path: str | os.PathLike
) -> tuple[Mapping[int | str, list[Any]], list[BadRecord]]:
    """Captions by image id, and what belongs to no image."""
    known = {image["id"] for image in images if isinstance(image, Mapping) and is_id(image.get("id"))}
    captions: Mapping[int | str, list[Any]] = defaultdict(list)
    strays = []
    for index, annotation in enumerate(annotations):
        image_id: Any = annotation.get("image_id") if isinstance(annotation, Mapping) else None
        own = known_as(image_id, known) if is_id(image_id) else None
        if own is not None and own in known:
            captions[own].append(annotation.get("caption"))
        else:
            reason = f"it belongs to none of the file's images: {describe(annotation)}."
            strays.append(BadRecord(f"annotation {index} of {path}", reason))
    return captions, strays


class Folders:
    """Finds the folder of COCO's images, which is not in their file names.

    It is the one named after the images (``COCO_val2014_000000000042.jpg``) or, as theirs are numbers
    since 2017, after the annotation (``captions_val2017.json``); unless images lie in ``root`` itself.

    Args:
        images: of the file.
        path: of the annotation.
        root: the media folder; None where it is not known, or no folder on this machine.
    """

    def __init__(self, images: list[Any], path: str | os.PathLike, root: Path | None) -> None:
        self._default = _FOLDER.search(PurePath(path).name)
        self._images, self._root = images, root
        self._inside: dict[str, bool] = {}  # folder -> whether images are in it, and not in `root`

    def place(self, name: str) -> str:
        """The file name relative to ``root``."""
        found = _FOLDER.search(name) or self._default
        if "/" in name or found is None or self._root is None or not self._root.is_dir():
            return name
        folder = found.group()
        if folder not in self._inside:
            self._inside[folder] = not any((self._root / n).is_file() for n in self._probes(folder))
        return f"{folder}/{name}" if self._inside[folder] else name

    def _probes(self, folder: str) -> list[str]:
        names = (image.get("file_name") for image in self._images if isinstance(image, Mapping))
        texts = [name for name in names if isinstance(name, str) and "/" not in name and "\0" not in name]
        named = [name for name in texts if folder in name] or texts
        return named[:: max(1, len(named) // _PROBES)]
