"""Images inside archives and tables: read in place, the same as from files of their own, in any process."""

from __future__ import annotations

import contextlib
import http.server
import io
import os
import pickle
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from evlgen.common.errors import DataError
from evlgen.datasets import archive_media
from evlgen.datasets.annotations import check_inside
from evlgen.datasets.archive_media import Place, cell_name, split_cell, split_place
from evlgen.datasets.media import ImageFiles, VideoFiles

COUNT = 5


def png(index: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4 + index, 3), (50 * index, 0, 9)).save(file, "PNG")
    return file.getvalue()


def name(index: int) -> str:
    return f"pictures/{index}.png"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """The same images in a folder, in archives, and in tables."""
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pictures").mkdir()
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        with tarfile.open(tmp_path / "a.tar", "w") as tarred:
            for index in range(COUNT):
                (tmp_path / name(index)).write_bytes(png(index))
                zipped.writestr(name(index), png(index))
                tarred.add(tmp_path / name(index), f"./{name(index)}")
    cells = [{"bytes": png(index), "path": None} for index in range(COUNT)]
    pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet", row_group_size=2)
    raw = pa.table({"image": [png(index) for index in range(COUNT)]})
    with pa.ipc.new_stream(tmp_path / "a.arrow", raw.schema) as writer:
        writer.write_table(raw, max_chunksize=2)
    return tmp_path


CONTAINERS = {
    "a.zip": name,
    "a.tar": name,
    "a.parquet": "#image:{}".format,
    "a.arrow": "#image:{}".format,
}


def inside(container: str, index: int) -> str:
    member = CONTAINERS[container](index)
    return f"{container}{member}" if member.startswith("#") else f"{container}/{member}"


def pixels(media: ImageFiles, name: str) -> np.ndarray:
    return np.asarray(media.open(name))


@pytest.mark.parametrize("container", CONTAINERS)
def test_images_are_the_same_inside_and_outside(folder, container):
    media = ImageFiles(folder)
    media.check([inside(container, i) for i in range(COUNT)], "")
    for index in (3, 0, 4, 1):
        assert np.array_equal(pixels(media, inside(container, index)), pixels(media, name(index)))


@pytest.mark.parametrize("container", ["a.zip", "a.tar"])
def test_an_archive_can_be_the_root(folder, container):
    for root, member in ((folder / container, name(2)), (folder / container / "pictures", "./2.png")):
        assert ImageFiles(root).open(member).size == (6, 3)


@pytest.mark.parametrize("container", CONTAINERS)
def test_each_process_opens_its_own_file_once(folder, container, monkeypatch):
    media = ImageFiles(folder)
    opened = []
    for kind in (archive_media.ZipArchive, archive_media.TarArchive, archive_media.TableColumn):
        first = kind.__init__
        monkeypatch.setattr(kind, "__init__", lambda self, *a, f=first: (opened.append(1), f(self, *a))[1])
    before = [pixels(media, inside(container, i)) for i in range(COUNT)]
    assert len(opened) == 1
    files = next(iter(media._containers.values()))
    mine = next(v for v in vars(files).values() if isinstance(v, archive_media.PerProcess))
    handle = mine.get()
    assert mine.get() is handle
    pids = iter([10**9, 10**9])
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(os, "getpid", lambda: next(pids))
        assert mine.get() is not handle
    again = pickle.loads(pickle.dumps(media))  # what a spawned worker gets
    assert all(np.array_equal(pixels(again, inside(container, i)), before[i]) for i in range(COUNT))


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_names_an_image_changes_with_its_bytes(folder, container):
    def sources() -> list:
        return [ImageFiles(folder).source(inside(container, index)) for index in range(COUNT)]

    before = sources()
    assert len(set(before)) == COUNT and sources() == before
    os.utime(folder / container, ns=(1, 1))
    assert (sources() == before) is (container == "a.zip")  # which has a checksum of each member


def test_a_member_of_a_zip_is_known_again_elsewhere_and_packed_otherwise(folder):
    source = ImageFiles(folder / "a.zip").source
    with zipfile.ZipFile(folder / "b.zip", "w") as packed:
        for index in reversed(range(COUNT)):
            packed.writestr(name(index), png(index if index else 1))
    again = ImageFiles(folder / "b.zip").source
    assert [again(name(i)) == source(name(i)) for i in range(COUNT)] == [False, *[True] * (COUNT - 1)]
    assert len({source("no.png"), source("other.png"), again("no.png")}) == 3
    (folder / "c.zip").write_bytes(b"no archive")
    assert "cannot be read" in ImageFiles(folder / "c.zip").source("1.png")


def test_forked_readers_do_not_disturb_each_other(folder):
    media = ImageFiles(folder / "a.zip")
    expected = [pixels(media, name(i)) for i in range(COUNT)]
    child = os.fork()
    for _ in range(20):
        same = all(np.array_equal(pixels(media, name(i)), expected[i]) for i in range(COUNT))
        if not same:
            break
    if child == 0:
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0 and same


@pytest.mark.parametrize("piece", ["x.parquet#", "x.parquet#a:1", ":1=a", "a.zip/", ".arrow#:", "=" * 9])
def test_names_of_any_length_are_looked_at_in_short_time(piece):
    start = time.process_time()
    assert split_place(piece * 100_000 + ":x") is None
    assert split_place("x.parquet#image:" + "1" * 100_000) is None
    assert time.process_time() - start < 2


def test_the_parts_of_a_cells_name():
    assert split_cell("d/a.parquet#b.parquet#c:7=0f")[:4] == ("d/a.parquet#b.parquet", "c", "7", "0f")
    assert split_cell("a.arrow#x:y:7")[:4] == ("a.arrow", "x:y", "7", None)
    assert split_cell(cell_name("a.parquet", "image", 3, b"x")).place == "a.parquet#image:3"
    assert [split_cell(name) for name in ("a.png", "a.parquet#:1", "a.parquet#b", "a.parquet#b:1=x")] == [
        None
    ] * 4


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_a_column_that_is_not_there_or_has_no_bytes_is_named(tmp_path, monkeypatch, suffix):
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path / "root"))
    table = pa.table({"image": [b"x"], "number": [1]})
    if suffix == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match="has no columns 'imag'. Did you mean 'image'"):
        ImageFiles(tmp_path).open(f"a.{suffix}#imag:0")
    with pytest.raises(DataError, match="row 0 of .* has no bytes in 'number'"):
        ImageFiles(tmp_path).open(f"a.{suffix}#number:0")


def test_a_folder_may_be_called_as_an_archive_is(folder):
    (folder / "b.zip").mkdir()
    (folder / "b.zip/1.png").write_bytes(png(1))
    assert split_place(str(folder / "b.zip/1.png")) is None
    assert ImageFiles(folder).open("b.zip/1.png").size == (5, 3)
    inner = split_place(str(folder / "a.zip/x.tar/1.png"))
    assert inner == Place(folder / "a.zip", None, "x.tar/1.png")


def test_members_that_are_not_there_are_named_with_the_nearest(folder):
    for container in ("a.zip", "a.tar"):
        media = ImageFiles(folder / container)
        with pytest.raises(
            DataError, match=r"has no member '2\.png' .*Did you mean 'pictures/2\.png'"
        ) as error:
            media.open("2.png")
        assert error.value.cause == "missing file"
        with pytest.raises(
            DataError, match=r"has none of the 2 images .*'1\.png'; it has 'pictures/0\.png'. Do."
        ):
            media.check(["1.png", "2.png"], "Do.")
    with pytest.raises(DataError, match="has no row 7"):
        ImageFiles(folder).open("a.arrow#image:7")


def test_damaged_archives_cost_what_is_damaged(folder):
    with zipfile.ZipFile(folder / "a.zip") as zipped:
        start = zipped.getinfo(name(1)).header_offset + 30 + len(name(1))
    content = bytearray((folder / "a.zip").read_bytes())
    content[start : start + 8] = b"damaged!"
    (folder / "a.zip").write_bytes(content)
    readable, causes = _read_all(ImageFiles(folder / "a.zip"))
    assert len(readable) == COUNT - 1 and causes == {"damaged archive"}

    tar = (folder / "a.tar").read_bytes()
    with tarfile.open(folder / "a.tar") as tarred:
        starts = [member.offset_data for member in tarred]
    (folder / "a.tar").write_bytes(tar[: starts[3] - 500])  # in the fourth's header
    readable, causes = _read_all(ImageFiles(folder / "a.tar"))
    assert len(readable) == 3 and causes == {"missing file"}
    with pytest.raises(DataError, match="It is damaged or cut off after byte"):
        ImageFiles(folder / "a.tar").open(name(4))
    (folder / "a.tar").write_bytes(tar[: starts[2] + 20])  # in the third image
    readable, causes = _read_all(ImageFiles(folder / "a.tar"))
    assert readable == [0, 1] and causes == {"damaged archive", "missing file"}


def _read_all(media: ImageFiles) -> tuple[list[int], set[str]]:
    readable, causes = [], set()
    for index in range(COUNT):
        try:
            media.open(name(index))
            readable.append(index)
        except DataError as error:
            causes.add(error.cause)
    return readable, causes


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_what_is_no_archive_is_said_to_be_none(folder, suffix):
    (folder / f"b{suffix}").write_bytes(b"not at all an archive" * 60)
    with pytest.raises(DataError, match=rf"b\{suffix} is not a {suffix[1:]} archive"):
        ImageFiles(folder / f"b{suffix}").check(["1.png"], "")


def test_compressed_tars_and_videos_in_archives_are_refused_with_a_remedy(folder):
    (folder / "a.tar").rename(folder / "a.tar.gz")
    with pytest.raises(DataError, match="compressed as a whole.*Unpack it, or pack its files as .zip"):
        ImageFiles(folder / "a.tar.gz").open(name(1))
    with pytest.raises(
        DataError, match=r"a\.zip is an archive, and videos are not read inside of one: unpack"
    ):
        VideoFiles(folder).open("a.zip/1.mp4")


def test_every_row_of_a_table_in_several_chunks_is_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path / "cache"))
    table = pa.table({"image": [png(index) for index in range(7)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    for name in ("a.parquet", "a.arrow"):
        media = ImageFiles(tmp_path)
        sizes = {row: media.open(f"{name}#image:{row}").width - 4 for row in (6, 2, 3, 0, 5, 1, 4)}
        assert sizes == {row: row for row in range(7)}
        with pytest.raises(DataError, match="has no row 7"):
            media.open(f"{name}#image:7")


def test_what_cannot_be_there_is_told_and_refused_only_where_it_is_everything(folder, caplog):
    os.symlink(folder / "loop", folder / "loop")
    (folder / "bad.zip").write_bytes(b"no archive")
    (folder / "bad.tar.gz").write_bytes(b"compressed")
    bad = {
        "loop/1.png": "link to itself",
        "gone/1.png": "missing file",
        "gone.zip/1.png": "missing file",
        "bad.zip/1.png": "damaged archive",
        "bad.tar.gz/1.png": "compressed archive",
        "a.zip/2.png": "missing file",
    }
    media = ImageFiles(folder)
    media.check([*bad, name(1)], "Fix it.")
    (line,) = caplog.messages
    assert line.startswith("6 of 7 records will be skipped: ") and line.endswith(" Fix it.")
    assert "(It is so with 5 elsewhere.)" in line
    for image, cause in bad.items():
        with pytest.raises(DataError) as error:
            media.open(image)
        assert error.value.cause == cause
        media.source(image)
    assert media.open(name(1)).size == (5, 3)
    with pytest.raises(DataError, match=r"Fix it\.$"):
        media.check(bad, "Fix it.")


def test_names_with_a_scheme_go_through_iopath(folder):
    media = ImageFiles("/nowhere")
    media.check([f"file://{folder}/{name(3)}", "store://bucket/1.png"], "")
    assert media.open(f"file://{folder}/{name(3)}").size == (7, 3)
    with pytest.raises(DataError, match="cannot read image .*assets/no.png: the file does not exist"):
        media.open("evlgen://assets/no.png")
    with pytest.raises(DataError, match="nothing here reads store:// addresses") as error:
        media.open("store://bucket/1.png")
    assert error.value.cause == "not downloaded"


@pytest.mark.parametrize(
    ("annotation", "name", "passes"),
    [
        ("https://host/a.json", "https://other/1.png", True),
        ("https://host/a.json", "sub/1.png", True),
        ("https://host/a.json", "file:///etc/passwd", False),
        ("https://host/a.json", "evlgen://assets/1.png", False),
        ("https://host/a.json", "store://bucket/1.png", False),
        ("store://bucket/a.json", "store://bucket/1.png", True),
        ("/data/a.json", "file:///etc/passwd", False),
        ("/data/a.json", "../1.png", False),
    ],
)
def test_annotations_from_addresses_name_no_files_of_this_machine(annotation, name, passes):
    with contextlib.nullcontext() if passes else pytest.raises(DataError, match="leads out of the image"):
        check_inside([name], annotation)


def test_a_member_that_claims_too_much_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(archive_media, "MAX_MEMBER_BYTES", 10)
    for container in ("a.zip", "a.tar"):
        with pytest.raises(DataError, match="that is no image") as error:
            ImageFiles(folder / container).open(name(0))
        assert error.value.cause == "too large"


def test_images_behind_addresses_are_fetched_once(folder):
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{name(3)}"
        media = ImageFiles(folder / "elsewhere")
        media.check([address], "")
        for _ in range(2):
            assert media.open(address).size == (7, 3)
        assert asked == [f"/{name(3)}"] and media.source(address) == address
        with pytest.raises(DataError) as error:
            media.open(address.replace("3.png", "99.png"))
        assert error.value.cause == "not downloaded"
        server.shutdown()
