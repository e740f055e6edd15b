"""Conversations in webdataset shards."""

from __future__ import annotations

import json

from omegaconf import OmegaConf
from shard_files import png, write_shard

from evlgen import cli
from evlgen.common.errors import DataError
from evlgen.datasets.base_dataset import BadRecord, Skipped
from evlgen.datasets.conversation_shards import read_conversation_shard
from evlgen.datasets.shard_builders import ConversationShardsBuilder
from evlgen.datasets.stream import Partition

PROCESSORS = {"train": {"name": "blip_image_eval", "image_size": 16}}


def talk(*values, **keys):
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return json.dumps({"conversations": turns, **keys}).encode()


MESSAGES = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
MEMBERS = [
    ("a/one.json", talk("<image>\nWhat?", "white", image="elsewhere/7.jpg")),
    ("a/one.png", png(255)),
    ("two.10.png", png(255)),
    ("two.9.png", png(0)),
    ("two.json", talk("<image> or <image>?", "the second", "why?", "it is")),
    ("text.json", talk("is <image> a tag?", "yes")),
    ("messages.json", json.dumps({"messages": [MESSAGES, {"role": "assistant", "content": "x"}]}).encode()),
    ("messages.png", png(255)),
    ("missing.json", talk("<image>\nWhat?", "x")),
    ("many.json", talk("What?", "x")),
    ("many.png", png()),
    ("film.json", talk("<video>\nWhat?", "x")),
    ("film.mp4", b"no video"),
    ("bad.json", b"{"),
    ("question.json", talk("hello")),
    ("alone.png", png()),
    ("text.json", talk("again", "x")),
]


def build(tmp_path, members=MEMBERS):
    write_shard(tmp_path / "0.tar", members)
    storage = {"storage": str(tmp_path / "*.tar")}
    return ConversationShardsBuilder(
        "talks", tmp_path, vis_processor=PROCESSORS, build_info=storage
    ).get_split("train")


def test_conversations_come_with_their_images_in_order(tmp_path):
    dataset = build(tmp_path)
    assert len(dataset) == 11
    found = {
        s["instance_id"]: s for s in map(dataset.read_place, dataset.places(None)) if isinstance(s, dict)
    }
    assert list(found) == [f"0.tar/{key}" for key in ("a/one", "two", "text", "messages")]
    brightness = {key: [float(image.mean()) > 0 for image in s["images"]] for key, s in found.items()}
    assert list(brightness.values()) == [[True], [False, True], [], [True]]
    assert [len(s["messages"]) for s in found.values()] == [2, 4, 2, 2]
    assert found["0.tar/text"]["messages"][0]["content"] == "is <image> a tag?"
    assert dataset.listed().image(0).size == (8, 8) and dataset.listed().image(2) is None
    assert "images" not in dataset.listed().load_text(1)
    every = {str(dataset.read(Partition(0, 0, 1), i)) for i in range(11)}
    assert len(every) == 11, "a pass has each once"


def test_what_makes_no_sample_says_why(tmp_path):
    dataset = build(tmp_path)
    found = [s for s in map(dataset.read_place, dataset.places(None)) if isinstance(s, Skipped)]
    reasons = {s.id.removeprefix("0.tar/"): (s.cause, s.reason) for s in found if "text" not in s.id}
    expected = {
        "missing": ("places without images", "1 markers (<image>, <video>) and 0 images"),
        "many": ("images without places", "0 markers (<image>, <video>) and 1 images"),
        "film": ("a video for a model of images", "film.mp4 is a video"),
        "bad": ("bad record", "its json cannot be read"),
        "question": ("ends with a question", "its last turn must be an answer"),
        "alone": ("no turns", "it has no conversation (alone.json)"),
    }
    assert reasons.keys() == expected.keys() and len(found) == 7
    for key, (cause, reason) in expected.items():
        assert reasons[key][0] == cause and reason in reasons[key][1], key
    assert any(isinstance(s, BadRecord) and s.cause == "duplicate id" for s in dataset.places(None))
    path = write_shard(tmp_path / "1.tar", [("a.txt", b"x")])
    assert isinstance(read_conversation_shard(path).damage, DataError)


def test_a_place_of_a_video_that_lies_there_as_an_image_is_said(tmp_path):
    asked = {"role": "user", "content": [{"type": "video", "video": "x.gif"}, {"type": "text", "text": "?"}]}
    record = json.dumps({"messages": [asked, {"role": "assistant", "content": "x"}]}).encode()
    dataset = build(tmp_path, [("a.json", record), ("a.gif", png())])
    (found,) = map(dataset.read_place, dataset.places(None))
    assert (found.id, found.cause) == ("0.tar/a", "bad record") and "places of images and of" in found.reason


def test_a_run_trains_on_them_and_data_check_counts_them(tiny_project, tmp_path, capsys):
    write_shard(tmp_path / "0.tar", MEMBERS[:8])
    path = tiny_project(
        run={"task": "conversation", "max_epoch": 1, "batch_size_train": 2, "valid_splits": []}
    )
    content = OmegaConf.load(path)
    content.datasets = {"conversation_shards": {"build_info": {"storage": str(tmp_path / "*.tar")}}}
    OmegaConf.save(content, path)
    assert cli.main(["data", "check", "--cfg-path", str(path), "--to", str(tmp_path / "check")]) == 0
    assert "images: 1 with 0, 2 with 1, 1 with 2" in capsys.readouterr().out
    assert cli.train(["--cfg-path", str(path)]) == 0
    log = [
        json.loads(line) for line in (tmp_path / "output" / "latest" / "log.jsonl").read_text().splitlines()
    ]
    assert any(record.get("train_loss", 0) > 0 or record.get("loss", 0) > 0 for record in log)


def test_images_without_a_conversation_are_named_in_the_order_of_the_shard(tmp_path):
    names = [f"{letter}{letter}" for letter in "qbzmakxcyd"]  # whose set has another order in most processes
    write_shard(
        tmp_path / "0.tar", [(f"{name}.png", png(0)) for name in names] + [("t.json", talk("a?", "b"))]
    )
    samples = read_conversation_shard(str(tmp_path / "0.tar")).samples
    bad = [sample.id for sample in samples if isinstance(sample, BadRecord)]
    assert [name.rpartition("/")[2] for name in bad] == names
