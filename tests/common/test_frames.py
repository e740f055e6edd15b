"""Finding image files and videos by their names."""

from __future__ import annotations

import os

from PIL import Image

from evlgen.media.frames import find_files, without_result
from evlgen.media.images import FORMATS, IMAGE_SUFFIXES
from evlgen.media.video import VIDEO_SUFFIXES


def test_folders_are_walked_in_order_and_links_to_folders_once(tmp_path):
    for name in ("b/z.png", "b/a/y.jpg", "a.png", "c.png", ".trash/x.png", "b/no.txt", "elsewhere/1.png"):
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).touch()
    (tmp_path / "top" / "elsewhere").rename(tmp_path / "elsewhere")
    (tmp_path / "top" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "top" / "b" / "loop").symlink_to(tmp_path / "top", target_is_directory=True)
    top = str(tmp_path / "top")
    found = [os.path.relpath(path, top) for path in find_files([top], videos=False)]
    assert found == ["a.png", "c.png", "b/z.png", "b/a/y.jpg", "link/1.png"]
    assert without_result([top, "x.png", top + "/b"], {top + "/a.png"}, videos=False) == ["x.png", top + "/b"]


def test_each_format_that_is_read_has_a_suffix_that_pillow_knows_too():
    Image.init()
    named = {Image.EXTENSION[suffix] for suffix in IMAGE_SUFFIXES if suffix in Image.EXTENSION}
    assert named == set(FORMATS) & set(Image.EXTENSION.values())


def test_a_folder_stands_for_the_images_in_it_and_for_its_videos_where_these_are_read(tmp_path):
    for suffix in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, ".txt"):
        (tmp_path / f"a{suffix}").touch()
    images, all_files = (find_files([str(tmp_path)], videos) for videos in (False, True))
    assert images == sorted(str(tmp_path / f"a{suffix}") for suffix in IMAGE_SUFFIXES)
    assert set(all_files) - set(images) == {str(tmp_path / f"a{suffix}") for suffix in VIDEO_SUFFIXES}
    assert find_files(["none.txt"], videos=True) == ["none.txt"]
