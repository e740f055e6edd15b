"""The figure of merging: its sheet, in Python and by the command."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from evlgen import cli
from evlgen.common.errors import ConfigError, DataError
from evlgen.common.registry import registry
from evlgen.datasets.shapes.world import draw, scene
from evlgen.media.frames import read_frames
from evlgen.visualization import draw_merging, untrained
from evlgen.visualization.figure import _note, draw_found, merge_videos
from evlgen.visualization.merging import Merging, Stage, find_merging
from evlgen.visualization.regions import draw_regions
from evlgen.visualization.sheet import Row, draw_sheet


def image(index: int = 3) -> Image.Image:
    return Image.fromarray(draw(scene("test", index)))


@pytest.fixture(scope="module")
def bundled():
    return registry.get_model_class("evlgen_opt").from_pretrained("shapes")


@pytest.fixture
def files(tmp_path):
    for index in (1, 2):
        image(index).save(tmp_path / f"{index}.png")
    return tmp_path


def places(sheet: Image.Image, panel: np.ndarray) -> list[tuple[int, int]]:
    """Every (x, y) at which a sheet shows a panel, pixel for pixel."""
    pixels = np.asarray(sheet)
    height, width = panel.shape[:2]
    inner = pixels[: 1 - height or None, : 1 - width or None]
    corners = (inner == panel[0, 0]).all(-1)
    for y, x in ((0, -1), (-1, 0), (-1, -1), (height // 2, width // 2), (height // 3, width // 3)):
        far = np.roll(pixels, (-(y % height), -(x % width)), axis=(0, 1))[: inner.shape[0], : inner.shape[1]]
        corners &= (far == panel[y, x]).all(-1)
    found = [(int(x), int(y)) for y, x in np.argwhere(corners)]
    return [(x, y) for x, y in found if np.array_equal(pixels[y : y + height, x : x + width], panel)]


def test_a_sheet_has_each_panel_once_in_rows_and_columns(bundled):
    images = [image(1), image(2)]
    sheet = draw_merging(bundled, images, names=["one", "two"])
    corners = []
    for shown in images:
        merging = find_merging(bundled, [shown])
        panels = [merging.images[0].repeat(4, 0).repeat(4, 1)]
        panels += [draw_regions(merging.images[0], stage.groups[0], 4, 3) for stage in merging.stages[1:]]
        found = [places(sheet, panel) for panel in panels]
        assert [len(f) for f in found] == [1] * 4
        corners.append([f[0] for f in found])
    assert sheet.mode == "RGB"
    assert [x for x, _ in corners[0]] == sorted({x for x, _ in corners[0]}) == [x for x, _ in corners[1]]
    assert len({y for _, y in corners[0]}) == 1 and corners[1][0][1] >= corners[0][0][1] + 256


def test_paths_images_and_videos_are_drawn_alike(bundled, files):
    one = draw_merging(bundled, image(1), "last")
    assert one == draw_merging(bundled, files / "1.png", "last") == draw_merging(bundled, [image(1)], "last")
    both = draw_merging(bundled, [[image(1), image(2)]], "last")  # to this model a video is its images
    assert both.height > one.height + 256


def test_before_training_the_same_seed_draws_the_same_and_it_is_not_the_trained_one(bundled):
    ends = []
    for seed in (1, 1, 2):
        model = untrained(bundled, seed)
        ends.append(find_merging(model, [image()]).stages[-1].groups)
        assert torch.equal(
            model.vision.trunk.pos_embed, bundled.vision.trunk.pos_embed
        )  # the frozen parts are pretrained in both
    assert np.array_equal(ends[0], ends[1])
    assert not np.array_equal(ends[0], ends[2])
    assert not np.array_equal(ends[0], find_merging(bundled, [image()]).stages[-1].groups)
    with pytest.raises(ConfigError, match=r"model.checkpoint is not set.*--checkpoint"):
        untrained(model, 1)


def test_models_are_compared_row_by_row(bundled):
    other = untrained(bundled, 1)
    sheet = draw_merging({"trained": bundled, "untrained": other}, [image()])
    rows = []
    for model in (bundled, other):
        merging = find_merging(model, [image()])
        panel = draw_regions(merging.images[0], merging.stages[-1].groups[0], 4, 3)
        rows += places(sheet, panel)
    assert len(rows) == 2 and rows[0][0] == rows[1][0] and rows[0][1] + 256 < rows[1][1]


def test_models_with_other_columns_are_not_put_on_one_sheet(bundled):
    found = {"a": merge_videos(bundled, [[image()]]), "b": merge_videos(bundled, [[image()]], "last")}
    with pytest.raises(ConfigError, match="draw each alone"):
        draw_found(found, ["one"])


def test_the_class_token_is_named_where_patches_are_with_it(bundled):
    merging = find_merging(bundled, [image()], "last")
    start, end = merging.stages
    panel = draw_regions(merging.images[0], end.groups[0], 4, 3)
    assert len(places(draw_found({"": [[merging]]}, [""]), panel)) == 1
    joined = dataclasses.replace(end, prefix=end.groups[:, 3, 5:6])
    changed = dataclasses.replace(merging, stages=(start, joined))
    sheet = draw_found({"": [[changed]]}, [""])
    assert not places(sheet, panel)
    row, column = np.argwhere(end.groups[0] == end.groups[0, 3, 5])[0]
    panel[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32] = 0  # the one patch it is written on
    x = sheet.width - 256 - 6
    (_, y), *_ = places(sheet, merging.images[0].repeat(4, 0).repeat(4, 1))
    shown = np.asarray(sheet)[y : y + 256, x : x + 256].copy()
    shown[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32] = 0
    assert np.array_equal(shown, panel)


def test_long_titles_and_many_columns_fit():
    panels = [np.zeros((40, 40, 3), dtype=np.uint8)] * 3
    headings = [["a heading that is wider than its column", "x"]] * 3
    sheet = draw_sheet(headings, [Row("untrained", "a name " * 20, panels)], note="word " * 60)
    pixels = np.asarray(sheet)
    assert (pixels[:, -1] == 255).all() and (pixels[-1] == 255).all() and (pixels[0] == 255).all()


def test_the_command_draws_two_images_on_one_sheet(files, capsys):
    target = files / "new" / "sheet.png"
    assert cli.main(["visualize", str(files / "1.png"), str(files / "2.png"), "--output", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    with Image.open(target) as sheet:
        assert sheet.format == "PNG" and sheet.width > 4 * 256 and sheet.height > 2 * 256


def test_the_command_draws_a_folder_into_a_folder_and_leaves_out_what_is_no_image(files, capsys):
    (files / "3.jpg").write_text("not an image")
    command = ["visualize", str(files), "--output", str(files / "out"), "--layers", "last"]
    assert cli.main([*command, "--compare-untrained"]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(files / "out" / f"{n}.png") for n in (1, 2)] and "3.jpg" in err
    with Image.open(files / "out" / "1.png") as sheet:
        assert sheet.width < 3 * 300 and sheet.height > 2 * 256


def test_the_command_says_what_is_wrong(files, capsys, write_project):
    for arguments, wrong in (
        ([str(files / "1.png"), "--layers", "4"], "'4' is no layer"),
        ([str(files / "no.png")], "none of the 1 files"),
        ([str(files / "1.png"), "--output", str(files / "a.jpg")], "PNG files"),
        (
            [str(files / "1.png"), "--cfg-path", str(write_project(files, model={"checkpoint": None}))]
            + ["--compare-untrained"],
            "model.checkpoint is not set",
        ),
        (
            [str(files / "1.png"), "--output", str(files / "1.png" / "under" / "a.png")],
            "cannot write",
        ),
    ):
        assert cli.main(["visualize", *arguments]) == 1
        assert wrong in capsys.readouterr().err


def test_a_connector_that_does_not_merge_is_a_message(files, capsys, write_project):
    project = write_project(files)
    content = OmegaConf.load(project)
    content.model.connector, content.model.checkpoint = {"name": "mlp"}, None
    OmegaConf.save(content, project)
    assert cli.main(["visualize", str(files / "1.png"), "--cfg-path", str(project)]) == 1
    assert "does not merge tokens" in capsys.readouterr().err


def test_an_animated_gif_is_a_video(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue", "white")]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    read = read_frames(tmp_path / "clip.gif", 2)
    assert [frame.getpixel((4, 4)) for frame in read] == [(255, 0, 0), (0, 0, 255)]
    frames[1].save(tmp_path / "still.gif")
    assert [frame.getpixel((4, 4)) for frame in read_frames(tmp_path / "still.gif", 2)] == [(0, 255, 0)]


def test_videos_are_read_frame_by_frame_and_broken_ones_named(shared, tmp_path):
    videos = shared / "data" / "lavis_cache" / "msrvtt" / "videos"
    for name in ("video0.mp4", "video3.avi", "video4.mkv"):
        frames = read_frames(videos / name, 3)
        assert len(frames) == 3 and frames[0] != frames[2] and frames[0].width > 300
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(DataError, match=r"text.mp4.*damaged"):
        read_frames(tmp_path / "text.mp4", 3)
    with pytest.raises(DataError, match="does not exist"):
        read_frames(tmp_path / "none.mp4", 3)


@pytest.mark.parametrize(
    ("names_one", "frames", "spans_frames", "said"),
    [
        (False, 1, False, "stays a token of its own"),
        (True, 1, False, "CLS (REG)"),
        (False, 2, False, "same patches of every frame"),
        (False, 2, True, "merge with no patch"),
    ],
)
def test_the_note_says_what_became_of_the_class_token(names_one, frames, spans_frames, said):
    prefix = np.zeros((frames, 1), dtype=int)
    groups = np.arange(frames * 4).reshape(frames, 2, 2) + (0 if names_one else 1)
    stages = (Stage("tokens", 5, np.arange(frames * 4).reshape(frames, 2, 2) + 1, prefix),)
    stages += (Stage("end", 5, groups, prefix),)
    merging = Merging(np.zeros((frames, 8, 8, 3), np.uint8), stages, spans_frames, has_class_token=True)
    assert said in _note([merging])
