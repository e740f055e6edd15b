"""Names and texts of users in messages, logs, figures and reports: shown escaped, and never parsed."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import re
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from evlgen import cli
from evlgen.common.errors import ConfigError, DataError, TrainingError
from evlgen.common.logs import log_to_file, log_to_terminal
from evlgen.common.safe_text import message_lines, printable, shown_name
from evlgen.config.problems import Problems
from evlgen.console import write_any_text
from evlgen.files.io import write_atomically
from evlgen.media.images import open_image
from evlgen.media.video import Video
from evlgen.tasks.caption_sheet import caption_sheet
from evlgen.visualization.sheet import Row, draw_sheet

HOSTILE = "a\x1b[31m\r\nerror: \x9b2J\u202e\u2028\ud800\x00b"
ESCAPED = r"a\x1b[31m\r\nerror: \x9b2J\u202e\u2028\ud800\x00b"


def test_control_characters_and_line_breaks_are_escaped_and_languages_are_not():
    assert printable(HOSTILE) == ESCAPED
    for text in ("日本語.png", "می‌خواهم", "👩‍👧 x", r"C:\new\table", "ünï"):
        assert printable(text) == text


def test_long_names_keep_their_start_and_end():
    shown = shown_name("/data/" + "x" * 10**6 + ".png")
    assert len(shown) < 300 and shown.startswith("/data/x") and shown.endswith("x.png") and "…" in shown


def test_an_error_is_one_line_whatever_it_names():
    error = DataError(f"{HOSTILE} is missing", "missing file")
    assert str(error) == f"{ESCAPED} is missing"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert len(str(DataError("x" * 10**6))) < 3000


def test_errors_of_several_lines_keep_these_alone():
    problems = Problems()
    problems.add("run.x\n  y", "is unknown")
    problems.add("run.z", "is unknown")
    with pytest.raises(ConfigError) as caught:
        problems.raise_any()
    lines = str(caught.value).split("\n")
    assert lines[1:] == [r"  run.x\n  y: is unknown.", "  run.z: is unknown."]
    assert str(TrainingError(str(caught.value))) == str(caught.value)  # on another process
    assert str(DataError(message_lines(["a:", str(caught.value)]))).split("\n")[1:] == lines


@pytest.mark.parametrize("read", [open_image, lambda path: len(Video(path))])
@pytest.mark.parametrize(
    "name", ["a\nb\x1b[1m.gif", "x" * 5000 + ".gif", "x/" * 3000 + "y.gif", "\udcff.gif"]
)
def test_readers_name_a_file_escaped_and_cut(tmp_path, read, name):
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    assert "cannot read" in str(caught.value) and str(caught.value).endswith(".")


def test_a_log_line_is_one_line_on_the_terminal_and_in_the_file(tmp_path, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    log_to_terminal()
    with log_to_file(tmp_path / "log.txt"):
        logging.getLogger("evlgen.x").warning("caption: %s", HOSTILE)
    for text in (stream.getvalue(), (tmp_path / "log.txt").read_text()):
        assert text.count("\n") == 1 and text.endswith(f"caption: {ESCAPED}\n")


def test_a_console_that_lacks_characters_shows_them_escaped(monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii", write_through=True))
    write_any_text()
    print("漢字 \udcff")
    assert buffer.getvalue() == rb"\u6f22\u5b57 \udcff" + b"\n"


def test_result_files_take_names_that_are_not_unicode(tmp_path):
    write_atomically(tmp_path / "x.json", json.dumps(["\udcff é"], ensure_ascii=False))
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == ["\udcff é"]


TEXTS = ["$\\frac$", "$5 and $10", HOSTILE, "x" * 5000, "漢字" * 50, "$", "_a", "", "<b>&amp;"]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_captions_are_drawn_as_they_are(tmp_path, monkeypatch):
    drawn = []
    from matplotlib.axes import Axes

    write = Axes.text
    monkeypatch.setattr(Axes, "text", lambda *a, **k: drawn.append(write(*a, **k)) or drawn[-1])
    with matplotlib.rc_context({"text.usetex": True}):
        caption_sheet([Image.new("RGB", (8, 8))] * len(TEXTS), [(t, t) for t in TEXTS], tmp_path / "x.png")
    assert [text.get_text() for text in drawn[:2]] == TEXTS[:2]
    assert not any(text.get_parse_math() or text.get_usetex() for text in drawn)
    assert re.sub(r"\s", "", drawn[2].get_text()) == re.sub(r"\s", "", ESCAPED)
    assert len(drawn[3].get_text()) < 200


def test_names_beside_merging_sheets_may_be_anything():
    panel = np.zeros((64, 64, 3), np.uint8)
    for name in [*TEXTS, "x" * 10**6]:
        draw_sheet([["image", "65 tokens"]], [Row(name, name, [panel])])


def test_caption_names_hostile_files_on_an_ascii_console(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["grün\x1b[31m\n漢.png", os.fsdecode(b"\xff.png")]
    for name in names:
        Image.new("RGB", (64, 64)).save(name)
    out, err = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii", write_through=True))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(err, "ascii", "backslashreplace", write_through=True))
    assert cli.main(["caption", "--num-beams", "1", *names, "no\x1b[31m\nfile.png"]) == 1
    shown, said = (stream.getvalue().decode("ascii") for stream in (out, err))
    assert [line.partition(": ")[0] for line in shown.splitlines()] == [
        r"gr\xfcn\x1b[31m\n\u6f22.png",
        r"\udcff.png",
    ]
    assert said.splitlines()[-1] == (
        r"error: 1 of the 3 paths named could not be captioned: no\x1b[31m\nfile.png."
    )
    assert "\x1b" not in shown + said
    assert cli.main(["caption", "--num-beams", "1", "--output", "o\x1b[31m\nx.jsonl", names[1]]) == 0
    assert out.getvalue().splitlines()[-1] == rb"o\x1b[31m\nx.jsonl: 1 captions"


def test_an_option_cannot_write_to_the_terminal(capsys):
    assert cli.train(["--cfg-path", "no\x1b[31m\nfile.yaml"]) == 1
    assert r"no\x1b[31m\nfile.yaml" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["caption", "x.png", "--no\x1b[31m\nsuch"])
    assert capsys.readouterr().err.endswith("error: unrecognized arguments: --no\\x1b[31m\\nsuch\n")
