"""What is refused of a PyTorch file before anything is read from it, and what passes."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from evlgen.common.errors import CheckpointError
from evlgen.weights.pickle_check import DamagedPickle, RefusedPickle, check_pickles
from evlgen.weights.weights import check_weights_file, read_pickle, read_weights

DEEP = b"\x80\x02)" + b"\x85" * 100 + b"."


def zipped(path: Path, *entries: tuple[str, bytes], names: dict[str, str] | None = None) -> Path:
    """A zip file of named entries; ``names``: what is in the file for a name instead."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content)
    content = path.read_bytes()
    for old, new in (names or {}).items():
        assert len(old) == len(new)
        content = content.replace(old.encode(), new.encode())
    path.write_bytes(content)
    return path


def legacy(path: Path, content: bytes) -> Path:
    """A file in the layout before zip files, with these bytes as the pickle of its content."""
    start = b"".join(pickle.dumps(value, 2) for value in (MAGIC_NUMBER, PROTOCOL_VERSION, {}))
    path.write_bytes(start + content + pickle.dumps([], 2))
    return path


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        ([("x/DATA.PKL", DEEP), ("x/version", b"3\n")], None),
        ([("x/Data.pKl", DEEP), ("x/version", b"3\n"), ("x/other.pkl", b"\x80\x02}.")], None),
        ([("x/_0y.pkl", b""), ("x", DEEP), ("x/version", b"3\n")], {"x/_0y": "x\0/0y"}),
    ],
    ids=["capitals", "mixed", "zero byte"],
)
def test_the_pickle_is_found_as_torch_finds_it(tmp_path, entries, names):
    path = zipped(tmp_path / "x.pth", *entries, names=names)
    for read in (read_weights, read_pickle, check_weights_file):
        with pytest.raises(CheckpointError, match=r"is refused: .*nested too deeply|cannot be read"):
            read(path)


def test_a_capital_name_with_tensors_in_it_is_read(tmp_path):
    torch.save({"a": torch.arange(3)}, tmp_path / "x.pth")
    content = (tmp_path / "x.pth").read_bytes().replace(b"/data.pkl", b"/DATA.PKL")
    (tmp_path / "x.pth").write_bytes(content)
    assert read_weights(tmp_path / "x.pth")["a"].tolist() == [0, 1, 2]


def test_a_file_is_a_zip_file_where_torch_takes_it_for_one(tmp_path):
    """By its first bytes: the older layout with a zip file of nothing bad behind it is of the older one."""
    good = zipped(tmp_path / "good.zip", ("x/data.pkl", b"\x80\x02}."), ("x/version", b"3\n"))
    path = legacy(tmp_path / "x.pth", DEEP)
    path.write_bytes(path.read_bytes() + good.read_bytes())
    assert zipfile.is_zipfile(path)
    with pytest.raises(RefusedPickle, match="nested too deeply"):
        check_pickles(path)


@pytest.mark.parametrize("damage", ["bytes behind", "two directories", "zip64"])
def test_the_directory_checked_is_the_one_torch_reads(tmp_path, damage):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(3)}, path)
    content = bytearray(path.read_bytes())
    if damage == "bytes behind":
        content += bytes(3)
    elif damage == "two directories":  # readers who add what precedes the zip file find the second
        content = content[:60] + content
    else:  # the end of the directory is elsewhere
        place = content.rindex(b"PK\x06\x07") + 8
        content[place : place + 8] = (7).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(DamagedPickle, match="bytes after its end|directory is not where it says"):
        check_pickles(path)


def grown(count: int) -> bytes:
    """Lists, each with the one before in 50 tuples, which is appended when the memo has it already."""
    lists = b"".join(
        b"]r%b" % number.to_bytes(4, "little")
        + (b"j%b" % (number - 1).to_bytes(4, "little") + b"\x85" * 50 + b"a" if number else b"")
        for number in range(count)
    )
    return b"\x80\x02(" + lists + b"t."


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (DEEP, "nested too deeply"),
        (grown(2000), "nested too deeply"),
        (b"\x80\x02]q\x00h\x00a.", "contain themselves"),
        (b"\x80\x02]q\x00\x85h\x00)a.", "not in order|contain themselves"),
        (b"\x80\x02ctorch.storage\nUntypedStorage\n\x8a\x05" + (20 << 30).to_bytes(5, "little") + b"\x85R.",
         "calls torch.storage UntypedStorage"),
        (b"\x80\x02ctorch.storage\nUntypedStorage\nq\x00)h\x00)\x81.", "calls torch.storage UntypedStorage"),
        (b"\x80\x02K\x01)R.", "calls a value"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x08\x00\x00\x00punycode\x86R.", "'punycode'"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00a\x85R.", "encodes text"),
        (b"\x80\x02cos\nsystem\n.", "os.system"),
        (b"\x80\x02ctorch\n_inductor\n.", "torch._inductor"),
    ],
)  # fmt: skip
def test_what_is_refused_in_either_layout(tmp_path, content, why):
    for path in (
        legacy(tmp_path / "legacy.pth", content),
        zipped(tmp_path / "zip.pth", ("x/data.pkl", content), ("x/version", b"3\n")),
    ):
        with pytest.raises((RefusedPickle, DamagedPickle), match=why):
            check_pickles(path)


def test_what_torch_saves_of_tensors_and_plain_values_passes(tmp_path):
    shared = torch.arange(6.0)
    layer = torch.nn.Linear(2, 3)
    content = {
        "state": layer.state_dict(),  # an OrderedDict with a state of its own
        "parameters": list(layer.parameters()),
        "views": [shared[:3], shared.reshape(2, 3).t()],
        "bytes": [b"\x00\xff" * 200],
        "plain": [None, True, 1, 2**70, 0.5, "\u00e9", (1, (2, (3,))), {1, 2}, 1j, torch.float16],
        "many": {i: (i,) for i in range(3000)},
        "kinds": [torch.Size([1, 2]), torch.device("cpu"), Counter("aab"), OrderedDict(a=1)],
    }
    content["again"] = content["views"]
    for new in (True, False):
        torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
        read = read_pickle(tmp_path / "x.pth")
        assert read["plain"] == content["plain"] and read["bytes"] == content["bytes"]
        assert torch.equal(read["views"][1], content["views"][1]) and read["again"] is read["views"]
        assert read["many"] == content["many"] and read["kinds"] == content["kinds"]
    buffer = io.BytesIO()
    torch.save({**content, "storage": torch.UntypedStorage(24)}, buffer)
    (tmp_path / "buffer.pth").write_bytes(buffer.getvalue())
    assert read_pickle(tmp_path / "buffer.pth")["storage"].nbytes() == 24
