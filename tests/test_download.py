"""``python -m evlgen download``: published datasets come to their places from a server on this machine."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from file_server import FileServer, cut, error, file_server

from evlgen import cli
from evlgen.config import catalogue as catalogue_module
from evlgen.config.catalogue import CATALOGUE, DATASETS, KINDS, catalogue, command_for, find_entry, items_of
from evlgen.datasets import dataset_download
from evlgen.files import downloads
from evlgen.files.io import PACKAGE_ROOT

NOISE = random.Random(2).randbytes(200_000)
ANNOTATION = b'[{"image": "train/1.jpg", "caption": "a cat", "image_id": 1}]'


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server with the small dataset `pets`, and a catalogue that names it."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(downloads, "PAUSES", (0, 0))
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path / "elsewhere"))
    with file_server() as server:
        server.files = {
            "/train.json": ANNOTATION,
            "/words.json": b"[]",
            "/train.zip": zipped({"train/1.jpg": NOISE}),
            "/images.zip": zipped({"images/val/2.jpg": b"two", "license.txt": b"free"}),
        }
        server.etags = {path: '"1"' for path in server.files}
        describe(server, tmp_path, monkeypatch)
        yield server
    catalogue.cache_clear()


def describe(server: FileServer, folder: Path, monkeypatch) -> None:
    def source(storage: str, path: str) -> dict:
        return {"storage": storage, "url": server.address + path, "md5": md5(server.files[path])}

    images = {
        "storage": "pets/images/",
        "url": [f"{server.address}/train.zip", f"{server.address}/images.zip"],
        "md5": md5(server.files["/train.zip"]),
    }
    dataset = {
        "data_type": "images",
        "build_info": {"annotations": {"train": source("pets/train.json", "/train.json")}, "images": images},
        "answer_list": source("pets/words.json", "/words.json"),
    }
    videos = {"build_info": {"annotations": {}, "videos": {"storage": "pets/clips"}}}
    entry = {
        "title": "Pets",
        "datasets": ["pet_caption", "pet_clips"],
        "licences": ["CC BY 4.0, https://example.org"],
        "sizes": {"train.zip": len(server.files["/train.zip"])},
        "strip": {"images.zip": "images"},
        "by_hand": {"videos": "Ask the owner."},
        "use": "python train.py --cfg-path pets.yaml",
    }
    for name, section in {"pet_caption": dataset, "pet_clips": videos}.items():
        write(folder / "datasets" / f"{name}.yaml", {"datasets": {name: section}})
    write(folder / "downloads.yaml", {"downloads": {"pets": entry}})
    monkeypatch.setattr(catalogue_module, "CATALOGUE", folder / "downloads.yaml")
    monkeypatch.setattr(catalogue_module, "DATASETS", folder / "datasets")
    catalogue.cache_clear()


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(content))


def content_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def shown_files(folder: Path) -> set[str]:
    return {name for name in content_of(folder) if "/." not in name}


def download(root: Path, *options: str) -> int:
    return cli.main(["download", "pets", "--to", str(root), *options])


WHOLE = {"pets/train.json", "pets/words.json", "pets/images/train/1.jpg", "pets/images/val/2.jpg"}


def test_everything_comes_to_its_place_and_is_not_fetched_twice(server, tmp_path, capsys) -> None:
    root = tmp_path / "root"
    assert download(root, "--yes") == 0
    assert shown_files(root) == WHOLE
    assert (root / "pets/images/train/1.jpg").read_bytes() == NOISE
    out = capsys.readouterr().out
    assert "CC BY 4.0" in out and "4 of 5 files and archives are here" in out
    assert re.search(r"pets/images/train.zip +200 kB +missing", out)  # from the catalogue
    assert re.search(r"pets/train.json +61 bytes +missing", out)  # from the server
    assert f"{root}/pets/clips has to come by hand. Ask the owner." in out
    assert f"EVLGEN_CACHE={root} python train.py --cfg-path pets.yaml" in out
    server.requests.clear()
    (root / "pets/words.json").unlink()
    (root / "pets/clips").mkdir()
    (root / "pets/clips/1.mp4").write_bytes(b"clip")
    assert download(root, "--yes") == 0
    assert [path for path, _ in server.requests] == ["/words.json"]
    assert "5 of 5 files and archives are here" in capsys.readouterr().out
    assert download(root) == 0  # nothing is to be asked
    assert "to fetch: nothing" in capsys.readouterr().out


def test_what_was_taken_away_is_fetched_again(server, tmp_path) -> None:
    assert download(tmp_path / "root", "--yes") == 0
    shutil.rmtree(tmp_path / "root/pets/images/train")
    server.requests.clear()
    assert download(tmp_path / "root", "--yes") == 0
    assert [path for path, _ in server.requests] == ["/train.zip"]
    assert shown_files(tmp_path / "root") == WHOLE


def test_archives_are_kept_where_that_is_wanted(server, tmp_path) -> None:
    assert download(tmp_path / "root", "--yes", "--keep-archives") == 0
    kept = {"pets/images/train.zip", "pets/images/images.zip"}
    assert shown_files(tmp_path / "root") == WHOLE | kept


def test_an_interrupted_command_goes_on_where_it_was(server, tmp_path, monkeypatch, capsys) -> None:
    chunk = downloads._chunk

    def interrupted(answer):
        if answer.url.endswith("/train.zip") and "read" in calls:
            raise KeyboardInterrupt
        calls.append("read" if answer.url.endswith("/train.zip") else "")
        return chunk(answer)

    calls: list[str] = []
    monkeypatch.setattr(downloads, "_CHUNK", 150_000)
    with monkeypatch.context() as patch:
        patch.setattr(downloads, "_chunk", interrupted)
        assert download(tmp_path / "root", "--yes") == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    server.requests.clear()
    assert download(tmp_path / "root", "--yes") == 0
    assert "begun" in capsys.readouterr().out
    assert server.requests == [("/train.zip", "bytes=150000-"), ("/images.zip", None)]
    assert shown_files(tmp_path / "root") == WHOLE


def test_one_that_cannot_be_fetched_keeps_none_of_the_others(server, tmp_path, capsys) -> None:
    del server.files["/train.json"]
    assert download(tmp_path / "root", "--yes") == 1
    assert "/train.json could not be downloaded (HTTP Error 404" in capsys.readouterr().err
    assert shown_files(tmp_path / "root") == WHOLE - {"pets/train.json"}


def test_a_wrong_sum_keeps_nothing(server, tmp_path, capsys) -> None:
    server.files["/train.zip"] = zipped({"train/1.jpg": b"changed"})
    assert download(tmp_path / "root", "--yes", "--only", "images") == 1
    assert "train.zip was refused: its md5 is" in capsys.readouterr().err
    assert shown_files(tmp_path / "root") == {"pets/images/val/2.jpg"}


def test_an_archive_that_leads_out_writes_nothing(server, tmp_path, capsys) -> None:
    server.files["/images.zip"] = zipped({"images/a.jpg": b"a", "../../evil": b"evil"})
    assert download(tmp_path / "root", "--yes") == 1
    assert "is refused: its member '../../evil' leads out of the folder" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.name in ("evil", "a.jpg")]


def test_passing_troubles_are_waited_out(server, tmp_path) -> None:
    server.faults = [error(503), cut(0)]
    assert download(tmp_path / "root", "--yes", "--only", "annotations") == 0
    assert shown_files(tmp_path / "root") == {"pets/train.json", "pets/words.json"}


def test_files_of_ones_own_are_left_alone(server, tmp_path, capsys) -> None:
    root = tmp_path / "root"
    (root / "pets/images/train").mkdir(parents=True)
    (root / "pets/images/train/1.jpg").write_bytes(b"mine")
    (root / "pets/train.json").write_bytes(b"[]")
    assert download(root, "--yes") == 1
    out, err = capsys.readouterr()
    assert re.search(r"pets/images/train.zip .*has files", out) and "--only annotations gets the rest" in out
    assert re.search("pets/train.json +here, and not the published file", out)
    assert "1.jpg is there already, with other content" in err
    assert (root / "pets/images/train/1.jpg").read_bytes() == b"mine"
    assert (root / "pets/train.json").read_bytes() == b"[]"


def test_an_archive_put_there_by_hand_is_unpacked_without_a_connection(server, tmp_path, capsys) -> None:
    images = tmp_path / "root" / "pets" / "images"
    images.mkdir(parents=True)
    (images / "train.zip").write_bytes(server.files["/train.zip"])
    (images / "images.zip").write_bytes(server.files["/images.zip"])
    server.files.clear()
    assert download(tmp_path / "root", "--yes", "--only", "images") == 0
    assert shown_files(tmp_path / "root") == {"pets/images/train/1.jpg", "pets/images/val/2.jpg"}
    assert not server.requests


def test_another_file_of_an_archives_name_is_named(server, tmp_path, capsys) -> None:
    archive = tmp_path / "root" / "pets" / "images" / "train.zip"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(zipped({"train/1.jpg": b"other"}))
    assert download(tmp_path / "root", "--yes") == 1
    assert f"{archive} is there already, with the md5" in capsys.readouterr().err
    assert archive.is_file() and not (archive.parent / "train").exists()


def test_a_disk_without_room_is_said_before_anything_is_fetched(
    server, tmp_path, monkeypatch, capsys
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(dataset_download.shutil, "disk_usage", lambda path: usage._replace(free=300_000))
    assert download(tmp_path / "root", "--yes") == 1
    # 200,128 bytes of train.zip and as many unpacked
    assert "401 kB are needed, with room for unpacking, and 300 kB are free" in capsys.readouterr().err
    assert not server.requests and not (tmp_path / "root").exists()
    assert download(tmp_path / "root", "--yes", "--only", "annotations") == 0


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("YES", 0), ("", 1), ("no", 1), (None, 1)])
def test_it_asks_first(server, tmp_path, monkeypatch, answer, code) -> None:
    def asked(question: str) -> str:
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", asked)
    assert download(tmp_path / "root") == code
    assert bool(server.requests) == (code == 0) == (tmp_path / "root").exists()


def test_where_nobody_can_be_asked_it_wants_yes(server, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert download(tmp_path / "root") == 1
    assert "add --yes" in capsys.readouterr().err and not server.requests


def test_the_list_says_what_there_is_and_what_is_here(server, tmp_path, capsys) -> None:
    assert download(tmp_path / "elsewhere", "--yes", "--only", "annotations") == 0
    capsys.readouterr()
    assert cli.main(["download"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"pets +Pets", out) and "CC BY 4.0" in out
    assert "annotations: 2 of 2 here; images: 200 kB, 0 of 2 here; videos: by hand, 0 of 1 here" in out


def test_an_unknown_name_is_answered_with_the_nearest(capsys) -> None:
    assert cli.main(["download", "vqa2"]) == 1
    assert "there is no download 'vqa2'. Did you mean 'vqav2'" in capsys.readouterr().err


@pytest.fixture
def birds(server, tmp_path) -> FileServer:
    """A dataset whose images have an address each, as those of nocaps have."""
    names = ["val/1.jpg", "val/2 b.jpg", "test/3.jpg"]
    server.files["/birds.json"] = json.dumps(
        [{"image": name, "caption": ["a bird"]} for name in names]
    ).encode()
    server.files |= {"/validation/1.jpg": b"one", "/validation/2%20b.jpg": b"two", "/test/3.jpg": b"three"}
    source = {"storage": "birds/birds.json", "url": f"{server.address}/birds.json"}
    info = {"annotations": {"val": source}, "images": {"storage": "birds/images"}}
    write(tmp_path / "datasets" / "birds.yaml", {"datasets": {"birds": {"build_info": info}}})
    entry = {
        "title": "Birds",
        "datasets": ["birds"],
        "licences": ["free"],
        "pictures": {"val": f"{server.address}/validation/", "test": f"{server.address}/test/"},
    }
    write(tmp_path / "downloads.yaml", {"downloads": {"birds": entry}})
    catalogue.cache_clear()
    return server


def test_images_with_an_address_each_come_one_by_one_and_once(birds, tmp_path, capsys) -> None:
    root = tmp_path / "root"
    gone = birds.files.pop("/test/3.jpg")
    command = ["download", "birds", "--yes", "--to", str(root)]
    assert cli.main(command) == 1
    assert re.search(r"1 of 3 images did not come. .*/test/3.jpg .*404", capsys.readouterr().err)
    birds.files["/test/3.jpg"] = gone
    birds.requests.clear()
    assert cli.main(command) == 0
    assert re.search("birds/images .*begun", capsys.readouterr().out)
    assert [path for path, _ in birds.requests] == ["/test/3.jpg"]
    images = {"val/1.jpg": b"one", "val/2 b.jpg": b"two", "test/3.jpg": b"three"}
    assert content_of(root / "birds/images") == images
    assert cli.main(command) == 0
    assert "to fetch: nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["../evil.jpg", "val/../../evil.jpg", "/etc/evil.jpg", "other/1.jpg", "val/.."]
)
def test_an_image_that_would_lie_elsewhere_is_refused(birds, tmp_path, capsys, name: str) -> None:
    birds.files["/birds.json"] = json.dumps([{"image": name}]).encode()
    assert cli.main(["download", "birds", "--yes", "--to", str(tmp_path / "root")]) == 1
    assert "for which there is no address" in capsys.readouterr().err
    assert list(content_of(tmp_path / "root")) == ["birds/birds.json"]


def test_a_server_that_has_no_images_is_asked_for_a_few(birds, tmp_path, capsys) -> None:
    names = [f"val/x{i}.jpg" for i in range(300)]
    birds.files["/birds.json"] = json.dumps([{"image": name} for name in names]).encode()
    assert cli.main(["download", "birds", "--yes", "--to", str(tmp_path / "root")]) == 1
    assert "at least 20 of 300 images did not come" in capsys.readouterr().err
    assert len(birds.requests) < 60


# What is published


@pytest.mark.parametrize("name", list(catalogue()))
def test_an_entry_names_files_that_can_be_got(name: str) -> None:
    entry = find_entry(name)
    items = items_of(entry)
    assert items and entry.licences and {item.kind for item in items} <= set(KINDS)
    archives = {item.file_name for item in items if item.is_archive and item.url}
    fetched = {item.file_name or item.storage for item in items if item.can_be_fetched}
    assert set(entry.strip) <= archives and set(entry.sizes) <= fetched
    for item in items:
        if not item.can_be_fetched:
            assert item.kind in entry.by_hand, f"nothing says where {item.storage} comes from"
        elif item.url:
            assert item.url.startswith(("https://", "http://images.cocodataset.org/")) and item.file_name
    if entry.use:
        project = entry.use.rpartition(" ")[2]
        assert (PACKAGE_ROOT / project).is_file(), project


def test_one_address_has_one_sum_and_one_size() -> None:
    known: dict[str, set] = {}
    for entry in catalogue().values():
        for item in items_of(entry):
            if item.url:
                known.setdefault(item.url, set()).add((item.md5, item.size, item.strip))
    assert {url: facts for url, facts in known.items() if len(facts) > 1} == {}


def test_cocos_archives_go_into_one_folder_under_their_own_names() -> None:
    archives = [item for item in items_of(find_entry("coco")) if item.is_archive]
    assert [(i.storage, i.file_name, i.strip) for i in archives] == [
        ("coco/images", "train2014.zip", None),
        ("coco/images", "val2014.zip", None),
    ]


def test_a_command_is_named_for_what_it_gets() -> None:
    assert command_for("coco_caption", "coco/images/") == "python -m evlgen download coco"
    assert (
        command_for("gqa", "gqa/annotations/val_balanced_questions.json") == "python -m evlgen download gqa"
    )
    assert command_for("coco_caption", "elsewhere/images") is None
    assert command_for("msrvtt_qa", "msrvtt/videos") is None
    assert command_for("no_such_dataset", "coco/images") is None


def test_the_published_catalogue_is_the_packages() -> None:
    assert CATALOGUE == PACKAGE_ROOT / "configs" / "downloads.yaml" and DATASETS.is_dir()
