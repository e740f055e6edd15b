"""Small shards for tests: a name -> bytes mapping becomes a tar file."""

from __future__ import annotations

import functools
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image


@functools.cache
def png(value: int = 0, size: int = 8) -> bytes:
    """A grey image."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def sample(key: str, caption: object | None = None, value: int = 0) -> dict[str, bytes]:
    """The members of one sample; its caption is its key unless another is given."""
    caption = f"a {key}" if caption is None else caption
    return {f"{key}.png": png(value), f"{key}.json": json.dumps({"caption": caption}).encode()}


def write_shard(path: Path, members: Mapping[str, bytes] | list[tuple[str, bytes]]) -> str:
    """Writes a tar file; returns its path. A list may name a member twice."""
    pairs = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(path, "w") as archive:
        for name, content in pairs:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def write_shards(folder: Path, sizes: list[int]) -> list[str]:
    """Shards of so many samples each; a sample's key has the shard's number and its own."""
    folder.mkdir(exist_ok=True, parents=True)
    shards = []
    for number, size in enumerate(sizes):
        members = {}
        for index in range(size):
            members |= sample(f"{number:03d}{index:03d}")
        shards.append(write_shard(folder / f"{number:05d}.tar", members))
    return shards
