"""One reader of tar headers: what tarfile finds in whole files, and an end in short time in any other."""

from __future__ import annotations

import io
import tarfile
import time
import tracemalloc

import pytest

from evlgen.common.errors import DataError
from evlgen.datasets.archive_media import TarArchive
from evlgen.datasets.shards import read_shard
from evlgen.files.archives import extract
from evlgen.files.tar_headers import DamagedTarError, read_members, tar_members

NAMES = ["a.png", "folder/" + "x" * 120 + "/é.png", "y" * 99, "z" * 100, "\udcff.png", "w/" * 200 + "a.txt"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(form):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, pax_headers={"comment": "global"}) as archive:
        for size, name in enumerate(NAMES[: 4 if form == tarfile.USTAR_FORMAT else None], start=511):
            info = tarfile.TarInfo(name)
            info.size, info.uid, info.mtime = size, 1 << 20, 1.5 if form == tarfile.PAX_FORMAT else 1
            archive.addfile(info, io.BytesIO(bytes(size)))
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"kind {kind.decode()}")
            info.type, info.linkname = kind, "a.png" if form == tarfile.USTAR_FORMAT else NAMES[-1]
            archive.addfile(info)
        info = tarfile.TarInfo("last")
        archive.addfile(info)
    file.seek(0)
    with tarfile.open(fileobj=file) as archive:
        expected = [(m.name, m.offset_data, m.size, m.isreg(), m.isdir()) for m in archive]
    found = list(read_members(file, needs_end=True))
    assert [(m.name, m.offset, m.size, m.kind == "file", m.kind == "folder") for m in found] == expected
    assert [m.kind for m in found if m.name.startswith("kind")] == [
        "folder",
        "link",
        "link",
        "other",
        "other",
    ]


def header(name: str, kind: bytes = b"0", size: bytes = b"00000000000\0") -> bytes:
    content = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    content[124:136], content[156:157], content[148:156] = size, kind, b" " * 8
    content[148:156] = b"%06o\0 " % sum(content)
    return bytes(content)


def binary(size: int) -> bytes:
    return (b"\xff" if size < 0 else b"\x80") + (size % 2**88).to_bytes(11, "big")


FIRST = (
    header("a.png", size=b"00000000001\0") + b"x".ljust(512, b"\0") + header("a.txt", size=b"1" + b"\0" * 11)
)
FIRST += b"x".ljust(512, b"\0")
HOSTILE = {
    "negative": header("b.png", size=binary(-1024)) + bytes(1024),
    "negative in octal": header("b.png", size=b"-0000002000\0") + bytes(1024),
    "huge": header("b.png", size=binary(1 << 80)),
    "long name": header("b", b"L", binary(20 << 30)),
    "long link": header("b", b"K", binary(20 << 30)),
    "pax": header("b", b"x", binary(20 << 30)),
    "global": header("b", b"g", binary(20 << 30)),
    "negative long name": header("b", b"L", binary(-512)),
    "pax size": header("b", b"x", b"00000000015\0") + b"13 size=-512\n".ljust(512, b"\0") + header("b.png"),
    "pax digits": header("b", b"x", b"00000001000\0") + b"512 size=" + b"9" * 502 + b"\n" + header("b.png"),
    "pax length": header("b", b"x", b"00000000015\0") + b"0 size=1\n".ljust(512, b"\0") + header("b.png"),
    "chain": (header("b", b"L", b"00000000001\0") + b"b".ljust(512, b"\0")) * 3000,
    "sparse": header("b.png", b"S")[:482] + b"\1" + header("b.png", b"S")[483:],
    "no member": header("b", b"L", b"00000000001\0") + b"b".ljust(512, b"\0"),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("at_start", [False, True])
def test_hostile_headers_end_the_reading_in_short_time_and_little_memory(tmp_path, kind, at_start):
    path = tmp_path / "0.tar"
    path.write_bytes(b"" if at_start else FIRST)
    with open(path, "ab") as file:
        file.write(HOSTILE[kind])
        if kind != "sparse":
            file.write(bytes(1024))
            file.truncate(30 << 30)  # as if all that is claimed were there
    start = time.process_time()
    tracemalloc.start()
    index = read_shard(str(path), "images")
    assert len(index.samples) == (0 if at_start else 1) and index.damage.cause == "damaged shard"
    if at_start:
        with pytest.raises(DataError, match="is not a tar archive"):
            TarArchive(path)
    else:
        assert list(TarArchive(path).names()) == ["a.png", "a.txt"]
    with pytest.raises(DataError, match="cannot be unpacked|is refused"):
        extract(path, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - start < 2 and peak < 20 << 20


def test_an_end_without_its_mark_is_one_between_members_unless_it_is_asked_for(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(FIRST)
    assert [member.name for member in tar_members(path)] == ["a.png", "a.txt"]
    with open(path, "rb") as file, pytest.raises(DamagedTarError, match="cut off"):
        list(read_members(file, needs_end=True))
    path.write_bytes(FIRST[:-1])
    with pytest.raises(DataError, match="is damaged or cut off at byte 2048"):
        list(tar_members(path))
