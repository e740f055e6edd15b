"""Finding picture files and clips by their names."""

from __future__ import annotations

from PIL import Image

from evlgen.common.frames import find_files
from evlgen.common.images import FORMATS, PICTURE_SUFFIXES
from evlgen.common.video import VIDEO_SUFFIXES


def test_each_format_that_is_read_has_a_suffix_that_pillow_knows_too():
    Image.init()
    named = {Image.EXTENSION[suffix] for suffix in PICTURE_SUFFIXES if suffix in Image.EXTENSION}
    assert named == set(FORMATS) & set(Image.EXTENSION.values())


def test_a_folder_stands_for_the_pictures_in_it_and_for_its_clips_where_these_are_read(tmp_path):
    for suffix in (*PICTURE_SUFFIXES, *VIDEO_SUFFIXES, ".txt"):
        (tmp_path / f"a{suffix}").touch()
    pictures, all_files = (find_files([str(tmp_path)], clips) for clips in (False, True))
    assert pictures == sorted(str(tmp_path / f"a{suffix}") for suffix in PICTURE_SUFFIXES)
    assert set(all_files) - set(pictures) == {str(tmp_path / f"a{suffix}") for suffix in VIDEO_SUFFIXES}
    assert find_files(["none.txt"], clips=True) == ["none.txt"]
