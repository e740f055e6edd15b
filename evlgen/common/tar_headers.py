"""What lies where in a tar file, from its headers alone."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from evlgen.common.errors import DataError


class TarMember(NamedTuple):
    """A file in a tar file: its name, where its bytes begin, and how many they are."""

    name: str
    offset: int
    size: int


def tar_members(path: str | os.PathLike) -> Iterator[TarMember]:
    """The regular files in a plain tar file, in their order. Their bytes are passed over.

    Raises:
        DataError: the file cannot be read or is no plain tar file; or, after the members before that place,
            it is damaged or cut off. Members may be cut off too: reading such a one gives fewer bytes.
    """
    end = 0
    try:
        with tarfile.open(path, mode="r:") as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # tarfile would keep every header it has read
                if info.isreg() and not info.issparse():
                    yield TarMember(info.name, info.offset_data, info.size)
                end = archive.offset
            end = archive.offset
        with open(path, "rb") as file:  # tarfile takes a broken header behind the first for the end
            file.seek(end)
            is_whole = not any(file.read(tarfile.BLOCKSIZE))
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        if end == 0 or isinstance(error, OSError):
            why = str(error).strip().rstrip(".") or type(error).__name__
            raise DataError(
                f"{path} is not a plain tar file that can be read: {why}.", "damaged shard"
            ) from error
        is_whole = False
    if not is_whole:
        raise DataError(f"{path} is damaged or cut off at byte {end}.", "damaged shard")
