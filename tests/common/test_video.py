"""Reading videos: both readers give the frames that were asked for, and the same ones."""

from __future__ import annotations

import importlib.util
import io
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from evlgen.common.errors import DataError
from evlgen.media.video import FrameList, Video, installed_reader, spread

av = pytest.importorskip("av")
READERS = [
    "pyav",
    pytest.param(
        "decord",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("decord") is None, reason="decord is not installed"
        ),
    ),
]
BITS = 7
# name -> codec, and the most frames stored in another order than they are shown in
CONTAINERS = {
    "clip.avi": ("mpeg4", 2),  # as MSVD's: no times of frames, decord's seeking is frames off
    "clip.mp4": ("mpeg4", 2),
    "clip.mpg": ("mpeg1video", 2),
    "clip.mkv": ("mpeg4", 0),
    "clip.wmv": ("wmv2", 0),
}


def numbered(number: int) -> np.ndarray:
    """A frame that shows its number in black and white bars, the lowest bit on the left."""
    bars = [220 if number >> bit & 1 else 40 for bit in range(BITS)]
    return np.repeat(np.repeat(np.array(bars, np.uint8), 16)[None, :, None], 48, axis=0).repeat(3, axis=2)


def number_of(frame: np.ndarray) -> int:
    middles = (np.arange(BITS) + 0.5) * frame.shape[1] / BITS
    return sum(int(frame[frame.shape[0] // 2, int(x)].mean() > 130) << bit for bit, x in enumerate(middles))


def encode(path, codec, frames, reordered=0, colours="yuv420p", **options):
    """Writes a video with a key frame every ten."""
    with av.open(path, "w", options=options) as file:
        quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        stream = file.add_stream(codec, rate=25, options=quiet)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.gop_size, stream.codec_context.max_b_frames = colours, 10, reordered
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = i
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Videos of 100 numbered frames."""
    folder = tmp_path_factory.mktemp("clips")
    for name, (codec, reordered) in CONTAINERS.items():
        encode(folder / name, codec, [numbered(i) for i in range(100)], reordered)
    return folder


@pytest.fixture(scope="module")
def sound_only(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "sound.mp4"
    with av.open(path, "w") as file:
        stream = file.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4410), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("wanted", [[0, 30, 60, 90], [13, 14, 15, 99], [57], [99, 3, 3]], ids=str)
def test_the_frames_asked_for_are_read_whatever_the_container(made, name, reader, wanted):
    video = Video(made / name, reader)
    assert len(video) == 100
    assert [number_of(frame) for frame in video.read(wanted)] == wanted
    assert [number_of(frame) for frame in video.read(wanted)] == wanted  # opens the file again


@pytest.mark.parametrize("reader", READERS)
def test_of_a_damaged_file_frames_are_read_and_none_is_made_up(made, tmp_path, reader):
    content = bytearray((made / "clip.avi").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = b"\xff" * 400
    (tmp_path / "damaged.avi").write_bytes(content)
    video = Video(tmp_path / "damaged.avi", reader)
    assert [number_of(frame) for frame in video.read([0, 9])] == [0, 9]
    with pytest.raises(DataError, match="it is damaged") as error:
        video.read([len(video) - 1])  # fewer can be decoded
    assert error.value.cause == "damaged video"


@pytest.mark.parametrize("packets", ["0", "1"], ids=["188 bytes", "192 bytes"])
def test_transport_streams_are_read_by_pyav_and_refused_by_decord_which_finds_wrong_frames(tmp_path, packets):
    pytest.importorskip("decord")
    path = tmp_path / "clip.ts"
    encode(path, "mpeg2video", [numbered(i) for i in range(20)], reordered=2, mpegts_m2ts_mode=packets)
    assert [number_of(frame) for frame in Video(path, "pyav").read([1, 8, 19])] == [1, 8, 19]
    with pytest.raises(DataError, match=r"clip\.ts: decord finds wrong frames.*evlgen\[pyav\]"):
        Video(path, "decord").read([1])


@pytest.mark.parametrize(
    ("codec", "colours", "size", "mean", "most"),
    [
        ("mpeg4", "yuv420p", (48, 63), 0, 0),
        ("mpeg4", "yuv420p", (47, 64), 1.5, 12),
        ("mpeg4", "yuv420p", (47, 63), 1.5, 12),
        ("libx265", "yuv420p10le", (48, 64), 1.5, 12),
    ],
    ids=str,
)
def test_the_readers_differ_by_little_where_the_height_is_odd_or_colours_have_ten_bits_and_else_not_at_all(
    tmp_path, codec, colours, size, mean, most
):
    pytest.importorskip("decord")
    path = tmp_path / "clip.mkv"
    rows, columns = np.indices(size)
    ramp = np.stack([rows * 2 + 20, columns * 2 + 20, 200 - rows - columns], 2).astype(np.uint8)
    encode(path, codec, [ramp, ramp[::-1]], colours=colours)
    one, other = (Video(path, reader).read([0, 1]).astype(int) for reader in ("decord", "pyav"))
    assert one.shape == other.shape == (2, *size, 3) and one.std() > 30
    assert abs(one - other).mean() <= mean and abs(one - other).max() <= most


def test_pyav_decodes_from_the_key_frame_before_a_frame_and_not_from_the_start(made, monkeypatch):
    from evlgen.media.video_pyav import File

    decoded = []
    sought_from = File._from
    monkeypatch.setattr(
        File, "_counted", lambda self, indices: pytest.fail("reads from the start") if indices else iter(())
    )
    monkeypatch.setattr(
        File, "_from", lambda self, key: (decoded.append(f) or f for f in sought_from(self, key))
    )
    assert number_of(Video(made / "clip.mkv", "pyav").read([85])[0]) == 85
    assert [number_of(f.to_ndarray(format="rgb24")) for f in decoded] == [80, 81, 82, 83, 84, 85]


def test_frames_whose_times_lie_are_found_by_counting(made, monkeypatch):
    from evlgen.media.video_pyav import File

    start = File._from
    monkeypatch.setattr(File, "_from", lambda self, key: start(self, key + self._keys[1]))  # seeks too far
    read = Video(made / "clip.mp4", "pyav").read([3, 55, 56])
    assert [number_of(frame) for frame in read] == [3, 55, 56]


@pytest.mark.parametrize("name", ["video0.mp4", "video3.avi", "video4.mkv", "four_frames.mov"])
def test_both_readers_give_the_same_frames_of_real_videos_bit_for_bit(shared, name):
    pytest.importorskip("decord")
    folder = "broken" if name == "four_frames.mov" else "lavis_cache/msrvtt/videos"
    one, other = (Video(shared / "data" / folder / name, reader) for reader in ("decord", "pyav"))
    assert len(one) == len(other)
    indices = [1, 2, len(one) // 2, len(one) - 1]
    frames = one.read(indices, (56, 64))
    assert frames.shape == (4, 56, 64, 3)
    assert frames.std() > 5 or name == "four_frames.mov"  # which is white
    assert np.array_equal(frames, other.read(indices, (56, 64)))


@pytest.mark.parametrize("reader", READERS)
def test_a_video_filmed_upright_is_read_upright(shared, reader):
    path = shared / "data/broken/three_frames_rotated_90.mov"
    with av.open(str(path)) as file:
        stored = next(file.decode(video=0)).to_ndarray(format="rgb24")
    frames = Video(path, reader).read([0, 2])
    assert stored.shape == (320, 568, 3) and frames.shape == (2, 568, 320, 3)
    assert np.array_equal(frames[0], stored[::-1].transpose(1, 0, 2))  # a quarter turn clockwise


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_video_is_named_with_its_cause(shared, tmp_path, sound_only, reader, capfd):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    encode(tmp_path / "codec.mpg", "libvpx", [numbered(1)])  # for which MPEG streams have no name
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    causes = {
        tmp_path / "none.mp4": "missing file",
        tmp_path / "loop.mp4": "missing file",
        tmp_path / "folder.mp4": "not a file",
        tmp_path / "pipe.mp4": "not a file",
        tmp_path / "empty.mp4": "empty file",
        tmp_path / "text.mp4": "not a video",
        sound_only: "not a video",
        tmp_path / "codec.mpg": "not a video",
        shared / "data/broken/corrupted.mp4": "damaged video",
    }
    found = {}
    for path in causes:
        with pytest.raises(DataError, match=path.name) as error:
            Video(path, reader).read([0, 40])
        found[path] = error.value.cause
    assert found == causes
    assert "h264" not in capfd.readouterr().err  # what ffmpeg has to say about it


@pytest.mark.parametrize("reader", READERS)
def test_a_list_of_other_files_is_not_followed(tmp_path, reader):
    encode(tmp_path / "secret.ts", "mpeg4", [numbered(i) for i in range(12)])
    period = '<Period><AdaptationSet><Representation id="1"><BaseURL>secret.ts</BaseURL></Representation>'
    for text in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile secret.ts\n",
        f'<?xml version="1.0"?>\n<MPD profiles="urn:mpeg:dash:profile:full:2011">{period}</MPD>',
    ):
        (tmp_path / "video.mp4").write_text(text)
        with pytest.raises(DataError, match="a list of other files"):
            len(Video(tmp_path / "video.mp4", reader))


@pytest.mark.parametrize("reader", READERS)
def test_a_download_that_broke_off_has_fewer_frames(shared, tmp_path, reader):
    whole = (shared / "data/lavis_cache/msrvtt/videos/video3.avi").read_bytes()
    (tmp_path / "part.avi").write_bytes(whole[: len(whole) // 2])
    video = Video(tmp_path / "part.avi", reader)
    assert 0 < len(video) < 164
    assert video.read([0, len(video) - 1], (8, 8)).shape == (2, 8, 8, 3)


def test_an_animated_gif_is_a_video_and_a_broken_one_is_named(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    frames = [Image.new("RGB", (8, 8), colour) for colour in colours]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    video = Video(tmp_path / "clip.gif")
    assert len(video) == 3
    assert [tuple(frame[4, 4]) for frame in video.read([2, 0, 0])] == [colours[2], colours[0], colours[0]]
    (tmp_path / "text.gif").write_text("no image")
    with pytest.raises(DataError, match=r"text\.gif"):
        len(Video(tmp_path / "text.gif"))


@pytest.mark.parametrize("reader", READERS)
def test_what_a_file_holds_decides_and_not_its_name(tmp_path, reader):
    encode(tmp_path / "clip.mp4", "mpeg4", [numbered(i) for i in range(12)])
    os.rename(tmp_path / "clip.mp4", tmp_path / "video.gif")  # as web sites serve them
    assert [number_of(frame) for frame in Video(tmp_path / "video.gif", reader).read([0, 11])] == [0, 11]
    (tmp_path / "image.mp4").write_bytes(gif(5))
    assert len(Video(tmp_path / "image.mp4", reader)) == 5


@pytest.mark.parametrize("width", [4, 8, 12, 16, 20, 24, 40, 48, 72])
def test_frames_of_few_pixels_in_a_row_have_three_channels(tmp_path, width):
    """decord 0.6.0 gives some of them four or six."""
    pytest.importorskip("decord")
    rows, columns = np.indices((16, width))
    ramp = np.stack([rows * 9 + 20, columns * 200 // width, 200 - rows * 9], 2).astype(np.uint8)
    encode(tmp_path / "clip.mkv", "mpeg4", [ramp, ramp[::-1]])
    one, other = (Video(tmp_path / "clip.mkv", reader).read([0, 1]) for reader in ("decord", "pyav"))
    assert one.shape == (2, 16, width, 3) and np.array_equal(one, other)


@pytest.fixture
def two_sizes(tmp_path):
    """A stream of 64 x 48 pixels, and after its twelfth frame of 80 x 96."""
    for name, size in (("one.mpg", (48, 64)), ("other.mpg", (96, 80))):
        encode(tmp_path / name, "mpeg2video", [np.full((*size, 3), 40, np.uint8)] * 12)
    path = tmp_path / "clip.mpg"
    path.write_bytes(b"".join((tmp_path / name).read_bytes() for name in ("one.mpg", "other.mpg")))
    return path


@pytest.mark.parametrize("size", [None, (32, 32)])
def test_frames_of_different_sizes_are_read_by_the_other_reader_or_refused(two_sizes, size, monkeypatch):
    pytest.importorskip("decord")
    assert Video(two_sizes, "pyav").read([0, 11], size).shape[1:3] == (size or (48, 64))
    frames = Video(two_sizes, "pyav").read([0, 20], size)  # decord resizes to the first size
    assert frames.shape == (2, *(size or (48, 64)), 3) and abs(frames.astype(int) - 40).max() < 4
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "av" else None)
    with pytest.raises(
        DataError, match=r"clip\.mpg: its frames differ in size: 64 x 48 and 80 x 96"
    ) as error:
        Video(two_sizes).read([0, 20], size)
    assert error.value.cause == "wrong frames"


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((4, 6, 4), np.uint8),
        np.zeros((4, 6, 1), np.uint8),
        np.zeros((4, 6), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
        np.zeros((4, 6, 3), np.float32),
        np.zeros((4, 6, 3), np.uint16),
        "frame",
    ],
    ids=lambda frame: f"{getattr(frame, 'dtype', '')} {getattr(frame, 'shape', frame)}",
)
def test_what_a_reader_gives_is_checked(made, frame, monkeypatch):
    from evlgen.media import video_pyav

    monkeypatch.setattr(video_pyav, "_upright", lambda decoded: frame)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "av" else None)
    with pytest.raises(DataError, match=r"clip\.mkv: a frame is .* instead of uint8 \[height, width, 3\]"):
        Video(made / "clip.mkv", "pyav").read([3, 4], (8, 8))


def test_a_video_whose_frames_are_too_large_is_refused(made, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 112 - 1)
    with pytest.raises(DataError, match=r"clip\.mkv"):
        Video(made / "clip.mkv", "pyav").read([3])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert number_of(Video(made / "clip.mkv", "pyav").read([3])[0]) == 3


def test_a_header_at_which_decord_ends_the_process_is_refused(made, tmp_path):
    """It claims that the video lasts for 15,000 years."""
    pytest.importorskip("decord")
    content = bytearray((made / "clip.wmv").read_bytes())
    properties = content.index(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    content[properties + 64 : properties + 72] = (2**62).to_bytes(8, "little")
    (tmp_path / "clip.wmv").write_bytes(content)
    for _ in range(2):
        with pytest.raises(DataError, match=r"clip\.wmv: it is damaged"):
            Video(tmp_path / "clip.wmv", "decord").read([0])
    assert number_of(Video(made / "clip.wmv", "decord").read([5])[0]) == 5
    assert number_of(Video(tmp_path / "clip.wmv", "pyav").read([5])[0]) == 5


def gif(frames: int = 3) -> bytes:
    images = [
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 20), np.uint8)) for i in range(frames)
    ]
    out = io.BytesIO()
    images[0].save(out, "GIF", save_all=True, append_images=images[1:])
    return out.getvalue()


def test_a_frame_outside_of_a_gif_is_cut_off(tmp_path):
    """As browsers show it. Pillow enlarges the image from that frame on."""
    content = bytearray(gif())
    second = content.index(b"\x2c", content.index(b"\x2c") + 10 + 3 + 16 * 20)  # an image descriptor
    while content[second + 1 : second + 10] != b"\0\0\0\0\x14\0\x10\0\x87":
        second = content.index(b"\x2c", second + 1)
    content[second + 1] = 7  # its left edge
    (tmp_path / "clip.gif").write_bytes(content)
    with Image.open(tmp_path / "clip.gif") as image:
        image.seek(1)
        assert image.size == (27, 16)
    assert Video(tmp_path / "clip.gif").read([0, 1, 2]).shape == (3, 16, 20, 3)


def test_damaged_gifs_are_read_or_named(tmp_path):
    whole, path, refused = gif(), tmp_path / "clip.gif", 0
    rng = random.Random(0)
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 3, 20))):
            content[rng.randrange(6, len(content))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice((len(content), rng.randrange(1, len(content))))])
        try:
            video = Video(path)
            assert video.read(spread(len(video), 3)).shape[::3] == (3, 3)
        except DataError as error:
            assert "clip.gif" in str(error)
            refused += 1
    assert 20 < refused < 150


def test_a_part_of_every_frame_is_resized_to_the_size_asked_for():
    left_and_right = np.zeros((4, 16, 3), np.uint8)
    left_and_right[:, 8:] = 200
    video = FrameList([left_and_right, left_and_right // 2])
    right = video.read([0, 1], (2, 2), (0.75, 0.0, 1.0, 1.0))
    assert np.array_equal(right, np.stack([np.full((2, 2, 3), 200), np.full((2, 2, 3), 100)]))
    assert np.array_equal(video.read([0])[0], left_and_right)


def test_there_is_no_frame_past_the_end():
    video = FrameList([np.zeros((2, 2, 3), np.uint8)] * 3)
    for wanted in ([3], [-1, 0]):
        with pytest.raises(IndexError, match="a video of 3 frames"):
            video.read(wanted)


def test_positions_are_spread_evenly_and_repeat_where_there_are_too_few():
    assert spread(280, 4) == [0, 70, 140, 210]
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 4) == [0, 0, 1, 2]


# A program of its own: the process of the tests may have threads, whose locks no fork of it ever gets.
FORKING = """
import multiprocessing, sys
import numpy as np
from evlgen.media.video import Video

path, reader, folder = sys.argv[1:]
video = Video(path, reader)
opened = video._open()
context = multiprocessing.get_context("fork")
read = lambda i: np.save(f"{folder}/{i}.npy", video.read([i])[0])
children = [context.Process(target=read, args=(i,)) for i in (95, 42)]
for child in children:
    child.start()
for child in children:
    child.join()
assert video._open() is opened
read(60)
"""


@pytest.mark.parametrize("reader", READERS)
def test_a_forked_process_opens_the_file_for_itself(made, reader, tmp_path):
    program = tmp_path / "forking.py"
    program.write_text(FORKING)
    command = [sys.executable, program, made / "clip.mkv", reader, tmp_path]
    assert subprocess.run(command, timeout=600).returncode == 0
    assert [number_of(np.load(tmp_path / f"{i}.npy")) for i in (95, 42, 60)] == [95, 42, 60]


def test_the_reader_is_the_one_installed_or_the_one_named(monkeypatch):
    installed = {"av", "decord"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert installed_reader("auto") == "pyav" and installed_reader("decord") == "decord"
    installed.remove("av")
    assert installed_reader("auto") == "decord"
    with pytest.raises(DataError, match=r"pyav is not installed.*evlgen\[pyav\]"):
        installed_reader("pyav")
    installed.clear()
    with pytest.raises(DataError, match="pyav or decord is not installed"):
        installed_reader("auto")
