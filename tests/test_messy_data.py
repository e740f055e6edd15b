"""A folder and a spreadsheet as they are in life: whatever is wrong with a part, the rest is trained on."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import zlib
from collections import Counter

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from evlgen.assemble import ready_builders, run
from evlgen.common.errors import TrainingError
from evlgen.config.config import Config
from evlgen.datasets import Skipped

GOOD = 12
LONG = "red " * 10_000
#: (image, caption as bytes of the file, cause), in the table between the good rows
BAD = [
    ("folder.jpg", b"a folder", "not a file"),
    ("loop.jpg", b"a link to itself", "link to itself"),
    ("bomb.png", b"a hundred million pixels", "too large"),
    ("gone.jpg", b"nothing", "missing file"),
    ("empty.jpg", b"no bytes", "empty file"),
    ("text.jpg", b"a text", "not an image"),
    ("cut.jpg", b"half of an image", "damaged image"),
    ("0.png", b"caf\xe9", "not UTF-8"),
    ("0.png", b"", "empty caption"),
    ("loop/1.png", b"in a folder that is a link to itself", "link to itself"),
    ("bad.zip/1.png", b"in an archive that is none", "damaged archive"),
    ("away/1.png", b"in a folder that is not there", "missing file"),
]


def colour(index: int) -> tuple[int, int, int]:
    return (20 * index, 255 - 20 * index, 128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Good images of one colour each, and every bad file; a table with a byte order mark, quoted newlines,
    an id that is there twice, numbers and texts as ids, and a caption of ten thousand words."""
    root = tmp_path_factory.mktemp("mess")
    for index in range(GOOD):
        Image.new("RGB", (40, 30), colour(index)).save(root / f"{index}.png")
    (root / "folder.jpg").mkdir()
    for name in ("loop.jpg", "loop"):
        os.symlink(root / name, root / name)
    (root / "bad.zip").write_bytes(b"no archive")
    (root / "bomb.png").write_bytes(_bomb(10_000, 10_000))
    (root / "empty.jpg").touch()
    (root / "text.jpg").write_text("no image")
    Image.effect_noise((64, 64), 50).convert("RGB").save(root / "cut.jpg")
    (root / "cut.jpg").write_bytes((root / "cut.jpg").read_bytes()[:900])
    rows = [b"\xef\xbb\xbfimage,caption,id"]
    for index in range(GOOD):
        caption = {1: b'"two\nlines, ""quoted"""', 2: LONG.encode()}.get(index, b"image %d" % index)
        name = [str(index), f"id{index}"][index % 2] if index != 4 else "0"  # 0 is there twice
        rows.append(b"%d.png,%s,%s" % (index, caption, name.encode()))
        if index < len(BAD):
            image, caption, _ = BAD[index]
            own_id = "0" if image == "0.png" else f"bad{index}"
            rows.append(b",".join((image.encode(), caption, own_id.encode())))
    (root / "table.csv").write_bytes(b"\r\n".join(rows) + b"\r\n")
    return root


def _bomb(width: int, height: int) -> bytes:
    """A PNG that is small and has many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((width // 8 + 1) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.fixture
def project(folder, tiny_project):
    """The project file of a run on the mess; called with the share of it that may be broken."""

    def write(share: float, **dataset):
        path = tiny_project(run={"max_epoch": 1, "max_skipped_share": share, "valid_splits": ["val"]})
        content = OmegaConf.load(path)
        table = str(folder / "table.csv")
        content.datasets = {
            "image_text": {
                "annotations": {"train": table, "val": table},
                "columns": {"id": "id"},
                "vis_processor": {"train": {"name": "blip_image_eval"}},  # the whole image, unchanged
                **dataset,
            }
        }
        OmegaConf.save(content, path)
        return Config.load(path)

    return write


def test_what_is_broken_is_skipped_in_its_own_place_and_moves_nothing(project):
    builder = ready_builders(project(1.0))["image_text"]
    dataset = builder.get_split("train")
    samples = [dataset[i] for i in range(len(dataset))]
    assert len(samples) == GOOD + len(BAD)
    expected = []
    for index in range(GOOD):
        expected += [None, *(cause for _, _, cause in BAD[index : index + 1])]
    assert [s.cause if isinstance(s, Skipped) else None for s in samples] == expected
    good = [s for s in samples if not isinstance(s, Skipped)]
    processor = builder.vis_processor("train")
    for index, sample in enumerate(good):
        pixels = processor(Image.new("RGB", (40, 30), colour(index)))
        assert torch.equal(sample["image"], pixels)
        text = {1: 'two lines, "quoted"', 2: " ".join(["red"] * 50)}.get(index, f"image {index}")
        assert sample["text_input"] == text.replace('"', "").replace("  ", " ").strip()


def test_evaluation_skips_the_second_image_of_an_id_too(project):
    dataset = ready_builders(project(1.0))["image_text"].get_split("val")
    samples = [dataset[i] for i in range(len(dataset))]
    causes = Counter(s.cause for s in samples if isinstance(s, Skipped))
    assert causes["duplicate id"] == 1
    ids = [s["image_id"] for s in samples if not isinstance(s, Skipped)]
    assert len(ids) == len(set(ids)) == GOOD - 1


def test_a_run_below_the_share_goes_on_and_counts_by_cause(project, caplog):
    cfg = project(0.55)  # 12 of 24 are broken, and one more where images of one id cannot be told apart
    with caplog.at_level("INFO"):
        run(cfg)
    folder = os.path.join(cfg.run.output_dir, "latest")
    listed = [json.loads(line) for line in open(os.path.join(folder, "skipped.jsonl"))]
    trained = [line for line in listed if line["iteration"] is not None]
    assert Counter(line["cause"] for line in trained) == Counter(cause for _, _, cause in BAD)
    assert all(line["reason"] and line["id"] for line in listed)
    assert "12 of 24 training samples were skipped: " in caplog.text and "1 empty caption" in caplog.text
    assert len(re.findall(r"3 of \d+ records will be skipped: ", caplog.text)) == 2  # once for each split
    evaluations = [json.loads(line) for line in open(os.path.join(folder, "log.jsonl"))]
    counted = next(e["skipped_by_cause"] for e in evaluations if e["type"] == "evaluation")
    assert counted["duplicate id"] == 1 and counted["too large"] == 1


def test_a_run_above_the_share_stops_and_says_what_was_wrong(project):
    with pytest.raises(TrainingError, match=r"could not be read \(.*2 missing file.*max_skipped_share"):
        run(project(0.05))


def test_one_bad_caption_of_several_rows_costs_only_itself(project, folder, tmp_path):
    shutil.copy(folder / "0.png", tmp_path / "0.png")
    (tmp_path / "table.jsonl").write_text(
        '{"image": "0.png", "caption": "one"}\nnot json\n{"image": "0.png", "caption": ["two", ""]}\n'
    )
    cfg = project(1.0, annotations={"train": str(tmp_path / "table.jsonl")}, columns={})
    dataset = ready_builders(cfg)["image_text"].get_split("train")
    found = [
        s if isinstance(s, Skipped) else s["text_input"]
        for s in map(dataset.__getitem__, range(len(dataset)))
    ]
    assert [f for f in found if isinstance(f, str)] == ["one", "two"]
    assert [f.cause for f in found if isinstance(f, Skipped)] == ["not JSON", "empty caption"]
