"""``data pack``: what goes into shards comes out of them, and an interrupted call is gone on with."""

from __future__ import annotations

import json
import os
import signal
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from evlgen.cli import main
from evlgen.common.errors import DataError
from evlgen.datasets.base_dataset import Skipped
from evlgen.datasets.caption_dataset import CaptionDataset, CaptionEvalDataset, read_caption_records
from evlgen.datasets.media import ImageFiles, VideoFiles
from evlgen.datasets.packing import pack
from evlgen.datasets.shapes_dataset import ShapesCaptionDataset
from evlgen.datasets.shards import ShardDataset
from evlgen.datasets.table_records import ImageColumns, read_records
from evlgen.datasets.tables import open_table
from evlgen.processors import build_processor

IMAGE = build_processor({"name": "blip_image_eval", "image_size": 16})
TEXT = build_processor({"name": "blip_caption"})


def captioned(folder: Path, count: int = 7, cls=CaptionDataset):
    """Images of several formats, with one caption or two."""
    folder.mkdir()
    records = []
    for index in range(count):
        name = f"{index}.{('jpg', 'PNG', 'webp', 'dat')[index % 4]}"
        kind = ("JPEG", "PNG", "WEBP", "JPEG")[index % 4]
        Image.new("RGB", (20, 12), (30 * index, 9, 200)).save(folder / name, kind)
        texts = [f"image {index}", f"also {index}"][: 1 + index % 2]
        records.append({"image": name, "caption": texts, "image_id": f"id{index}"})
    path = folder / "captions.json"
    path.write_text(json.dumps(records))
    return cls(read_caption_records(path), ImageFiles(folder), IMAGE, TEXT)


def unpacked(folder: Path, **options) -> list:
    stream = ShardDataset(sorted(map(str, folder.glob("*.tar"))), IMAGE, TEXT, **options)
    return [stream.read_place(place) for place in stream.places(None)]


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {info.name: archive.extractfile(info).read() for info in archive}


@pytest.mark.parametrize("cls", [CaptionDataset, CaptionEvalDataset])
def test_pixels_and_captions_come_back_as_they_went_in(tmp_path, cls):
    dataset = captioned(tmp_path / "in", cls=cls)
    packed = pack(dataset, tmp_path / "out", samples_per_shard=3)
    assert (packed.samples, packed.left_out, packed.captions) == (7, 0, 10)
    assert packed.storage == f"{tmp_path}/out/{{00000..00002}}.tar"
    samples = unpacked(tmp_path / "out")
    for index, sample in enumerate(samples):
        name = f"{index}.{('jpg', 'PNG', 'webp', 'dat')[index % 4]}"
        assert torch.equal(sample["image"], IMAGE(dataset.media.open(name)))
        assert sample["text_input"] in (f"image {index}", f"also {index}")
    first = members(tmp_path / "out" / "00000.tar")
    assert first["000000000.jpg"] == (tmp_path / "in" / "0.jpg").read_bytes()
    assert json.loads(first["000000001.json"]) == {
        "caption": ["image 1", "also 1"],
        "image_id": "id1",
        "source": "1.PNG",
    }
    assert "000000003.jpg" in members(tmp_path / "out" / "00001.tar")  # what 3.dat is
    stats = json.loads((tmp_path / "out" / "00002_stats.json").read_text())
    assert stats == {"count": 1, "successes": 1, "captions": 1}


def test_videos_come_back(shared, tmp_path):
    folder = shared / "data/lavis_cache/msrvtt/videos"
    names = sorted(p.name for p in folder.iterdir())[:2]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps([{"video": name, "caption": f"video {name}"} for name in names]))

    def frames(video):
        return torch.from_numpy(video.read([0, 1], size=(8, 8)))

    dataset = CaptionDataset(read_caption_records(path), VideoFiles(folder), frames, lambda text: text)
    assert pack(dataset, tmp_path / "out").storage == f"{tmp_path}/out/00000.tar"
    stream = ShardDataset([f"{tmp_path}/out/00000.tar"], frames, lambda text: text, data_type="videos")
    samples = [stream.read_place(place) for place in stream.places(None)]
    assert [s["text_input"] for s in samples] == [f"video {name}" for name in names]
    for index, sample in enumerate(samples):
        assert torch.equal(sample["image"], dataset[index]["image"])


def test_files_that_cannot_be_read_are_left_out_and_counted(tmp_path, caplog):
    dataset = captioned(tmp_path / "in")
    (tmp_path / "in" / "1.PNG").unlink()
    (tmp_path / "in" / "2.webp").write_bytes(b"")
    (tmp_path / "in" / "3.dat").write_bytes(b"no image")
    packed = pack(dataset, tmp_path / "out", samples_per_shard=4)
    assert (packed.samples, packed.left_out) == (4, 3)
    assert [line.split()[2] for line in caplog.messages] == ["1.PNG", "2.webp", "3.dat"]
    assert len(unpacked(tmp_path / "out")) == 4
    assert not [s for s in unpacked(tmp_path / "out") if isinstance(s, Skipped)]


def test_rows_that_make_no_sample_are_named_and_counted(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "in/a.png")
    rows = ["path,caption", "a.png,x", "a.png,", 'a.png,"[""y"", null]"', "a.png,x,y", *["a.png,"] * 4]
    (tmp_path / "in/a.csv").write_text("\n".join(rows))
    text = {"image_text": {"annotations": {"train": str(tmp_path / "in/a.csv")}}}
    project = {"model": {"arch": "evlgen_opt", "model_type": "shapes"}, "datasets": text}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(project))
    command = ["data", "pack", "--cfg-path", str(tmp_path / "p.yaml"), "--to", str(tmp_path / "out")]
    for _ in range(2):  # the second time everything is there already
        assert main(command) == 0
        shown, logged = capsys.readouterr()
        assert shown.startswith("# 1 samples with 2 captions; 7 rows make no sample and are left out. To ")
        left_out = [line for line in logged.splitlines() if "left out: " in line]
        assert "left out: line 3 of a.csv (it has no caption" in left_out[0]
        assert len(left_out) == 6 and "left out: 2 more rows that make no sample" in left_out[-1]


@pytest.mark.parametrize("name", ["pack.json", "00001.tar", "00001_stats.json"])
def test_a_call_that_is_killed_at_any_file_is_gone_on_with(tmp_path, monkeypatch, name):
    dataset = captioned(tmp_path / "in", count=4)
    pack(dataset, tmp_path / "whole", samples_per_shard=2)
    out, replace = tmp_path / "out", os.replace

    def killed(source, target):
        if os.path.basename(target) == name:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(os, "replace", killed)
        pack(dataset, out, samples_per_shard=2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = {path.name for path in out.iterdir()}
    assert any(file.startswith(f".{name}.") for file in left) and name not in left
    assert pack(dataset, out, samples_per_shard=2).samples == 4
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }


def test_where_nothing_can_be_read_there_is_an_error(tmp_path):
    dataset = captioned(tmp_path / "in", count=1)
    (tmp_path / "in" / "0.jpg").unlink()
    with pytest.raises(DataError, match="none of the 1 files could be read"):
        pack(dataset, tmp_path / "out")


def test_an_interrupted_call_leaves_whole_shards_only_and_the_next_goes_on(tmp_path, monkeypatch):
    dataset = captioned(tmp_path / "in")
    pack(dataset, tmp_path / "whole", samples_per_shard=2)
    read, count = dataset.media.read, iter(range(99))

    def breaking(name):
        if next(count) == 5:
            raise KeyboardInterrupt
        return read(name)

    monkeypatch.setattr(dataset.media, "read", breaking)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pack(dataset, out, samples_per_shard=2)
    assert sorted(p.name for p in out.iterdir()) == [
        "00000.tar",
        "00000_stats.json",
        "00001.tar",
        "00001_stats.json",
        "pack.json",
    ]
    before = (out / "00000.tar").stat().st_mtime_ns
    pack(dataset, out, samples_per_shard=2)
    assert (out / "00000.tar").stat().st_mtime_ns == before
    assert [p.name for p in sorted(out.iterdir())] == [p.name for p in sorted((tmp_path / "whole").iterdir())]
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_an_image_with_several_ids_is_packed_once_with_the_captions_of_all(tmp_path):
    captioned(tmp_path / "in", count=2)
    rows = [("0.jpg", "b", "one"), ("1.PNG", "x", "other"), ("0.jpg", "a", "two"), ("0.jpg", "b", "three")]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"image": v, "image_id": i, "caption": c} for v, i, c in rows]))
    dataset = CaptionDataset(read_caption_records(path), ImageFiles(tmp_path / "in"), IMAGE, TEXT)
    packed = pack(dataset, tmp_path / "out")
    assert (packed.samples, packed.captions) == (2, 4)
    content = members(tmp_path / "out" / "00000.tar")
    first = json.loads(content["000000000.json"])
    assert (first["image_id"], sorted(first["caption"])) == ("b", ["one", "three", "two"])
    assert [sample["image_id"] for sample in unpacked(tmp_path / "out")] == ["b", "x"]


def test_images_that_share_an_id_are_packed_with_their_own_captions(tmp_path):
    captioned(tmp_path / "in", count=2)
    rows = [("0.jpg", "one"), ("1.PNG", "other"), ("0.jpg", "two")]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"image": v, "image_id": "same", "caption": c} for v, c in rows]))
    for together in (False, True):
        records, out = read_caption_records(path), tmp_path / f"out{together}"
        packed = pack(CaptionDataset(records, ImageFiles(tmp_path / "in"), IMAGE, TEXT, together), out)
        assert (packed.samples, packed.captions) == (2, 3)
        content = members(out / "00000.tar")
        assert json.loads(content["000000000.json"])["caption"] == ["one", "two"]
        assert json.loads(content["000000001.json"])["caption"] == "other"


def test_a_shard_that_is_gone_is_written_again(tmp_path):
    dataset = captioned(tmp_path / "in")
    pack(dataset, tmp_path / "out", samples_per_shard=3)
    gone = tmp_path / "out" / "00001.tar"
    content = gone.read_bytes()
    gone.unlink()
    assert pack(dataset, tmp_path / "out", samples_per_shard=3).samples == 7
    assert gone.read_bytes() == content


def test_files_of_the_same_names_in_another_folder_are_other_data(tmp_path):
    pack(captioned(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(DataError, match="out has shards of other data"):
        pack(captioned(tmp_path / "other"), tmp_path / "out")


def test_a_folder_with_other_things_in_it_is_refused(tmp_path):
    dataset = captioned(tmp_path / "in")
    with pytest.raises(DataError, match="in is not empty. Name another folder"):
        pack(dataset, tmp_path / "in")
    pack(dataset, tmp_path / "out", samples_per_shard=2)
    with pytest.raises(DataError, match="out has shards of other data or of another size"):
        pack(dataset, tmp_path / "out", samples_per_shard=3)
    assert not [name for name in os.listdir(tmp_path / "in") if name.endswith(".tar")]


def test_a_dataset_without_files_is_refused(tmp_path):
    shapes = ShapesCaptionDataset.__new__(ShapesCaptionDataset)
    shapes.references = lambda: {0: ["a red circle"]}
    with pytest.raises(DataError, match="it takes images or videos in files, with captions"):
        pack(shapes, tmp_path / "out")


def test_the_command_ends_with_the_lines_that_read_the_shards_back(tmp_path, capsys):
    captioned(tmp_path / "in")
    project = tmp_path / "p.yaml"
    info = {"annotations": {"train": {"storage": str(tmp_path / "in/captions.json")}}}
    info["images"] = {"storage": str(tmp_path / "in")}
    content = {
        "model": {"arch": "evlgen_opt", "model_type": "shapes"},
        "datasets": {"coco_caption": {"build_info": info}},
    }
    project.write_text(yaml.safe_dump(content))
    command = ["data", "pack", "--cfg-path", str(project), "--to", str(tmp_path / "out")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# 7 samples with 10 captions. To train on them:\n")
    assert yaml.safe_load(shown)["datasets"]["web_shards"] == {
        "data_type": "images",
        "build_info": {"storage": f"{tmp_path}/out/00000.tar"},
    }
    hostile = tmp_path / "out\x1b[31m: #x"  # a name that YAML must quote, and a terminal not obey
    assert main([*command[:-1], str(hostile)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    storage = yaml.safe_load(shown)["datasets"]["web_shards"]["build_info"]["storage"]
    assert storage == f"{hostile}/00000.tar"
    assert main([*command, "--dataset", "coco"]) == 1
    assert "no dataset 'coco'. Did you mean 'coco_caption'? It has: coco_caption." in capsys.readouterr().err


def test_images_of_telephones_in_tables_come_back(tmp_path):
    """In a cell there is no suffix: what it is called in the shard follows from its bytes."""
    files = []
    for name, options in (("a.jpg", {"format": "MPO", "save_all": True}), ("b.jpg", {"format": "JPEG"})):
        more = [Image.new("RGB", (20, 12), "red")] * 2
        Image.new("RGB", (20, 12), "green").save(tmp_path / name, append_images=more, **options)
        files.append((tmp_path / name).read_bytes())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": files, "caption": ["a", "b"]}), path)
    records = read_records([open_table(path)], ImageColumns(), "image", tmp_path, "columns", needs_text=True)
    packed = pack(CaptionDataset(records, ImageFiles(tmp_path), IMAGE, TEXT), tmp_path / "out")
    samples = unpacked(tmp_path / "out")
    assert [s["text_input"] for s in samples] == ["a", "b"] and packed.samples == len(samples)
    assert torch.equal(samples[0]["image"], IMAGE(Image.open(tmp_path / "a.jpg")))
