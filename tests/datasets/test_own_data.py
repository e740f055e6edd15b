"""Own images, videos and questions by YAML alone: the same samples from every format and layout."""

from __future__ import annotations

import csv
import datetime
import json
import os
import random
import tarfile
import unicodedata
import zipfile
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from evlgen.common.errors import ConfigError, DataError
from evlgen.common.registry import registry
from evlgen.config.run_config import RunConfig
from evlgen.config.schema import check_section
from evlgen.datasets import Skipped
from evlgen.datasets.base_dataset import BadRecord
from evlgen.datasets.media import ImageFiles
from evlgen.datasets.shards import ShardDataset
from evlgen.datasets.table_dataset import ImageTextBuilder, Shares, divide
from evlgen.datasets.table_records import ImageColumns, read_records
from evlgen.datasets.tables import open_table
from evlgen.loaders.mixed_plan import make_plan

CAPTIONS = {"a.png": ["a dog", "the dog"], "b.png": ["red, and green"], "c.png": ["x", "y", "z"]}
ROWS = [{"image": name, "caption": text} for name, texts in CAPTIONS.items() for text in texts]
LISTS = [{"image": name, "caption": texts} for name, texts in CAPTIONS.items()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """The working folder, with three images of one colour each; the data root is beside it."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path / "root"))
    for index, name in enumerate(CAPTIONS):
        Image.new("RGB", (8, 8), (80 * index, 0, 0)).save(name)
    return tmp_path / "work"


def builder(kind: str = "image_text", questions: bool = False, **section):
    """A builder from a section as the YAML has it."""
    cls = registry.get_builder_class(kind)
    vis = {"name": "blip_image_eval", "image_size": 8}
    if kind == "video_text":
        vis = {"name": "alpro_video_eval", "n_frms": 2, "image_size": 8}
    text = {"name": "blip_question" if questions else "blip_caption"}
    section = {
        "vis_processor": {"train": vis, "eval": vis},
        "text_processor": {"train": text, "eval": text},
        **section,
    }
    checked = check_section(section, cls, f"datasets.{kind}", ignore=cls.FROM_FRAMEWORK)
    return cls(name=kind, cache_root=os.environ["EVLGEN_CACHE"], **checked)


def samples(dataset) -> list:
    return [dataset[i] for i in range(len(dataset))]


def write_csv(path: str, rows: list[dict], **options) -> None:
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), **options)
        table.writeheader()
        table.writerows(rows)


def write(layout: str) -> str:
    """The captions in a table of a layout; returns its path."""
    if layout == "rows.csv":
        write_csv(layout, ROWS)
    elif layout == "rows.tsv":
        write_csv(layout, ROWS, delimiter="\t")
    elif layout == "lists.csv":
        write_csv(layout, [{**row, "caption": json.dumps(row["caption"])} for row in LISTS])
    elif layout == "pandas.csv":
        write_csv(layout, [{**row, "caption": str(row["caption"])} for row in LISTS])
    elif layout == "arrays.csv":
        write_csv(layout, [{**row, "caption": str(row["caption"]).replace("', '", "'\n '")} for row in LISTS])
    elif layout == "lists.json":
        Path(layout).write_text(json.dumps({"data": LISTS}))
    elif layout == "rows.jsonl":
        Path(layout).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif layout == "lists.parquet":
        pq.write_table(pa.Table.from_pylist(LISTS), layout)
    elif layout == "embedded.parquet":
        image = [{"bytes": Path(row["image"]).read_bytes(), "path": row["image"]} for row in LISTS]
        pq.write_table(pa.table({"image": image, "caption": [r["caption"] for r in LISTS]}), layout)
    return layout


LAYOUTS = ["rows.csv", "rows.tsv", "lists.csv", "pandas.csv", "arrays.csv", "lists.json", "rows.jsonl"]
LAYOUTS += ["lists.parquet", "embedded.parquet"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_samples(folder, layout):
    built = builder(annotations={"train": write(layout), "val": layout})
    train, val = built.get_split("train"), built.get_split("val")
    assert [s["text_input"] for s in samples(train)] == ["a dog", "the dog", "red, and green", "x", "y", "z"]
    reds = [float(s["image"][0, 0, 0]) for s in samples(train)]
    assert reds[0] == reds[1] < reds[2] < reds[3] == reds[5]
    assert list(val.references().values()) == list(CAPTIONS.values())
    assert [s["image_id"] for s in samples(val)] == list(val.references())
    if layout != "embedded.parquet":
        assert list(val.references()) == list(CAPTIONS)


def test_captions_in_several_columns_are_one_images(folder):
    write_csv(
        "a.csv",
        [{"file": "a.png", "en": "a dog", "more": "the dog"}, {"file": "b.png", "en": "b", "more": " "}],
    )
    dataset = builder(annotations={"train": "a.csv"}, columns={"text": ["en", "more"]}).get_split("train")
    assert [s["text_input"] for s in samples(dataset)] == ["a dog", "the dog", "b"]


def test_ids_are_numbers_or_texts_and_those_of_captions_are_none(folder):
    def ids(rows, **columns):
        Path("a.json").write_text(json.dumps(rows))
        dataset = builder(annotations={"val": "a.json"}, columns=columns).get_split("val")
        return [s.cause if isinstance(s, Skipped) else s["image_id"] for s in samples(dataset)]

    assert ids(
        [
            {"image": "a.png", "caption": "x", "image_id": 7},
            {"image": "b.png", "caption": "y", "image_id": "7"},
        ]
    ) == [7, "7"]
    of_captions = [{"image": "a.png", "caption": text, "id": i} for i, text in enumerate("xyz")]
    assert ids(of_captions) == ["a.png"]
    assert ids(of_captions, id="id") == [0, "duplicate id", "duplicate id"]
    assert ids(
        [{"image": "a.png", "caption": "x", "id": 3.0}, {"image": "b.png", "caption": "y", "id": [1]}]
    ) == [3, "bad record"]


def test_empty_rows_of_spreadsheets_are_none(folder, caplog):
    caplog.set_level("INFO")
    content = "image,caption,split\na.png,x,train\n,,\nb.png,y,val\n, ,\nc.png,,train\n" + ",,\n" * 5
    Path("a.csv").write_text(content)
    built = builder(annotations="a.csv")
    assert [getattr(s, "id", "") or s["text_input"] for s in samples(built.get_split("train"))] == [
        "x",
        "line 6 of a.csv",
    ]
    assert built.get_split("val").references() == {"b.png": ["y"]}
    assert "train 2, val 1" in caplog.text and "are in none" not in caplog.text


def test_unusable_rows_are_named_in_their_place(folder):
    content = b'image,caption\na.png,x\nb.png,\n,y\nc.png,"[""p"", """"]"\nb.png,\x00\nc.png,caf\xc3\xa9\n'
    Path("a.csv").write_bytes(content)
    dataset = builder(annotations={"train": "a.csv"}).get_split("train")
    found = [(s.id, s.cause) if isinstance(s, Skipped) else s["text_input"] for s in samples(dataset)]
    assert found[:5] == [
        "x",
        ("line 3 of a.csv", "empty caption"),
        ("line 4 of a.csv", "bad record"),
        "p",
        ("line 5 of a.csv", "empty caption"),
    ]
    assert isinstance(found[5], tuple) and found[5][0] == "line 6 of a.csv" and found[6] == "café"


@pytest.mark.parametrize(
    ("cell", "texts", "empty"),
    [
        ('["a cat", null]', ["a cat"], 1),
        ("['a dog', None]", ["a dog"], 1),
        ("['a dog' None\n 'b']", ["a dog", "b"], 1),
        ("[nan, 'a dog', '']", ["a dog"], 2),
        ("['2', 3]", ["2", "3"], 0),
        ("[laughs] it's fun", ["[laughs] it's fun"], 0),
        ("[a], 'b'", ["[a], 'b'"], 0),
        ("['" + "\\'" * 100_000 + "]", ["['" + "\\'" * 100_000 + "]"], 0),  # no list, found at once
    ],
)
def test_lists_in_cells_are_lists_and_their_empty_entries_are_counted(folder, cell, texts, empty):
    write_csv("a.csv", [{"image": "a.png", "caption": cell}])
    records = builder(annotations={"train": "a.csv"}).get_split("train").records
    bad = [record for record in records if isinstance(record, BadRecord)]
    assert [t for r in records if not isinstance(r, BadRecord) for t in as_texts(r)] == texts
    assert [(r.id, r.cause) for r in bad] == [("line 2 of a.csv", "empty caption")] * empty


def as_texts(record) -> list[str]:
    return record["caption"] if isinstance(record["caption"], list) else [record["caption"]]


@pytest.mark.parametrize("root", [".", "all.zip", "all.tar"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_letters_in_parts_and_in_one_character_are_the_same_name(folder, root, form):
    """Macs take names apart; a table that was written elsewhere has them in one."""
    names = ["caf\u00e9.png", "\ud55c\uae00/\u00fc.png", "plain.png"]
    os.mkdir(unicodedata.normalize(form, "\ud55c\uae00"))
    with zipfile.ZipFile("all.zip", "w") as zipped, tarfile.open("all.tar", "w") as tarred:
        for name in (unicodedata.normalize(form, name) for name in names):
            Image.new("RGB", (8, 8)).save(name)
            zipped.write(name)
            tarred.add(name)
    rows = [{"image": unicodedata.normalize(own, n), "caption": own} for n in names for own in ("NFC", "NFD")]
    Path("a.json").write_text(json.dumps(rows))
    dataset = builder(annotations={"val": "a.json"}, root=root).get_split("val")
    assert [sample["image_id"] for sample in samples(dataset)] == [
        unicodedata.normalize(form, name) for name in names
    ]
    assert all(len(set(texts)) == 2 for texts in dataset.references().values())
    loaded = ImageFiles(root)
    assert loaded.source(rows[0]["image"]) == loaded.source(rows[1]["image"])


def test_a_zip_of_windows_with_backslashes_has_folders(folder):
    with zipfile.ZipFile("all.zip", "w") as zipped:
        zipped.writestr("in\\", b"")
        for name in CAPTIONS:
            zipped.writestr(f"in\\{name}", Path(name).read_bytes())
    marks = zip("/\\/", CAPTIONS, strict=True)
    write_csv("a.csv", [{"image": f"in{mark}{name}", "caption": "x"} for mark, name in marks])
    dataset = builder(annotations={"train": "a.csv"}, root="all.zip").get_split("train")
    assert [sample["image_id"] for sample in samples(dataset)] == [f"in/{name}" for name in CAPTIONS]


def test_paths_with_backslashes_are_read_with_slashes_and_one_notice(folder, caplog):
    (folder / "in").mkdir()
    for name in CAPTIONS:
        os.rename(name, f"in/{name}")
    Image.new("RGB", (8, 8)).save("d\\e.png")  # a name that has one
    with zipfile.ZipFile("in.zip", "w") as zipped:
        zipped.write("in/a.png", "in/a.png")
    texts = [
        "in\\a.png,x",
        ".\\in\\b.png,y",
        "in/a.png,z",
        "d\\e.png,e",
        "in\\none.png,n",
        "in.zip\\in\\a.png,q",
    ]
    Path("a.csv").write_text("\n".join(["image,caption", *texts]))
    dataset = builder(annotations={"train": "a.csv"}).get_split("train")
    names = [record["visual"] for record in dataset.records]
    assert names == ["in/a.png", "in/b.png", "in/a.png", "d\\e.png", "in\\none.png", "in.zip/in/a.png"]
    assert [isinstance(sample, Skipped) for sample in samples(dataset)] == [False] * 4 + [True, False]
    assert sum("backslashes" in message for message in caplog.messages) == 1


def split_rows() -> list[dict]:
    return [
        {"image": name, "caption": f"of {split}", "split": split}
        for name, split in (("a.png", "train"), ("b.png", "Validation"), ("c.png", "test"), ("a.png", "dev"))
    ]


def test_a_column_of_splits_is_used_and_the_log_says_so(folder, caplog):
    caplog.set_level("INFO", "evlgen")
    write_csv("a.csv", [*split_rows(), {"image": "c.png", "caption": "?", "split": ""}])
    built = builder(annotations="a.csv")
    assert built.splits == ["train", "val", "test"]
    found = {split: samples(built.get_split(split)) for split in built.splits}
    train, stray = found["train"]
    assert (train["text_input"], stray.id, stray.cause) == ("of train", "line 6 of a.csv", "no split")
    assert [s["image_id"] for s in found["val"]] == ["b.png", "a.png"]
    assert [s["image_id"] for s in found["test"]] == ["c.png"]
    logged = (
        "a.csv: the column 'split' says which split a row is in: train 1, val 2, test 1; 1 rows are in none"
    )
    assert caplog.messages.count(logged) == 1
    apart = builder(annotations={"train": "a.csv", "validation": "a.csv"})
    assert [len(apart.get_split(split).records) for split in apart.splits] == [2, 2]
    write_csv("b.csv", split_rows()[:1])
    assert builder(annotations="b.csv").splits == ["train"]  # all of it is meant: nothing is held out
    mixed = builder(annotations={"train": "a.csv", "unseen": "a.csv"})
    with pytest.raises(
        DataError, match=r"no rows of the split 'unseen', but of train, val, test.*columns\.split"
    ):
        mixed.get_split("unseen")
    assert len(builder(annotations={"unseen": "b.csv"}).get_split("unseen").records) == 1
    with pytest.raises(ConfigError, match=r"split\.val: the split has annotations of its own"):
        _ = builder(annotations="a.csv", split={"val": 0.5}).splits
    off = builder(annotations={"train": "a.csv"}, columns={"split": ""})
    assert len(off.get_split("train").records) == 5


def test_a_column_called_split_that_names_none_is_not_used(folder, caplog):
    caplog.set_level("INFO", "evlgen")
    write_csv("a.csv", [{**row, "split": index % 2} for index, row in enumerate(ROWS)])
    assert builder(annotations="a.csv").splits == ["train", "val", "test"]
    assert 'a.csv: its column \'split\' names no splits but "0", "1": it is not used' in caplog.messages
    with pytest.raises(ConfigError, match=r"columns\.split: a\.csv: its column 'split' names no splits"):
        _ = builder(annotations="a.csv", columns={"split": "split"}).splits
    with pytest.raises(ConfigError, match=r"columns\.split: .*a\.csv has no column 'part'"):
        _ = builder(annotations="a.csv", columns={"split": "part"}).splits


def test_the_rows_of_a_fetched_table_are_divided_by_its_column(folder, monkeypatch):
    write_csv("a.csv", split_rows())
    monkeypatch.setattr(ImageTextBuilder, "storage_path", lambda self, *args: folder / "a.csv")
    built = builder(annotations="https://example.org/a.csv", root=str(folder))
    assert {split: len(built.get_split(split).records) for split in built.splits} == {
        "train": 1,
        "val": 2,
        "test": 1,
    }


def test_where_no_row_can_be_used_the_first_one_says_why(folder):
    write_csv("a.csv", [{"image": "a.png", "caption": ""}] * 3)
    with pytest.raises(DataError, match=r"line 2 of a\.csv: it has no caption in 'caption'.*all 3 of them"):
        builder(annotations={"train": "a.csv"}).get_split("train")
    Path("a.csv").write_text("image,caption\n")
    with pytest.raises(DataError, match=r"a\.csv: there are no rows"):
        builder(annotations={"train": "a.csv"}).get_split("train")


def test_images_without_captions_can_be_described_not_learned(folder):
    write_csv("a.csv", [{"image": name, "note": "n"} for name in CAPTIONS])
    built = builder(annotations={"train": "a.csv", "test": "a.csv"})
    assert built.get_split("test").references() == {} and len(built.get_split("test")) == 3
    with pytest.raises(
        ConfigError, match=r"columns\.text: no column of .*a\.csv has a usual name.*Columns: image, note"
    ):
        built.get_split("train")


def test_columns_are_found_by_usual_names_and_the_log_says_which(folder, caplog):
    write_csv("a.csv", [{"File Name": "a.png", "Text": "x", "Image-ID": "i"}])
    with caplog.at_level("INFO"):
        sample = builder(annotations={"val": "a.csv"}).get_split("val")[0]
    assert sample["image_id"] == "i"
    assert "a.csv: columns taken by their names: {image: File Name, id: Image-ID, text: Text}" in caplog.text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"text": "captoin"},
            r"columns\.text: .*a\.csv has no column 'captoin'. Did you mean 'caption'. Columns: name",
        ),
        ({"text": ["caption", "x"]}, r"columns\.text: .*has no column 'x'"),
        (
            {},
            r"columns\.image: no column of .*a\.csv has a usual name for it \(image, .*: name, caption",
        ),
        ({"caption": "x"}, r"columns\.caption: there is no such key.*Allowed: answer, id, image"),
    ],
)
def test_a_column_that_is_not_there_is_named_with_those_that_are(folder, columns, message):
    write_csv("a.csv", [{"name": "a.png", "caption": "x"}])
    with pytest.raises(ConfigError, match=message):
        builder(annotations={"train": "a.csv"}, columns=columns).get_split("train")


def test_paths_start_from_the_working_folder_then_from_the_data_root(folder):
    root = folder.parent / "root"
    write_csv("a.csv", ROWS)
    (root / "my").mkdir(parents=True)
    write_csv(str(root / "my/b.csv"), [{"image": "b.png", "caption": "in the root"}])
    Image.new("RGB", (8, 8)).save(root / "my/b.png")
    assert (
        samples(builder(annotations={"train": "my/b.csv"}).get_split("train"))[0]["text_input"]
        == "in the root"
    )
    assert len(builder(annotations={"train": "my/b.csv"}, root=".").get_split("train")) == 1
    lines = builder(annotations={"train": "a.csv", "val": "c.csv"}, root="d").missing()
    assert lines == [
        f"image_text: '{text}' is not there (looked at {folder / text} and {root / text}). "
        f"Put it there, or set datasets.image_text.{key}."
        for text, key in (("c.csv", "annotations"), ("d", "root"))
    ]


def test_an_image_folder_that_is_not_there_is_said_before_training(folder):
    write_csv("a.csv", [{"image": "sub/a.png", "caption": "x"}])
    with pytest.raises(DataError, match=r"image folder .*sub is missing.*Set datasets\.image_text\.root"):
        builder(annotations={"train": "a.csv"}).get_split("train")


def many(count: int = 100) -> list[dict]:
    return [{"visual": f"{i}.png", "caption": [text]} for i in range(count) for text in "xy"]


def visuals(records) -> set[str]:
    return {record["visual"] for record in records if not isinstance(record, BadRecord)}


def test_shares_are_of_images_and_no_image_is_in_two_splits():
    parts = {split: visuals(r) for split, r in divide(many(), Shares(val=0.1, test=0.25)).items()}
    assert {split: len(names) for split, names in parts.items()} == {"train": 65, "val": 10, "test": 25}
    assert set.union(*parts.values()) == visuals(many())


def test_a_division_follows_from_names_and_seed_alone():
    records, shares = many(), Shares(val=0.1, test=0.1)
    first = {split: visuals(r) for split, r in divide(records, shares).items()}
    random.Random(0).shuffle(records)
    assert {split: visuals(r) for split, r in divide(records, shares).items()} == first
    other = divide(records, Shares(val=0.1, test=0.1, seed=1))
    assert visuals(other["val"]) != first["val"]
    more = divide([*records, {"visual": "new.png", "caption": ["z"]}], shares)
    assert len(visuals(more["test"]) - first["test"]) <= 1


def test_an_image_that_is_known_by_its_id_is_in_one_split_under_any_name():
    records = [{"visual": f"{i}.png", "caption": ["x"], "image_id": i % 10} for i in range(40)]
    unnamed = [{"visual": f"{i}.png", "caption": ["y"]} for i in range(40)]  # rows that have no id
    parts = divide([*records, *unnamed], Shares(val=0.3, test=0.3))
    ids = {split: {int(name[:-4]) % 10 for name in visuals(part)} for split, part in parts.items()}
    assert {split: len(found) for split, found in ids.items()} == {"train": 4, "val": 3, "test": 3}
    assert set.union(*ids.values()) == set(range(10))


@pytest.mark.parametrize("column", [None, "image_id", "id"])
def test_bytes_that_are_in_several_rows_are_one_image(folder, column):
    """As Hugging Face has captions one in each row: the image is there again in every row."""
    rows = [(i, text) for i in range(10) for text in ("one", "two")]
    for i in range(10):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(f"{i}.png")
    image = [{"bytes": Path(f"{i}.png").read_bytes(), "path": "x.png"} for i, _ in rows]
    columns = {"image": image, "caption": [f"{text} {i}" for i, text in rows]}
    if column is not None:  # of the image, or of the caption: then it is none of the image's
        columns[column] = [i for i, _ in rows] if column == "image_id" else list(range(20))
    pq.write_table(pa.table(columns), "a.parquet", row_group_size=3)
    built = builder(annotations="a.parquet", split={"val": 0.3, "test": 0.3})
    numbers = {}
    for split in built.splits:
        dataset = built.get_split(split)
        truth = dataset.references()
        assert {key: sorted(texts) for key, texts in truth.items()} == {
            key: [f"one {texts[0][-1]}", f"two {texts[0][-1]}"] for key, texts in truth.items()
        }
        numbers[split] = {texts[0][-1] for texts in truth.values()}
        assert len(dataset) == {"train": 8}.get(split, 3)  # captions; images
        for i, sample in enumerate(samples(dataset)):
            shown = dataset.image(i).getpixel((0, 0))[0] // 20
            assert str(shown) == truth[sample["image_id"]][0][-1]
    assert {split: len(found) for split, found in numbers.items()} == {"train": 4, "val": 3, "test": 3}
    assert len(set.union(*numbers.values())) == 10


def test_the_same_bytes_in_two_tables_are_one_source(folder):
    for name, order in (("a.parquet", ["a.png", "b.png"]), ("b.parquet", ["c.png", "a.png"])):
        image = [Path(file).read_bytes() for file in order]
        pq.write_table(pa.table({"image": image, "caption": order}), name)
    built = builder(annotations={"train": "a.parquet", "val": "b.parquet"})
    train, val = built.get_split("train"), built.get_split("val")
    assert train.visual_source(0) == val.visual_source(1)
    assert len({train.visual_source(0), train.visual_source(1), val.visual_source(0)}) == 3


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())])
def test_texts_that_are_stored_as_bytes_are_texts(folder, kind):
    """As Spark and TensorFlow's datasets write them."""

    def stored(values):
        return pa.array([value.encode() for value in values], pa.binary()).cast(kind)

    image = [Path(name).read_bytes() for name in CAPTIONS]
    lists = pa.array([[text.encode() for text in texts] for texts in CAPTIONS.values()])
    ids, splits = stored(["p", "q", "r"]), stored(["train", "train", "val"])
    pq.write_table(pa.table({"image": image, "text": lists, "image_id": ids, "split": splits}), "a.parquet")
    built = builder(annotations="a.parquet")
    assert built.get_split("train").references() == {"p": ["a dog", "the dog"], "q": ["red, and green"]}
    assert built.get_split("val").references() == {"r": ["x", "y", "z"]}
    asked = {"question": stored(["what?", "why?"]), "answer": [b"caf\xc3\xa9", b"caf\xe9"]}
    pq.write_table(pa.table({"image": image[:2], **asked}), "q.parquet")
    questions = samples(builder(questions=True, annotations={"train": "q.parquet"}).get_split("train"))
    assert (questions[0]["text_input"], questions[0]["text_output"]) == ("what?", "café")
    assert (questions[1].id, questions[1].cause) == ("row 1 of q.parquet", "not UTF-8")


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_answers_are_read_as_vqa_publishes_them(folder, suffix):
    answers = [{"answer": text, "answer_id": i} for i, text in enumerate(["yes", "yes", "no"])]
    rows = [{"image": "a.png", "question": "why?", "answers": answers}]
    Path("q.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), "q.parquet")
    built = builder(questions=True, annotations={"val": f"q.{suffix}"}).get_split("val")
    assert built.answers() == {0: ["yes", "yes", "no"]}


@pytest.mark.parametrize("column", ["image", "caption", "image_id"])
def test_a_cell_of_a_type_that_means_nothing_here_is_named(folder, column):
    odd = [datetime.date(2026, 1, 2), Decimal("1.5"), {"when": datetime.date(2026, 1, 2)}, [datetime.time(1)]]
    for number, value in enumerate(odd):
        values = {"image": ["a.png"], "caption": ["x"], "image_id": [1], column: [value]}
        pq.write_table(pa.table(values), f"{number}.parquet")
        with pytest.raises(DataError, match=f"row 0 of {number}.parquet: '{column}' must be"):
            builder(annotations={"train": f"{number}.parquet"}).get_split("train")


def test_every_split_has_an_image_and_bad_records_stay_in_training():
    bad = BadRecord("line 2", "why")
    parts = divide([bad, *many(3)], Shares(val=0.01, test=0.01))
    assert [len(visuals(part)) for part in parts.values()] == [1, 1, 1]
    assert parts["train"][0] is bad
    with pytest.raises(DataError, match="2 images are too few to be divided into train, val, test"):
        divide(many(2), Shares(val=0.01, test=0.01))


def test_one_table_for_everything_is_divided_unless_it_is_said_otherwise(folder):
    write_csv("a.csv", ROWS)
    built = builder(annotations="a.csv")
    assert built.splits == ["train", "val", "test"]
    parts = {split: {d["visual"] for d in built.get_split(split).records} for split in built.splits}
    assert sorted(map(len, parts.values())) == [1, 1, 1] and set.union(*parts.values()) == set(CAPTIONS)
    assert builder(annotations="a.csv", split={"val": 0, "test": 0}).splits == ["train"]
    assert builder(annotations={"train": "a.csv"}).splits == ["train"]
    assert builder(annotations={"train": "a.csv"}, split={"val": 0.5}).splits == ["train", "val"]
    with pytest.raises(ConfigError, match=r"split\.val: the split has annotations of its own"):
        _ = builder(annotations={"train": "a.csv", "val": "a.csv"}, split={"val": 0.5}).splits
    with pytest.raises(ConfigError, match=r"split\.val: the split is a share of `train`, which has none"):
        _ = builder(annotations={"test": "a.csv"}, split={"val": 0.5}).splits


def test_splits_may_have_roots_of_their_own(folder):
    for split, name in (("train", "a.png"), ("val", "b.png")):
        (folder / f"{split}_images").mkdir()
        os.rename(name, folder / f"{split}_images" / name)
        write_csv(f"{split}.csv", [row for row in ROWS if row["image"] == name])
    tables = {"train": "train.csv", "val": "val.csv"}
    built = builder(annotations=tables, root={"train": "train_images", "val": "val_images"})
    assert built.missing() == []
    assert [sample["text_input"] for sample in samples(built.build_split("train"))] == ["a dog", "the dog"]
    (only,) = samples(built.build_split("val"))
    assert only["image_id"] == "b.png" and only["image"].shape == (3, 8, 8)
    gone = builder(annotations=tables, root={"train": "train_images", "val": "gone"})
    (line,) = gone.missing(["val"])
    assert "'gone' is not there" in line and "datasets.image_text.root" in line
    assert gone.missing(["train"]) == []


def test_roots_by_split_are_those_of_splits_that_have_a_table(folder):
    for split, name in (("train", "a.png"), ("val", "b.png")):
        (folder / split).mkdir()
        os.rename(name, folder / split / "x.png")
        write_csv(f"{split}.csv", [{"image": "x.png", "caption": split}])
    tables = {"train": "train.csv", "val": "val.csv"}
    with pytest.raises(
        ConfigError, match=r"root\.vall: no table is one of the split 'vall'.*Did you mean 'val'"
    ):
        builder(annotations=tables, root={"train": "train", "vall": "val"}).missing()
    with pytest.raises(ConfigError, match=r"root: names no folder or archive for the split 'val'"):
        builder(annotations=tables, root={"train": "train"}).get_split("val")
    with pytest.raises(ConfigError, match=r"root\.val: no table is one of the split 'val'.*have one: train"):
        builder(
            annotations={"train": "train.csv"}, split={"val": 0.5}, root={"train": "train", "val": "val"}
        ).missing()
    gone = builder(annotations="gone.csv", root={"train": "train", "val": "val"})
    assert "'gone.csv' is not there" in gone.missing()[0]
    built = builder(annotations=".", root={"train": "train", "val": "val"})  # a folder with its own splits
    assert built.splits == ["train", "val"]
    reds = [float(samples(built.get_split(split))[0]["image"][0, 0, 0]) for split in built.splits]
    assert reds[0] < reds[1]


def test_a_folder_gives_its_splits(folder):
    for split in ("train", "validation"):
        os.makedirs("data", exist_ok=True)
        cell = {"bytes": Path("b.png").read_bytes(), "path": None}
        pq.write_table(
            pa.table({"image": [cell, None], "text": [split, "x"]}), f"data/{split}-00000-of-00001.parquet"
        )
    built = builder(annotations=".")
    assert built.splits == ["train", "val"]
    good, bad = samples(built.get_split("train"))
    assert good["text_input"] == "train" and bad.cause == "bad record"
    assert samples(built.get_split("val"))[0]["image_id"] == "data/validation-00000-of-00001.parquet#image:0"
    assert len(builder(annotations={"val": "."}).get_split("val")) == 2
    with pytest.raises(DataError, match="has no tables of the split 'test'. Splits: train, val"):
        builder(annotations={"test": "."}).get_split("test")


QUESTIONS = [
    {"image": "a.png", "question": "What is it?", "answer": ["dog", "dog", "cat"]},
    {"image": "a.png", "question": "Is it red?", "answer": "no"},
    {"image": "b.png", "question": "Where?", "answer": ""},
]


def test_question_columns_make_a_dataset_of_questions(folder):
    Path("q.json").write_text(json.dumps(QUESTIONS))
    Path("answers.json").write_text('["dog", "no"]')
    built = builder(
        questions=True, annotations={"train": "q.json", "val": "q.json"}, answer_list="answers.json"
    )
    torch.manual_seed(0)
    first, second, third = samples(built.get_split("train"))
    assert first["text_input"] == "what is it?" and first["text_output"] in ("dog", "cat")
    assert (second["text_output"], third.cause, third.id) == ("no", "empty answer", "record 2 of q.json")
    val = built.get_split("val")
    assert [s["question_id"] for s in samples(val)] == [0, 1, 2]
    assert val.answers() == {0: ["dog", "dog", "cat"], 1: ["no"]} and val.answer_list() == ["dog", "no"]
    everything = builder(questions=True, annotations={"train": "q.json"}, train_answers="all").get_split(
        "train"
    )[0]
    assert everything["answers"] == ["dog", "cat"] and everything["weights"] == pytest.approx([2 / 3, 1 / 3])


def test_numbers_are_the_texts_that_they_are_and_true_is_none(folder):
    answers = [3, 2.0, [1, "1", 0.5], True]
    Path("q.json").write_text(json.dumps([{**QUESTIONS[0], "answer": answer} for answer in answers]))
    built = builder(questions=True, annotations={"val": "q.json"}).get_split("val")
    assert built.answers() == {0: ["3"], 1: ["2"], 2: ["1", "1", "0.5"]}
    assert "must be text or a list of texts, not true" in built[3].reason


def test_captions_are_meant_where_a_table_has_both_and_questions_where_they_are_named(folder):
    rows = [{"image": "a.png", "caption": "x", "question": "why?", "answer": "so", "qid": "q1"}]
    write_csv("a.csv", rows)
    assert samples(builder(annotations={"train": "a.csv"}).get_split("train"))[0]["text_input"] == "x"
    asked = builder(annotations={"train": "a.csv"}, columns={"question": "question"}).get_split("train")[0]
    assert (asked["text_output"], asked["question_id"]) == ("so", "q1")


def test_ids_of_questions_that_are_not_their_own_are_told(folder):
    rows = [{**row, "answer": "x", "question_id": 5} for row in QUESTIONS]
    Path("q.json").write_text(json.dumps(rows))
    guessed = samples(builder(questions=True, annotations={"val": "q.json"}).get_split("val"))
    assert [s["question_id"] for s in guessed] == [0, 1, 2]
    named = builder(questions=True, annotations={"val": "q.json"}, columns={"question_id": "question_id"})
    assert [getattr(s, "cause", "good") for s in samples(named.get_split("val"))] == [
        "good",
        "duplicate id",
        "duplicate id",
    ]


@pytest.mark.parametrize(
    ("ids", "guessed"),
    [
        (("1", "2", "3"), ["1", "2", "3"]),
        (("1", "1", "2"), ["a.png", "b.png", "c.png"]),  # of two images: it is another thing's id
    ],
)
def test_a_guessed_id_that_two_images_share_is_none(folder, ids, guessed):
    rows = [{"image": name, "caption": "x", "id": own} for name, own in zip(CAPTIONS, ids, strict=True)]
    write_csv("a.csv", rows)
    found = samples(builder(annotations={"val": "a.csv"}).get_split("val"))
    assert [sample["image_id"] for sample in found] == guessed
    named = samples(builder(annotations={"val": "a.csv"}, columns={"id": "id"}).get_split("val"))
    causes = [getattr(sample, "cause", "good") for sample in named]
    assert causes == ["good", "duplicate id" if ids[1] == "1" else "good", "good"]


def test_own_videos_are_read_by_the_same_yaml(shared, folder):
    videos = shared / "data/lavis_cache/msrvtt/videos"
    names = sorted(os.listdir(videos))[:2]
    write_csv("clips.csv", [{"video": name, "caption": f"video {i}"} for i, name in enumerate(names)])
    dataset = builder("video_text", annotations={"train": "clips.csv"}, root=str(videos)).get_split("train")
    found = samples(dataset)
    assert [s["image"].shape for s in found] == [(3, 2, 8, 8)] * 2
    assert [s["text_input"] for s in found] == ["video 0", "video 1"]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.csv", "", "it is empty"),
        ("a.csv", "image,caption\n", "there are no rows"),
        ("a.json", " \n", "is empty"),
        ("a.json", "[]", "it is empty"),
        ("a.jsonl", "", "it is empty"),
        ("a.jsonl", "\n", "it is empty"),
        ("a.jsonl", "not json\n", "line 1 of a.jsonl: it is not JSON"),
    ],
)
def test_tables_without_rows_are_said_to_be_empty(folder, name, content, why):
    Path(name).write_text(content)
    with pytest.raises(DataError, match=rf"{folder}/{name}.*{why}"):
        builder(annotations={"train": name}).get_split("train")


def test_names_inside_the_root_come_without_it(folder):
    write_csv("a.csv", [{"image": f"{folder}/a.png", "caption": "x"}, {"image": "./a.png", "caption": "y"}])
    table = open_table(folder / "a.csv")
    records = read_records([table], ImageColumns(), "image", folder, "columns", needs_text=True)
    assert visuals(records) == {"a.png"}


def test_columns_that_are_given_are_not_guessed(folder):
    write_csv("a.csv", [{"image": "a.png", "caption": "x", "id": "1", "better": "y"}])
    records = read_records(
        [open_table(folder / "a.csv")],
        ImageColumns(text="better"),
        "image",
        folder,
        "columns",
        needs_text=True,
    )
    assert list(records) == [{"visual": "a.png", "image_id": "1", "caption": ["y"]}]


@pytest.mark.parametrize("rows", [ROWS, LISTS])
def test_an_image_with_all_its_captions_is_one_sample(folder, rows):
    Path("own.json").write_text(json.dumps(rows))
    own = builder(annotations={"train": "own.json", "val": "own.json"}, captions_together=True)
    train, val = own.build_split("train"), own.build_split("val")
    assert [s["text_input"] for s in samples(train)] == list(CAPTIONS.values())
    assert train.references() == val.references() == CAPTIONS
    batch = train.collater(samples(train))
    run = RunConfig(task="captioning", max_epoch=1)
    learned = registry.get_task_class("captioning")(run).to_learn(batch)
    assert learned["text_input"] == [text for texts in CAPTIONS.values() for text in texts]
    assert learned["num_texts"] == [2, 1, 3]
    assert all("text_input" not in sample for sample in samples(val))
    apart = builder(annotations={"train": "own.json"}).build_split("train")
    mixed = train.collater([train[0], apart[2], apart[4], train[2]])
    learned = registry.get_task_class("captioning")(run).to_learn(mixed)
    assert learned["text_input"] == [*CAPTIONS["a.png"], "red, and green", "y", *CAPTIONS["c.png"]]
    assert learned["num_texts"] == [2, 1, 1, 3]


@pytest.mark.parametrize("together", [False, True])
def test_all_images_of_one_id_are_learned(folder, together):
    """Such as several images of a thing: only where they are scored must ids tell them apart."""
    Path("own.json").write_text(json.dumps([{**row, "id": 7} for row in ROWS]))
    section = {"columns": {"id": "id"}, "captions_together": together}
    train = builder(annotations={"train": "own.json"}, **section).build_split("train")
    texts = [s["text_input"] for s in samples(train)]
    assert texts == (list(CAPTIONS.values()) if together else [row["caption"] for row in ROWS])
    assert {s["image_id"] for s in samples(train)} == {7}
    assert train.references() == {7: [row["caption"] for row in ROWS]}


def test_captions_together_of_questions_are_named(folder):
    Path("own.json").write_text(json.dumps([{"image": "a.png", "question": "what", "answer": "a dog"}]))
    own = builder(questions=True, annotations={"train": "own.json"}, captions_together=True)
    with pytest.raises(
        ConfigError, match="datasets.image_text.captions_together: this is a table of questions"
    ):
        own.build_split("train")


@pytest.mark.parametrize("kind", ["caption", "captions", "question", "shapes_caption", "shapes_vqa"])
def test_batches_of_similar_length_can_be_made_of_every_dataset_of_texts(folder, kind):
    texts = ["x" * (1 + 40 * (i % 5)) for i in range(20)]
    rows = [
        {"image": "a.png", "question": text, "answer": "yes"}
        if kind == "question"
        else {"image": f"{i % 3}.png" if kind == "caption" else f"{i}.png", "caption": text}
        for i, text in enumerate(texts)
    ]
    Path("own.json").write_text(json.dumps(rows))
    for name in {row["image"] for row in rows}:
        Image.new("RGB", (8, 8)).save(name)
    if kind.startswith("shapes"):
        own = builder(kind, kind == "shapes_vqa", train_size=20)
    else:
        together = {"captions_together": True} if kind == "captions" else {}
        own = builder(questions=kind == "question", annotations={"train": "own.json"}, **together)
    dataset = own.build_split("train")
    order = make_plan([dataset], 4, seed=1, group_by_length=True).order(0)
    assert sorted(order) == list(range(20))
    assert all(
        max(sizes) - min(sizes) <= (10 if kind.startswith("shapes") else 0)
        for sizes in ([dataset.size(i) for i in order[first : first + 4]] for first in range(0, 20, 4))
    )
    if kind == "caption":
        assert dataset.size(1) - dataset.size(0) == 10


def test_bad_rows_have_no_length_and_streams_are_not_grouped(folder, tmp_path):
    Path("own.json").write_text(json.dumps([*ROWS, {"image": "a.png", "caption": ""}]))
    dataset = builder(annotations={"train": "own.json"}).build_split("train")
    assert dataset.size(len(dataset) - 1) == 0
    with pytest.raises(ConfigError, match="group_by_length: ShardDataset is a stream"):
        make_plan([ShardDataset(["a.tar"], None, None)], 4, seed=1, group_by_length=True)
