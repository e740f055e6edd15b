"""Shards: what is in them is read, what is broken in them is skipped in its place, partitions share them
out."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import logging
import random
import tarfile
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from shard_files import png, sample, write_shard, write_shards

from evlgen.common.errors import ConfigError, DataError
from evlgen.common.registry import registry
from evlgen.config.run_config import RunConfig
from evlgen.datasets import shards as shards_module
from evlgen.datasets.base_dataset import BadRecord, Skipped
from evlgen.datasets.shards import ShardDataset, _shuffled, partition_pieces
from evlgen.datasets.stream import Partition
from evlgen.files.tar_headers import tar_members
from evlgen.loaders.mixed_plan import check_training_data, format_length, make_plan
from evlgen.processors import build_processor

IMAGE = build_processor({"name": "blip_image_eval", "image_size": 8, "mean": [0, 0, 0], "std": [1, 1, 1]})
TEXT = build_processor({"name": "blip_caption"})


def dataset(shards, **options) -> ShardDataset:
    return ShardDataset(shards, IMAGE, TEXT, **options)


def read_all(shards, **options) -> list:
    stream = dataset(shards, **options)
    return [stream.read_place(place) for place in stream.places(None)]


def captions(samples) -> list[str]:
    return [f"skipped: {s.cause}" if isinstance(s, Skipped) else s["text_input"] for s in samples]


def partitions(count: int, seed: int = 3) -> list[Partition]:
    return [Partition(seed, index, count) for index in range(count)]


# ---- what is in a shard ----


def test_the_published_layout_is_read_and_its_broken_member_is_skipped_in_its_place(shared):
    folder = shared / "data/lavis_cache/ccs14m"
    samples = read_all([str(folder / "00000.tar"), str(folder / "00001.tar")])
    assert [isinstance(s, Skipped) for s in samples] == [False] * 8 + [True]
    assert samples[-1].id == "00001.tar/000019999" and samples[-1].cause == "not an image"
    assert samples[4]["image"].shape == (3, 8, 8) and samples[4]["sample_id"] == "00001.tar/000010000"
    assert samples[4]["image_id"] == samples[4]["instance_id"] == "00001.tar/000010000"
    texts = set(captions(samples[:8]))
    assert len(texts) == 8 and all(len(text.split()) > 4 for text in texts)


def test_json_comes_before_txt_and_txt_serves_where_json_has_no_caption(tmp_path):
    shard = write_shard(
        tmp_path / "0.tar",
        {
            **sample("both", "from json"),
            "both.txt": b"from txt",
            "other.jpg": png(),
            "other.json": b'{"url": "x"}',
            "other.txt": b"\xef\xbb\xbffrom txt\n",
            "sub.dir/only.webp": png(),
            "sub.dir/only.txt": b"in a folder",
            "README.md": b"no sample",
            ".hidden.jpg": b"no sample",
        },
    )
    samples = read_all([shard])
    assert captions(samples) == ["from json", "from txt", "in a folder"]
    assert samples[2]["sample_id"] == "0.tar/sub.dir/only"
    assert captions(read_all([shard], caption="url"))[1] == "x"


def test_members_of_a_key_belong_together_wherever_they_are(tmp_path):
    whole = {**sample("a"), **sample("b"), **sample("c")}
    by_type = dict(sorted(whole.items(), key=lambda item: item[0].rpartition(".")[2]))
    shards = [write_shard(tmp_path / f"{i}.tar", members) for i, members in enumerate((whole, by_type))]
    assert captions(read_all(shards)) == ["a a", "a b", "a c"] * 2


def test_the_id_that_is_noted_in_json_is_the_samples(tmp_path):
    noted = {"a": 17, "b": "x.jpg", "c": None, "d": True}
    members = {}
    for key, image_id in noted.items():
        content = json.dumps({"caption": "a", "image_id": image_id}).encode()
        members |= {f"{key}.png": png(), f"{key}.json": content}
    samples = read_all([write_shard(tmp_path / "0.tar", members)])
    assert [s["image_id"] for s in samples] == [17, "x.jpg", "0.tar/c", "0.tar/d"]
    assert samples[0]["sample_id"] == samples[0]["instance_id"] == "0.tar/a"


def test_one_of_several_captions_is_drawn_at_each_reading(tmp_path):
    stream = dataset([write_shard(tmp_path / "0.tar", sample("a", ["one", "two", "three"]))])
    (place,) = stream.places(None)
    torch.manual_seed(0)
    counts = Counter(stream.load_place(place)["text_input"] for _ in range(60))
    assert set(counts) == {"one", "two", "three"} and min(counts.values()) > 8


def test_empty_captions_among_several_are_not_drawn(tmp_path):
    shard = write_shard(tmp_path / "0.tar", sample("a", ["", "one", " "]))
    assert captions(found for _ in range(8) for found in read_all([shard])) == ["one"] * 8


def test_videos_are_read_from_shards(shared, tmp_path):
    real = next((shared / "data/lavis_cache/msrvtt").rglob("*.mp4"))
    members = {"a.mp4": real.read_bytes(), "a.txt": b"a video", "b.mp4": b"no video", "b.txt": b"none"}
    shard = write_shard(tmp_path / "0.tar", members)
    stream = ShardDataset(
        [shard], lambda video: torch.from_numpy(video.read([0, 1], size=(8, 8))), TEXT, data_type="videos"
    )
    first, second = (stream.read_place(place) for place in stream.places(None))
    assert first["image"].shape == (2, 8, 8, 3) and first["image"].float().std() > 5
    assert isinstance(second, Skipped) and f"{shard}/b.mp4" in second.reason


# ---- what is broken in a shard ----

BROKEN = {
    "no caption": ({"x.png": png()}, "no caption", "neither json nor txt"),
    "no caption in it": ({"x.png": png(), "x.json": b"{}"}, "no caption", "neither 'caption' in its json"),
    "no image": ({"x.json": b'{"caption": "x"}'}, "missing file", "it has no image, but json"),
    "blank caption": (sample("x", " \n"), "empty caption", "empty"),
    "no texts": (sample("x", []), "bad record", "must be text"),
    "a number": (sample("x", 3), "bad record", "must be text or a list of it, not 3"),
    "a surrogate": (sample("x", "a \ud800"), "bad record", "half of a surrogate pair"),
    "not UTF-8": ({"x.png": png(), "x.txt": b"caf\xe9"}, "not UTF-8", "not UTF-8"),
    "not UTF-8 json": ({"x.png": png(), "x.json": b'{"caption": "caf\xe9"}'}, "not UTF-8", "not UTF-8"),
    "no json": ({"x.png": png(), "x.json": b"{"}, "bad record", "json cannot be read"),
    "deep json": ({"x.png": png(), "x.json": b"[" * 100_000}, "bad record", "json cannot be read"),
    "a list": ({"x.png": png(), "x.json": b"[1]"}, "bad record", "must be a mapping"),
    "a huge text": ({"x.png": png(), "x.txt": b"word " * 300_000}, "too large", "that is no caption"),
    "not an image": ({"x.png": b"GIF8", "x.txt": b"x"}, "not an image", "0.tar/x.png"),
    "empty image": ({"x.png": b"", "x.txt": b"x"}, "not an image", "0.tar/x.png"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_sample_is_skipped_in_its_place_and_moves_no_other(tmp_path, name):
    members, cause, reason = BROKEN[name]
    shard = write_shard(tmp_path / "0.tar", {**sample("a"), **members, **sample("z")})
    first, broken, last = read_all([shard])
    assert captions([first, last]) == ["a a", "a z"]
    assert isinstance(broken, Skipped) and (broken.index, broken.id) == (None, "0.tar/x")
    assert broken.cause == cause and reason in broken.reason


def test_a_key_that_comes_again_is_skipped_and_the_first_is_taken(tmp_path):
    members = [*sample("a", "first").items(), *sample("b").items(), *sample("a", "second").items()]
    samples = read_all([write_shard(tmp_path / "0.tar", members)])
    assert captions(samples) == ["first", "a b", "skipped: duplicate id"]
    assert samples[2].id == "0.tar/a"


def test_names_with_dots_are_keys_where_the_pairing_is_plain_and_named_where_it_is_not(tmp_path):
    members = [
        *("a.png", "a.txt", "a.seg.png", "a.meta.json"),  # the last two are parts of the sample
        *("photo.v1.png", "photo.v1.txt", "in.1/photo.v2.PNG", "in.1/photo.v2.json"),
        *("2024.01.05.png", "2024.01.05.txt", "2024.01.06.png"),
        *("b.x.png", "b.y.txt", "c.v1.png", "c.txt"),
        *("d.png", "d.txt", "d.v1.png", "d.v1.txt"),
        *("._a.png", "._a.txt", ".e.png"),  # hidden files, such as macOS puts beside
    ]
    content = {"g": png(), "n": b'{"caption": "x"}', "t": b"x"}
    pairs = [(name, content[name[-1].lower()]) for name in members]
    samples = read_all([write_shard(tmp_path / "0.tar", pairs)])
    assert [s["instance_id"] for s in samples if not isinstance(s, Skipped)] == [
        *("0.tar/a", "0.tar/photo.v1", "0.tar/in.1/photo.v2", "0.tar/2024.01.05", "0.tar/d"),
    ]
    assert {s.id: s.cause for s in samples if isinstance(s, Skipped)} == {
        "0.tar/2024.01.06": "no caption",
        "0.tar/b.x": "no caption",
        "0.tar/b.y": "missing file",
        "0.tar/c.v1": "no caption",
        "0.tar/c": "missing file",
        "0.tar/d.v1": "ambiguous name",
    }


def test_a_member_that_claims_too_much_is_not_read(tmp_path):
    path = tmp_path / "0.tar"
    header = tarfile.TarInfo("x.png")
    header.size = 20 << 30
    with open(path, "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(header.size + 512)
        file.seek(0, 2)
        text = tarfile.TarInfo("x.txt")
        text.size = 1
        file.write(text.tobuf() + b"x".ljust(512, b"\0") + bytes(1024))
    (skipped,) = read_all([str(path)])
    assert (skipped.cause, skipped.reason) == (
        "too large",
        "its file has 21474836480 bytes: that is no image.",
    )


def damaged(folder: Path, kind: str) -> str:
    """A shard of six samples with something wrong behind the third one, or everywhere."""
    path = Path(write_shards(folder, [6])[0])
    content = bytearray(path.read_bytes())
    third = content.index(b"000003.png")  # its header
    if kind == "header":
        content[third : third + 100] = bytes([1]) * 100
    elif kind == "cut in a header":
        del content[third + 200 :]
    elif kind == "cut in an image":
        del content[third + 512 + 10 :]
    elif kind == "compressed":
        content = gzip.compress(content)
    elif kind == "empty":
        content = b""
    elif kind == "text":
        content = b"<html>not found</html>" * 100
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("kind", ["header", "cut in a header", "cut in an image"])
def test_of_a_damaged_shard_what_comes_before_is_read_and_the_rest_is_one_skipped_sample(tmp_path, kind):
    shard = damaged(tmp_path, kind)
    (other,) = write_shards(tmp_path / "other", [1])
    samples = read_all([shard, other])
    good = [f"a 00000{i}" for i in range(3)]
    assert captions(samples)[:3] == good and captions(samples)[-1] == "a 000000"
    broken = samples[3:-1]
    assert {s.cause for s in broken} <= {"damaged shard", "no caption"} and broken[-1].id == shard
    assert f"{shard} is damaged or cut off at byte" in broken[-1].reason
    assert "samples before that are read" in broken[-1].reason
    assert [s.lost_share for s in broken] == [0.0] * (len(broken) - 1) + [1 / 2]


@pytest.mark.parametrize("kind", ["compressed", "empty", "text", "gone", "folder"])
def test_a_shard_that_cannot_be_read_is_one_skipped_sample(tmp_path, kind):
    first, last = write_shards(tmp_path / "good", [1, 1])
    shard = str(tmp_path) if kind == "folder" else damaged(tmp_path / "bad", kind)
    if kind == "gone":
        Path(shard).unlink()
    samples = read_all([first, shard, last])
    assert captions(samples) == ["a 000000", "skipped: damaged shard", "a 001000"]
    assert shard in samples[1].reason and samples[1].lost_share == pytest.approx(1 / 3)


@pytest.mark.parametrize("shards", [2, 6, 40])
def test_all_partitions_together_lose_the_share_of_the_damaged_shards_and_each_its_part_of_it(
    tmp_path, shards
):
    paths = write_shards(tmp_path, [1] * shards)
    for path in paths[::2]:
        Path(path).write_bytes(b"garbage" * 1000)
    places = [list(dataset(paths).places(partition)) for partition in partitions(8)]
    lost = [{p.id: p.lost_share for p in partition if isinstance(p, BadRecord)} for partition in places]
    assert sum(sum(partition.values()) for partition in lost) == pytest.approx(1 / 2)
    assert len(set().union(*lost)) == sum(map(len, lost))  # no id twice


def test_a_disk_or_network_that_fails_for_a_moment_is_asked_again(tmp_path, monkeypatch, caplog):
    (shard,) = write_shards(tmp_path, [2])
    failures = []

    def failing(path):
        if len(failures) < 2:
            failures.append(path)
            raise DataError(f"{path} cannot be read.") from OSError(5, "Input/output error")
        return tar_members(path)

    monkeypatch.setattr(shards_module, "tar_members", failing)
    monkeypatch.setattr(shards_module, "PAUSES", (0.0, 0.0))
    assert captions(read_all([shard])) == ["a 000000", "a 000001"]
    assert caplog.text.count("cannot be read. Trying again in 0 s.") == 2


def test_a_damaged_shard_is_not_tried_again_at_once_but_in_the_next_pass(tmp_path, monkeypatch):
    shard, copy = write_shards(tmp_path, [2, 2])
    whole = Path(shard).read_bytes()
    Path(shard).write_bytes(b"garbage" * 1000)
    monkeypatch.setattr(shards_module, "PAUSES", (1e9,))
    stream, partition = dataset([shard, copy]), Partition(0, 0, 1)
    assert [place.id for place in stream.places(partition, 0) if isinstance(place, BadRecord)] == [shard]
    Path(shard).write_bytes(whole)
    assert not [place for place in stream.places(partition, 1) if isinstance(place, BadRecord)]


# ---- partitions ----


@pytest.mark.parametrize("count", [1, 2, 3, 8, 16, 24])
@pytest.mark.parametrize("shards", [1, 2, 3, 7, 8, 9, 50, 200])
def test_partitions_share_out_every_slice_of_every_shard_once_and_evenly(shards, count):
    names = [f"{i}.tar" for i in range(shards)]
    pieces = [partition_pieces(names, partition) for partition in partitions(count)]
    dealt = Counter(itertools.chain(*pieces))
    assert set(dealt.values()) == {1}
    parts = {m for _, _, m in dealt}
    assert len(parts) == 1 and set(dealt) == {(n, i, *parts) for n in names for i in range(*parts)}
    fewest, most = min(map(len, pieces)), max(map(len, pieces))
    assert most == fewest or (most == fewest + 1 and fewest >= 8)


@pytest.mark.parametrize("sizes", [[20], [7, 8], [3, 9, 4, 5, 6]])
def test_each_pass_of_the_partitions_together_has_every_sample_once_in_an_order_of_its_own(tmp_path, sizes):
    stream = dataset(write_shards(tmp_path, sizes), shuffle_buffer=4)
    every = sorted(stream.places(None))
    orders = [[list(stream.places(partition, number)) for partition in partitions(4)] for number in range(2)]
    for order in orders:
        assert sorted(itertools.chain(*order)) == every
    for first, second in zip(*orders, strict=True):
        assert sorted(first) == sorted(second)
    assert orders[0] != orders[1]
    assert orders[0] == [list(stream.places(partition, 0)) for partition in partitions(4)]
    assert orders[0] != [list(stream.places(partition, 0)) for partition in partitions(4, seed=4)]


def test_any_ordinal_of_a_partition_is_what_reading_from_the_beginning_gives(tmp_path):
    shards = write_shards(tmp_path, [5, 6, 4])
    partition = Partition(1, 1, 2)
    stream = dataset(shards, shuffle_buffer=3)
    whole = [stream.read(partition, ordinal)["sample_id"] for ordinal in range(40)]
    assert len(set(whole[:7])) == 7  # a pass: 15 samples over two partitions
    for ordinal in (39, 0, 17, 18, 5, 32):
        assert dataset(shards, shuffle_buffer=3).read(partition, ordinal)["sample_id"] == whole[ordinal]
        assert stream.read(partition, ordinal)["sample_id"] == whole[ordinal]


def test_where_partitions_are_more_than_samples_those_without_any_share_all(tmp_path):
    stream = dataset(write_shards(tmp_path, [3]))
    seen = {
        stream.read(partition, ordinal)["sample_id"] for partition in partitions(16) for ordinal in range(3)
    }
    assert seen == {f"00000.tar/00000{i}" for i in range(3)}


def test_the_buffer_gives_each_place_once_and_none_much_too_early():
    order = list(_shuffled(iter(range(500)), 50, random.Random(0)))
    assert sorted(order) == list(range(500)) and order != sorted(order)
    assert all(place - position < 50 for position, place in enumerate(order))
    moved = sum(abs(place - position) for position, place in enumerate(order)) / 500
    assert moved > 20
    assert list(_shuffled(iter(range(9)), 0, random.Random(0))) == list(range(9))


def test_a_stream_is_read_by_index_when_listed(tmp_path):
    listed = dataset(write_shards(tmp_path, [2, 3])).listed()
    assert [listed[i]["text_input"] for i in range(len(listed))] == captions(read_all(listed._stream.records))
    assert listed.image(4).size == (8, 8) and listed.sample_id(4) == "00001.tar/001002"


def test_remote_shards_are_fetched_when_they_are_first_read(tmp_path, monkeypatch):
    write_shards(tmp_path / "served", [2, 2])
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, form, *values):
            asked.append(values[0].rpartition(" ")[0])

    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path / "served"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path / "cache"))
    try:
        address = f"http://127.0.0.1:{server.server_port}/{{00000..00001}}.tar"
        stream = built(tmp_path, address).get_split("train")
        assert not asked and stream.num_samples is None
        assert {stream.read(partition, 0)["text_input"][:5] for partition in partitions(2)} == {
            "a 000",
            "a 001",
        }
        assert asked.count("GET /00000.tar") == asked.count("GET /00001.tar") == 1
    finally:
        server.shutdown()
        server.server_close()


# ---- builders ----


def built(root: Path, storage, name: str = "web_shards", **section):
    return registry.get_builder_class(name)(
        name=name,
        cache_root=root,
        vis_processor={"train": {"name": "blip_image_eval", "image_size": 8}},
        text_processor={"train": {"name": "blip_caption"}},
        build_info={"storage": storage},
        **section,
    )


def test_braces_wildcards_and_lists_name_shards_below_the_data_root(tmp_path):
    paths = write_shards(tmp_path / "s", [1] * 12)
    for storage in ("s/{00000..00011}.tar", "s/*.tar", ["s/0000[0-9].tar", "s/{00010,00011,00000}.tar"]):
        builder = built(tmp_path, storage)
        assert builder.splits == ["train"] and not builder.missing()
        assert builder.get_split("train").records == paths


def test_shards_that_are_not_there_are_left_out_with_a_warning_unless_all_are(tmp_path, caplog):
    write_shards(tmp_path / "ccs14m", [2, 2])
    with caplog.at_level(logging.WARNING):
        stream = built(tmp_path, "ccs14m/{00000..01255}.tar", "ccs14M").get_split("train")
    assert len(stream.records) == 2 and len(stream) == 4
    assert "1254 of 1256 shards are not there (the first: " in caplog.text and "00002.tar" in caplog.text
    with pytest.raises(DataError, match=r"laion115M: no shard is there, such as .*laion115m/00000\.tar"):
        built(tmp_path, "laion115m/{00000..10488}.tar", "laion115M").get_split("train")
    with pytest.raises(DataError, match=r"no shard is there, such as .*nowhere/\*\.tar"):
        built(tmp_path, "nowhere/*.tar").get_split("train")


def test_samples_are_counted_only_when_somebody_asks(tmp_path, monkeypatch):
    write_shards(tmp_path, [2, 3])
    asked = []
    monkeypatch.setattr("evlgen.datasets.shard_builders.count_samples", lambda *args: asked.append(args) or 5)
    stream = built(tmp_path, "*.tar").get_split("train")
    options = {"batch_size": 2, "seed": 1}
    assert make_plan([stream], **options, has_epochs=False).batches_per_epoch is None
    assert make_plan([stream, stream], **options, ratios=[1, 2], has_epochs=False).lengths == [None, None]
    check_training_data(RunConfig(max_iters=3, valid_splits=[]), {"web_shards": {"train": stream}})
    assert format_length(stream) == "2 shards" and not asked
    assert make_plan([stream], **options).batches_per_epoch == 2
    assert make_plan([stream, stream], **options, has_epochs=False).lengths == [5, 5]
    assert len(asked) == 1


def test_the_number_of_samples_is_given_or_in_the_stats_or_counted_or_unknown(tmp_path, monkeypatch):
    shards = write_shards(tmp_path, [2, 3])
    assert built(tmp_path, "*.tar", num_samples=99).get_split("train").num_samples == 99
    assert len(built(tmp_path, "*.tar").get_split("train")) == 5
    for shard, count in zip(shards, (20, 30), strict=True):
        Path(shard.replace(".tar", "_stats.json")).write_text(json.dumps({"count": 99, "successes": count}))
    assert len(built(tmp_path, "*.tar").get_split("train")) == 50
    Path(shards[0].replace(".tar", "_stats.json")).unlink()
    monkeypatch.setattr("evlgen.datasets.shard_builders._MOST_COUNTED", 1)
    stream = built(tmp_path, "*.tar").get_split("train")
    assert stream.num_samples is None
    with pytest.raises(DataError, match="does not know how many samples"):
        len(stream)


@pytest.mark.parametrize("content", ["{}", "[]", '{"successes": "many"}', '{"successes": -1}', "{"])
def test_stats_that_say_no_number_are_named(tmp_path, content):
    write_shards(tmp_path, [1])
    (tmp_path / "00000_stats.json").write_text(content)
    with pytest.raises(DataError, match=r"00000_stats\.json does not say how many samples .* Delete it"):
        len(built(tmp_path, "*.tar").get_split("train"))


def test_storage_that_names_nothing_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"web_shards\.build_info\.storage: names no shards"):
        built(tmp_path, None)
    with pytest.raises(ConfigError, match=r"storage: \{0\.\.3\.tar has braces that do not match"):
        built(tmp_path, "{0..3.tar")
    with pytest.raises(ConfigError, match="build_info"):
        registry.get_builder_class("web_shards")(
            "web_shards", tmp_path, {}, {}, build_info={"storge": "x.tar"}
        )
