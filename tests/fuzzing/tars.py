"""Tar files of every format, damaged, or with fields of their headers changed and the sums right again."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

from shard_files import sample

from evlgen.common.errors import DataError
from evlgen.datasets.archive_media import TarArchive
from evlgen.datasets.shards import read_shard
from evlgen.files.archives import extract
from evlgen.files.tar_headers import BLOCK, tar_members
from fuzzing.mutate import mutate

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
_LONG = "a" * 90 + "/" + "é" * 40
_SIZES = (
    *(b"\x80" + (size % 2**88).to_bytes(11, "big") for size in (1, 512, 20 << 30, 2**62, 2**63, 2**87)),
    *(b"\xff" + (-size % 2**88).to_bytes(11, "big") for size in (1, 511, 512, 1024, 2048, 2**63)),
    *(b"-0000001000\0", b"+0000001000\0", b"00000000000\0", b"77777777777\0", b"0_1        \0", b"\0" * 12),
)  # fmt: skip


@functools.cache
def whole(form: int) -> bytes:
    """A tar file with samples, a folder, long names and, of pax, sizes and attributes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, content in {**sample("a"), **sample("b.v1"), **sample(_LONG)}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if form == tarfile.PAX_FORMAT and name == "a.png":
                info.pax_headers = {"size": str(len(content)), "comment": "x" * 600}
            archive.addfile(info, io.BytesIO(content))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    return out.getvalue()


def prepare(folder: Path) -> None:
    """Nothing is needed but the files that are written."""


def damaged(folder: Path, rng: random.Random, keep: Callable) -> tuple[str, Callable[[], object]]:
    """What is done with one input: read as shard and as archive of images, and unpacked."""
    name = rng.choice(sorted(FORMATS))
    data = whole(FORMATS[name])
    damage = rng.choice((mutate, _change_headers, _change_headers))
    data = damage(data, rng)
    path = folder / "a.tar"
    path.write_bytes(data)
    keep(path)
    unpacked = path
    if rng.random() < 0.3:
        unpacked = folder / "b.tar.gz"
        unpacked.write_bytes(gzip.compress(data, 1))

    def read() -> None:
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        with contextlib.suppress(DataError):
            archive = TarArchive(path)
            for member in archive.names():
                with contextlib.suppress(DataError):
                    archive.read(member)
        assert read_shard(str(path), "images") is not None
        extract(unpacked, out)
        members = list(tar_members(path))
        assert all(0 <= m.offset and 0 <= m.size for m in members)
        assert len(members) == sum(file.is_file() for file in out.rglob("*"))

    return f"{name} {damage.__name__}", read


def _change_headers(data: bytes, rng: random.Random) -> bytes:
    """Kinds, sizes and names of some headers changed, and their sums made right."""
    out = bytearray(data)
    headers = [at for at in range(0, len(out) - BLOCK, BLOCK) if out[at + 257 : at + 262] == b"ustar"]
    for at in rng.sample(headers, min(len(headers), rng.choice((1, 1, 2, 4)))):
        what = rng.choice(("size", "size", "kind", "kind", "name", "magic", "map"))
        if what == "size":
            out[at + 124 : at + 136] = rng.choice(_SIZES)
        elif what == "kind":
            out[at + 156] = rng.choice(b"\x000123457LKxXgSDNVZ")
        elif what == "name":
            out[at : at + 100] = rng.randbytes(100)
        elif what == "magic":
            out[at + 257 : at + 265] = rng.choice((b"ustar  \0", b"ustar\x0000", b"\0" * 8))
        else:
            out[at + 156], out[at + 482] = ord("S"), 1
        out[at + 148 : at + 156] = b" " * 8
        out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + BLOCK])
    return bytes(out)
