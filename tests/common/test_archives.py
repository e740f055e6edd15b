"""Archives: what they hold lands in the folder, whole or not at all, and never anywhere else."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from evlgen.common.errors import DataError
from evlgen.files import archives
from evlgen.files.archives import Limits, extract, extract_into, fetch_archive
from evlgen.files.io import download_target

FILES = {"train/0001.jpg": b"one", "train/0002.jpg": b"two" * 1000, "captions.json": b"[]"}


def tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for info, content in members:
            if info.isreg():
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def tar_member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def zipped(path: Path, members: dict[str, bytes], mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return path


def content_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(archive: Path, match: str, **limits: int) -> None:
    """Unpacking raises, and neither the folder nor anything else is there after it."""
    root = archive.parent
    before = sorted(root.parent.rglob("*"))
    with pytest.raises(DataError, match=match) as caught:
        extract(archive, root / "out", Limits(**limits))
    assert str(archive) in str(caught.value)
    assert sorted(root.parent.rglob("*")) == before


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_what_is_in_an_archive_lands_in_the_folder(tmp_path, suffix: str) -> None:
    path = tmp_path / f"images.{suffix}"
    if suffix == "zip":
        zipped(path, FILES)
    else:
        mode = "w:" + suffix.partition(".")[2]
        folder = tar_member("train", tarfile.DIRTYPE)
        tar(path, [(folder, b""), *((tar_member(n), c) for n, c in FILES.items())], mode)
    assert content_of(extract(path, tmp_path / "out")) == FILES
    assert stat.S_IMODE((tmp_path / "out" / "captions.json").stat().st_mode) & 0o111 == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, "out"]


def test_a_folder_that_has_files_is_left_alone(tmp_path) -> None:
    zipped(tmp_path / "a.zip", FILES)
    (tmp_path / "out").mkdir()
    extract(tmp_path / "a.zip", tmp_path / "out")
    with pytest.raises(DataError, match="is there already"):
        extract(tmp_path / "a.zip", tmp_path / "out")
    assert content_of(tmp_path / "out") == FILES


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("../evil", "leads out"),
        ("a/../../evil", "leads out"),
        ("a\\..\\..\\evil", "leads out"),
        ("/tmp/evil", "absolute"),
        ("//tmp/evil", "absolute"),
        ("\\tmp\\evil", "absolute"),
        ("C:\\evil", "absolute"),
        ("C:evil", "absolute"),
        ("a\nb", "name that no file"),
        ("x" * 5000, "name that no file"),
    ],
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_name_that_leads_out_is_refused(tmp_path, kind: str, name: str, match: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    members = {"good": b"1", name: b"2"}
    if kind == "zip":
        refused(zipped(inner / "a.zip", members), match)
    else:
        refused(tar(inner / "a.tar", [(tar_member(n), c) for n, c in members.items()]), match)


@pytest.mark.parametrize(
    ("kind", "link", "match"),
    [
        (tarfile.SYMTYPE, "/etc", "a link"),
        (tarfile.SYMTYPE, "../..", "a link"),
        (tarfile.SYMTYPE, "good", "a link"),
        (tarfile.LNKTYPE, "../secret", "a link"),
        (tarfile.CHRTYPE, "", "no plain file"),
        (tarfile.BLKTYPE, "", "no plain file"),
        (tarfile.FIFOTYPE, "", "no plain file"),
        (b"Z", "", "no plain file"),
    ],
)
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind: bytes, link: str, match: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "secret").write_text("secret")
    members = [(tar_member("good"), b"1"), (tar_member("door", kind, link), b"")]
    if kind == b"Z":
        members[1][0].type = tarfile.CONTTYPE  # written as a file, its type patched below
    path = tar(inner / "a.tar", members)
    if kind == b"Z":
        whole = bytearray(path.read_bytes())
        header = whole[1024:1536]
        header[156:157], header[148:156] = b"6", b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        whole[1024:1536] = header
        path.write_bytes(whole)
    refused(path, match)


@pytest.mark.parametrize(("mode", "match"), [(stat.S_IFLNK, "a link"), (stat.S_IFIFO, "no plain file")])
def test_links_and_pipes_in_a_zip_are_refused(tmp_path, mode: int, match: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    refused(zipped(inner / "a.zip", {"door": b"/etc/passwd"}, mode | 0o777), match)


def test_a_file_through_a_link_of_the_archive_is_refused(tmp_path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "outside").mkdir()
    door = tar_member("door", tarfile.SYMTYPE, str(tmp_path / "outside"))
    refused(tar(inner / "a.tar", [(door, b""), (tar_member("door/evil"), b"x")]), "a link")
    assert not list((tmp_path / "outside").iterdir())


def test_two_members_of_one_name_and_files_inside_files_are_refused(tmp_path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    two = [(tar_member("a"), b"1"), (tar_member("./a"), b"2")]
    refused(tar(inner / "a.tar", two), "there twice")
    inside = [(tar_member("a"), b"1"), (tar_member("a/b"), b"2")]
    refused(tar(inner / "b.tar", inside), "inside another file")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_bombs_are_refused_before_anything_is_written(tmp_path, kind: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    zeros = b"\0" * 50_000_000
    if kind == "zip":
        path = zipped(inner / "a.zip", {"zeros": zeros})
    else:
        path = tar(inner / "a.tar.gz", [(tar_member("zeros"), zeros)], "w:gz")
    assert path.stat().st_size < 100_000
    refused(path, "200 times its own size")
    refused(path, "more than 1000 bytes", bytes=1000)
    many = {f"{i}": b"" for i in range(20)}
    if kind == "zip":
        refused(zipped(inner / "b.zip", many), "more than 10 members", files=10)
    else:
        refused(tar(inner / "b.tar", [(tar_member(n), b"") for n in many]), "more than 10 members", files=10)


def test_a_zip_that_holds_more_than_it_says_is_refused(tmp_path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path = zipped(inner / "a.zip", {"zeros": b"\0" * 1_000_000})
    true, said = (1_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(true, said))
    refused(path, "cannot be unpacked")


def test_a_tar_header_that_claims_a_huge_name_takes_no_memory(tmp_path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    name = tarfile.TarInfo("@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 8 << 30
    (inner / "a.tar").write_bytes(name.tobuf(tarfile.GNU_FORMAT) + b"\0" * 10240)
    refused(inner / "a.tar", "a header is too large")


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tar.xz"])
@pytest.mark.parametrize("keep", [0, 3, 0.3, 0.8])
def test_a_truncated_archive_leaves_nothing(tmp_path, suffix: str, keep: float) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path = inner / f"a.{suffix}"
    noise = {f"{i}.bin": os.urandom(3000) for i in range(5)}
    if suffix == "zip":
        zipped(path, noise)
    else:
        tar(path, [(tar_member(n), c) for n, c in noise.items()], "w:" + suffix.partition(".")[2])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep if keep >= 1 else keep * len(whole))])
    if suffix == "tar" and keep == 3:
        path.write_bytes(b"xyz")
    refused(path, "cannot be unpacked")


def test_a_tar_cut_between_two_members_is_refused(tmp_path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path = tar(inner / "a.tar", [(tar_member(n), b"x" * 512) for n in "abc"])
    path.write_bytes(path.read_bytes()[: 2 * 1024])
    refused(path, "cut off")


def test_an_encrypted_zip_is_refused(tmp_path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path = zipped(inner / "a.zip", {"a": b"1"})
    whole = bytearray(path.read_bytes())
    for start in (whole.index(b"PK\x03\x04") + 6, whole.index(b"PK\x01\x02") + 8):
        whole[start] |= 1
    path.write_bytes(whole)
    refused(path, "encrypted")


def test_an_archive_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match="no archive at"):
        extract(tmp_path / "none.zip", tmp_path / "out")


def test_a_process_that_is_not_the_first_to_unpack_takes_what_is_there(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path))
    url = "http://127.0.0.1:9/a.zip"
    target = download_target(url)
    target.parent.mkdir(parents=True)
    zipped(target, FILES)

    def late(archive: Path, folder: Path) -> None:
        extract(archive, folder)  # another process, between the look at the folder and the unpacking
        extract(archive, folder)

    monkeypatch.setattr("evlgen.files.archives.extract", late)
    assert content_of(fetch_archive(url)) == FILES and not target.exists()


def test_several_archives_fill_one_folder(tmp_path) -> None:
    extract_into(zipped(tmp_path / "a.zip", {"train/1.jpg": b"1"}), tmp_path / "images")
    extract_into(zipped(tmp_path / "b.zip", {"val/2.jpg": b"2", "train/3.jpg": b"3"}), tmp_path / "images")
    (tmp_path / "images" / "mine.txt").write_bytes(b"mine")
    extract_into(zipped(tmp_path / "c.zip", {"4.jpg": b"4", "train/1.jpg": b"1"}), tmp_path / "images")
    assert content_of(tmp_path / "images") == {
        "train/1.jpg": b"1",
        "val/2.jpg": b"2",
        "train/3.jpg": b"3",
        "4.jpg": b"4",
        "mine.txt": b"mine",
    }


def test_the_content_of_one_folder_of_an_archive_is_taken(tmp_path) -> None:
    path = zipped(tmp_path / "a.zip", {"images/1.jpg": b"1", "images/more/2.jpg": b"2", "readme.txt": b"x"})
    extract_into(path, tmp_path / "out", strip="images")
    assert content_of(tmp_path / "out") == {"1.jpg": b"1", "more/2.jpg": b"2"}
    with pytest.raises(DataError, match="has no folder 'clips'; it has images, readme.txt"):
        extract_into(path, tmp_path / "other", strip="clips")
    assert list((tmp_path / "other").iterdir()) == []


@pytest.mark.parametrize("there", ["train/1.jpg", "train", "train/1.jpg/x"])
def test_what_is_there_with_other_content_is_not_replaced(tmp_path, there: str) -> None:
    mine = tmp_path / "images" / there
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    path = zipped(tmp_path / "a.zip", {"new.jpg": b"new", "train/1.jpg": b"1"})
    with pytest.raises(DataError, match="train.* is there already, with other content. Move it away"):
        extract_into(path, tmp_path / "images")
    mine.unlink()
    for parent in list(mine.parents)[: there.count("/")]:
        parent.rmdir()
    extract_into(path, tmp_path / "images")
    assert content_of(tmp_path / "images") == {"new.jpg": b"new", "train/1.jpg": b"1"}


def test_unpacking_that_was_killed_goes_on(tmp_path, monkeypatch) -> None:
    path = zipped(tmp_path / "a.zip", {"train/1.jpg": b"1", "val/2.jpg": b"2"})

    def killed(*args) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # while it was being unpacked
        patch.setattr(archives, "_write", killed)
        patch.setattr(archives.shutil, "rmtree", lambda *args, **kwargs: None)
        extract_into(path, tmp_path / "images")
    assert len(list((tmp_path / "images").iterdir())) == 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # between two moves
        move = os.replace
        moves: list[Path] = []

        def replace(source, target) -> None:
            if Path(target).name == "val":
                raise KeyboardInterrupt
            moves.append(target)
            move(source, target)

        patch.setattr(archives.os, "replace", replace)
        extract_into(path, tmp_path / "images")
    assert tmp_path / "images" / "train" in moves
    extract_into(path, tmp_path / "images")
    assert content_of(tmp_path / "images") == {"train/1.jpg": b"1", "val/2.jpg": b"2"}
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == ["train", "val"]


def test_nothing_escapes_into_a_folder_that_has_files(tmp_path) -> None:
    (tmp_path / "images").mkdir()
    before = sorted(tmp_path.rglob("*"))
    path = zipped(tmp_path / "a.zip", {"good": b"1", "../evil": b"2"})
    with pytest.raises(DataError, match="leads out"):
        extract_into(path, tmp_path / "images")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path])
