"""Tables as people keep them: every row comes out as it was meant, or is named and harms no other."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evlgen.common.errors import DataError
from evlgen.datasets.archive_media import cell_name
from evlgen.datasets.base_dataset import BadRecord
from evlgen.datasets.table_folders import find_tables
from evlgen.datasets.tables import open_table


def rows(path: Path, content: str | bytes) -> list:
    """The values of the rows in a file of this content; of a bad one (place, cause)."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    table = open_table(path)
    return [
        (row.id, row.cause) if isinstance(row, BadRecord) else list(row.values.values())
        for row in table.rows(table.columns)
    ]


@pytest.mark.parametrize(
    "content",
    [
        'image,caption\n1.jpg,"a dog; a cat"\n2.jpg,red\n',
        '\ufeffimage;caption\r\n1.jpg;"a dog; a cat"\r\n\r\n2.jpg;red\r\n',
        'image\tcaption\n1.jpg\t"a dog; a cat"\n2.jpg\tred',
        "image|caption\n1.jpg|a dog; a cat\n2.jpg|red\n",
        'image,caption\r1.jpg,"a dog; a cat"\r2.jpg,red\r',
    ],
    ids=["comma", "semicolon, BOM, CRLF, blank line", "tab", "bar", "CR"],
)
def test_what_parts_the_fields_is_found(tmp_path, content):
    assert rows(tmp_path / "a.csv", content) == [["1.jpg", "a dog; a cat"], ["2.jpg", "red"]]


def test_spreadsheets_utf16_is_read(tmp_path):
    text = "image\tcaption\n1.jpg\tcafé, ☕\n"
    assert rows(tmp_path / "a.csv", text.encode("utf-16")) == [["1.jpg", "café, ☕"]]


def test_a_tsv_keeps_commas_and_lone_quotes(tmp_path):
    content = 'a,b\tc\n"Stop" says a sign\tx\n5" pipe\ty\n'
    assert rows(tmp_path / "a.tsv", content) == [['"Stop" says a sign', "x"], ['5" pipe', "y"]]


def test_quoted_newlines_stay_and_lines_are_counted_over_them(tmp_path):
    found = rows(
        tmp_path / "a.csv", b'image,caption\n1.jpg,"two\nlines, ""quoted"""\n2.jpg,caf\xe9\n3.jpg,x\n'
    )
    assert found == [["1.jpg", 'two\nlines, "quoted"'], ("line 4 of a.csv", "not UTF-8"), ["3.jpg", "x"]]


def test_ragged_rows_are_named_with_a_remedy(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("image,caption\n1.jpg,a, b\n2.jpg\n3.jpg,x\n")
    table = open_table(path)
    long, short, good = table.rows(table.columns)
    assert long.reason == "it has 3 fields, and the first row names 2; a text with ',' in it needs quotes."
    assert (short.reason, short.cause) == ("it has 1 fields, and the first row names 2.", "ragged row")
    assert good.place == "line 4 of a.csv"


def test_a_quote_that_never_ends_costs_its_own_line_only(tmp_path):
    found = rows(tmp_path / "a.csv", 'image,caption\n1.jpg,"open\n2.jpg,"fine"\n3.jpg,x\n')
    assert found == [("line 2 of a.csv", "bad quotes"), ["2.jpg", "fine"], ["3.jpg", "x"]]
    found = rows(tmp_path / "b.csv", 'image,caption\n1.jpg,x\n2.jpg,"open\n3.jpg,y\n4.jpg,z\n')
    assert found == [["1.jpg", "x"], ("line 3 of b.csv", "bad quotes"), ["3.jpg", "y"], ["4.jpg", "z"]]


def test_texts_may_be_longer_than_pythons_limit_for_fields(tmp_path):
    limit = csv.field_size_limit()
    long = "red, " * (limit // 4)
    found = rows(
        tmp_path / "a.csv", f'image,caption\n1.jpg,"{long}"\n2.jpg,"never ends\n3.jpg,x\n4.jpg,"y"\n'
    )
    assert found == [["1.jpg", long], ("line 3 of a.csv", "bad quotes"), ["3.jpg", "x"], ["4.jpg", "y"]]
    assert csv.field_size_limit() == limit


def test_a_quote_that_ends_in_a_later_row_swallows_no_rows(tmp_path):
    content = (
        'image,caption\n1.jpg,"Stop\n2.jpg,red\n3.jpg,says a "sign"\n4.jpg,x\n5.jpg,"go\n6.jpg,says it"\n'
    )
    assert rows(tmp_path / "a.csv", content) == [
        *(("line 2 of a.csv", "bad quotes"), ["2.jpg", "red"], ["3.jpg", 'says a "sign"'], ["4.jpg", "x"]),
        *(("line 6 of a.csv", "bad quotes"), ["6.jpg", 'says it"']),
    ]
    prose = 'image,caption\n1.jpg,"A dog\nrunning, fast"\n2.jpg,"one\n\ntwo"\n'
    assert rows(tmp_path / "b.csv", prose) == [["1.jpg", "A dog\nrunning, fast"], ["2.jpg", "one\n\ntwo"]]
    assert rows(tmp_path / "c.csv", 'caption\n"two\nlines"\n') == [["two\nlines"]]


@pytest.mark.parametrize(
    "content",
    [
        'path,caption\na.png,a red dog\nb.png,"STOP\n1,000 m ahead"\nd.png,"x\ny,z"\n',
        'path,caption\na.png,"see\nb.png,blue"\nc.png,""""\n,\nd.png,"a ""b"", c"\n',
        'path,caption,more\na.png,"1,2,3\n4,5,6\n\n7,8,9",x\n',
        "path,caption\n" + 'a.png,"' + "b.png,c\n" * 10_000 + '"\nz.png,last\n',
        'path,"caption (en; de; fr)"\na.png,"dog; Hund; chien"\nb.png,ragged, row\n',
        "path,caption (en|de|fr)\na.png,dog|Hund|chien\nb.png,cat|Katze|chat\n",
        'path,caption;x\na.png,"' + "a;b\n" * 400 + '"\nb.png,c;d\n',
    ],
    ids=["numbers", "rows in quotes", "three columns", "long", "quoted", "in the header", "long start"],
)
def test_what_pythons_csv_reads_without_complaint_is_read_as_it_does(tmp_path, content):
    expected = [row for row in csv.reader(content.splitlines(keepends=True), strict=True) if row][1:]
    width = content.partition("\n")[0].count(",") + 1
    assert [row for row in rows(tmp_path / "a.csv", content) if isinstance(row, list)] == [
        row for row in expected if len(row) == width
    ]


def test_one_row_whose_quotes_are_wrong_leaves_the_others_as_they_are(tmp_path):
    content = (
        'path,caption\na.png,"fine\n1,000 m"\nb.png,"no" quotes\nc.png,"STOP\n1,000 m ahead"\nz.png,"cut'
    )
    assert rows(tmp_path / "a.csv", content) == [
        *(["a.png", "fine\n1,000 m"], ["b.png", '"no" quotes'], ["c.png", "STOP\n1,000 m ahead"]),
        ("line 7 of a.csv", "bad quotes"),
    ]


@pytest.mark.parametrize("line", ['a.png","c\n', 'a.png,"b\n', '"""\n'])
def test_quotes_that_never_end_cost_no_more_than_their_lines(tmp_path, line):
    found = rows(tmp_path / "a.csv", "path,caption\n" + line * 10_000 + "z.png,last\n")
    assert 4_500 < len(found) <= 10_001  # the square of their number would take minutes


def test_columns_without_a_name_are_ignored(tmp_path):
    found = rows(tmp_path / "a.csv", "path,caption,,\na.png,a dog,,\nb.png,a cat\nc.png,red,note,\n")
    assert found == [["a.png", "a dog"], ["b.png", "a cat"], ["c.png", "red"]]
    assert rows(tmp_path / "b.csv", ",path,,caption\n0,a.png,x,a dog\n") == [["a.png", "a dog"]]
    assert rows(tmp_path / "c.csv", "path,caption\na.png,a dog,,\n") == [["a.png", "a dog"]]
    (tmp_path / "d.csv").write_text(",,\na,b,c\n")
    with pytest.raises(DataError, match="no row that names its columns"):
        open_table(tmp_path / "d.csv")


@pytest.mark.parametrize("key", [None, "data", "annotations", "records"])
def test_json_lists_are_found_at_the_top_or_under_their_usual_keys(tmp_path, key):
    records = [{"image": "1.jpg"}, 7, {"image": "2.jpg", "caption": ["a", "b"]}]
    content = json.dumps(records if key is None else {"info": {}, key: records})
    assert rows(tmp_path / "a.json", content) == [
        ["1.jpg"],
        ("record 1 of a.json", "bad record"),
        ["2.jpg", ["a", "b"]],
    ]
    assert open_table(tmp_path / "a.json").columns == ["image", "caption"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson"])
def test_json_lines_break_one_by_one(tmp_path, name):
    content = b'\xef\xbb\xbf{"image": "1.jpg"}\n{"image": \n\n{"image": "caf\xe9"}\n[1]\n{"image": "2.jpg"}'
    assert rows(tmp_path / name, content) == [
        ["1.jpg"],
        (f"line 2 of {name}", "not JSON"),
        (f"line 4 of {name}", "not UTF-8"),
        (f"line 5 of {name}", "bad record"),
        ["2.jpg"],
    ]


def test_images_in_bytes_become_names_and_others_values(tmp_path):
    image = pa.array([{"bytes": b"png", "path": "x.png"}, {"bytes": None, "path": "y.png"}, None])
    table = pa.table({"image": image, "raw": pa.array([b"1", None, b""]), "n": [1, 2, 3]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pa.ipc.new_file(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(tmp_path / "c.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        path = tmp_path / name
        found = [row.values for row in open_table(path).rows(["image", "raw", "n"], ["image", "raw"])]
        assert [v["image"] for v in found] == [cell_name(path, "image", 0, b"png"), "y.png", None]
        assert [v["raw"] for v in found] == [cell_name(path, "raw", 0, b"1"), None, f"{path}#raw:2"]
        assert [v["n"] for v in found] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", r"a\.csv has no row that names its columns: it is empty"),
        ("a.csv", b"im\xe4ge,caption\n", r"a\.csv is not UTF-8 text: save it as UTF-8"),
        ("a.csv", "image,text,text\n", r"a\.csv has two columns 'text'"),
        ("a.json", "{}", r"a\.json must be a list of records, or have one under 'annotations' or 'data'"),
        ("a.json", '[{"image"', r"a\.json is not JSON"),
        ("a.parquet", "PAR1 no PAR1", r"a\.parquet cannot be read"),
        ("a.arrow", "no arrow", r"a\.arrow is not an Arrow file"),
        ("a.xlsx", "x", r"a\.xlsx has no known format: a table is one of \.csv, \.tsv"),
    ],
)
def test_a_file_that_is_no_table_is_named(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        rows(tmp_path / name, content)
    with pytest.raises(DataError, match="there is no table at"):
        open_table(tmp_path / "gone.csv")


def files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("image,caption\n")
    return folder


def found(path: Path) -> dict:
    """Split -> (names of its tables below the folder, its root likewise)."""
    return {
        split: ([f.relative_to(path).as_posix() for f in t.files], t.root.relative_to(path).as_posix())
        for split, t in find_tables(path).items()
    }


def test_splits_of_a_folder_follow_from_names(tmp_path):
    shards = files(
        tmp_path / "a",
        *(f"data/{s}-0000{i}-of-00002.parquet" for s in ("train", "validation") for i in (1, 0)),
    )
    assert found(shards) == {
        "train": (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], "."),
        "val": (["data/validation-00000-of-00002.parquet", "data/validation-00001-of-00002.parquet"], "."),
    }
    assert found(files(tmp_path / "b", "test.csv", "train.csv", "sizes.json")) == {
        "test": (["test.csv"], "."),
        "train": (["train.csv"], "."),
    }
    assert found(files(tmp_path / "c", "part-0.parquet", "part-1.parquet")) == {
        None: (["part-0.parquet", "part-1.parquet"], ".")
    }


def test_a_folder_of_images_with_metadata_is_read_beside_them(tmp_path):
    assert found(files(tmp_path / "a", "metadata.csv", "other.csv")) == {None: (["metadata.csv"], ".")}
    assert found(files(tmp_path / "b", "train/metadata.jsonl", "test/metadata.jsonl")) == {
        "train": (["train/metadata.jsonl"], "train"),
        "test": (["test/metadata.jsonl"], "test"),
    }


def test_what_save_to_disk_writes_is_read_in_its_order(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    for split, names in (("train", ["data-1.arrow", "data-0.arrow"]), ("validation", ["data-0.arrow"])):
        (tmp_path / split).mkdir()
        state = {"_data_files": [{"filename": name} for name in names]}
        (tmp_path / split / "state.json").write_text(json.dumps(state))
    assert found(tmp_path) == {
        "train": (["train/data-1.arrow", "train/data-0.arrow"], "train"),
        "val": (["validation/data-0.arrow"], "validation"),
    }


def test_folders_that_leave_it_open_say_so(tmp_path):
    with pytest.raises(DataError, match=r"holds several tables \(a\.csv, b\.csv\): name the one"):
        find_tables(files(tmp_path / "a", "a.csv", "b.csv"))
    twice = files(tmp_path / "c", "train.parquet", "data/train-0.parquet", "data/train-1.parquet")
    message = (
        r"several tables of the split 'train' \(train\.parquet, data/train-0\.parquet, data/train-1.*\):"
    )
    with pytest.raises(DataError, match=message):
        find_tables(twice)
    with pytest.raises(DataError, match=r"of the split 'val' \(val/a\.parquet, validation/a\.parquet\)"):
        find_tables(files(tmp_path / "d", "val/a.parquet", "validation/a.parquet"))
    with pytest.raises(DataError, match=r"of the split 'train' \(train\.arrow, train\.parquet\)"):
        find_tables(files(tmp_path / "e", "train.parquet", "train.arrow"))
    with pytest.raises(DataError, match=r"holds no table \(\.csv.*and is no Hugging Face dataset folder"):
        find_tables(files(tmp_path / "b", "README.md"))
    (tmp_path / "b" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="state.json has no list '_data_files'"):
        find_tables(tmp_path / "b")
