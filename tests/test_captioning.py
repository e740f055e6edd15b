"""Captions for files: images, and videos where the model reads those."""

from __future__ import annotations

import logging

import pytest
from PIL import Image

from evlgen.captioning import caption_files
from evlgen.datasets.shapes.world import draw, scene


@pytest.fixture
def files(tmp_path):
    images = [Image.fromarray(draw(scene("test", i))) for i in range(3)]
    images[0].save(tmp_path / "picture.png")
    images[0].save(tmp_path / "clip.gif", save_all=True, append_images=images[1:])
    images[0].save(tmp_path / "still.gif", save_all=True, append_images=[images[0].transpose(0)])
    return [str(tmp_path / name) for name in ("picture.png", "clip.gif", "still.gif")]


def captions(paths, **options) -> dict[str, str]:
    return dict(caption_files(paths, num_beams=1, max_length=12, **options))


@pytest.fixture
def video_project(tmp_path):
    path = tmp_path / "video.yaml"
    path.write_text("model: {arch: evlgen_video_opt, model_type: shapes}\n")
    return str(path)


def test_a_model_of_videos_reads_frames_and_images_in_any_order(files, video_project):
    together = captions(files, cfg_path=video_project, num_frames=3)
    alone = {path: captions([path], cfg_path=video_project, num_frames=3)[path] for path in files}
    assert together == alone and all(together.values())
    one_frame = captions([files[1]], cfg_path=video_project, num_frames=1)
    image = captions([files[0]], cfg_path=video_project)
    assert one_frame[files[1]] == image[files[0]]  # the first frame is the image


def test_a_video_of_fewer_frames_than_asked_is_named(files, video_project, caplog):
    with caplog.at_level(logging.WARNING):
        captions([files[1]], cfg_path=video_project, num_frames=8)
    assert "clip.gif has 3 frames, fewer than the 8 asked for" in caplog.text


def test_a_model_of_images_takes_a_videos_first_image(files):
    found = captions(files[:2])
    assert found[files[0]] == found[files[1]]


def test_a_video_for_a_model_of_images_is_left_out_by_name(files, tmp_path, caplog):
    (tmp_path / "clip.mp4").touch()
    with caplog.at_level(logging.WARNING):
        found = captions([files[0], str(tmp_path / "clip.mp4")])
    assert list(found) == [files[0]]
    assert "clip.mp4 is a video; models of videos read those" in caplog.text
