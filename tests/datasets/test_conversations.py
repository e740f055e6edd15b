"""Conversations in files: layouts, places of images, and records that make no sample."""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

from evlgen.common.errors import DataError
from evlgen.datasets.base_dataset import Skipped
from evlgen.datasets.conversation_dataset import CauldronBuilder, ConversationsBuilder, LlavaInstructBuilder
from evlgen.datasets.conversation_records import read_conversation
from evlgen.datasets.tables import Row
from evlgen.loaders.mixed_plan import make_plan

PROCESSORS = {role: {"name": "blip_image_eval", "image_size": 16} for role in ("train", "eval")}
QUESTION, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}


def llava(*values, **keys):
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"conversations": turns, **keys}


def read(**values):
    return read_conversation(Row("record 0", values))


def shown(record):
    """The turns as text, an image as [its name]."""
    names = iter(record["visuals"])
    return [
        m["content"]
        if isinstance(m["content"], str)
        else "".join(part.get("text") or f"[{next(names)[1]}]" for part in m["content"])
        for m in record["messages"]
    ]


def png(color="red"):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(file, "png")
    return file.getvalue()


def builder(cls=ConversationsBuilder, cache="/nowhere", **settings):
    return cls(name="talks", cache_root=cache, vis_processor=PROCESSORS, **settings)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (llava("<image>\nWhat?", "a cat", image="1.jpg"), ["[1.jpg]\nWhat?", "a cat"]),
        (llava("What?\n<image>", "a cat", image="1.jpg"), ["What?\n[1.jpg]", "a cat"]),
        (
            llava("<image> or <image>?", "this", "and <image>?", "no", image=["1", "2", "3"]),
            ["[1] or [2]?", "this", "and [3]?", "no"],
        ),
        (llava("Is <image> a tag?", "<image> is"), ["Is <image> a tag?", "<image> is"]),
        (llava("<image>\nIs <image> a tag?", "yes", image="1"), ["[1]\nIs <image> a tag?", "yes"]),
        (llava("<video>\n<image>\nsame?", "no", image="1", video="2.mp4"), ["[2.mp4]\n[1]\nsame?", "no"]),
        (
            {"messages": [{"role": "user", "content": "<image>Who?"}, ANSWER], "images": ["1"]},
            ["[1]Who?", "hi"],
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "is <image> in "},
                            {"type": "image_url", "image_url": {"url": "https://x.org/1.png"}},
                        ],
                    },
                    ANSWER,
                ]
            },
            ["is <image> in [https://x.org/1.png]", "hi"],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "or"}]},
                    ANSWER,
                    {"role": "user", "content": [{"type": "image"}]},
                    ANSWER,
                ],
                "images": [{"path": "1"}, {"path": "2"}],
            },
            ["[1]or", "hi", "[2]", "hi"],
        ),
        (
            {
                "texts": [{"user": "a", "assistant": "b"}, {"user": "c", "assistant": "d"}],
                "images": ["1", "2"],
            },
            ["[1][2]\na", "b", "c", "d"],
        ),
        (llava("a", "b", system="be short"), ["be short", "a", "b"]),
        (llava("<image>\nwhat happens?", "rain", video="1.mp4"), ["[1.mp4]\nwhat happens?", "rain"]),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "<image>\nis which tag?"}]},
                    ANSWER,
                ]
            },
            ["<image>\nis which tag?", "hi"],
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "text": None, "image": {"bytes": b"any", "path": "1.png"}},
                            {"type": "image", "text": None, "image": {"bytes": None, "path": "2.png"}},
                            {"type": "text", "text": "same?", "image": None},
                        ],
                    },
                    ANSWER,
                ]
            },
            ["[data:image/any;base64,YW55][2.png]same?", "hi"],
        ),
        ({"messages": [{"role": "system", "content": ""}, QUESTION, ANSWER]}, ["hello", "hi"]),
    ],
)
def test_layouts_give_the_same_turns(values, expected):
    assert shown(read(**values)) == expected


@pytest.mark.parametrize(
    ("values", "cause", "reason"),
    [
        (llava("<image>\nWhat?", "x"), "places without images", "1 markers (<image>, <video>) and 0 images"),
        (llava("<image>\n<image>\nWhat?", "x", image="1"), "places without images", "2 markers"),
        (
            llava("What?", "x", image="1"),
            "images without places",
            "0 markers (<image>, <video>) and 1 images",
        ),
        (llava("<image>\nWhat?", "x", image=["1", "2"]), "images without places", "1 markers"),
        (
            llava("<video>\nWhat?", "x", image="1"),
            "places without images",
            "more markers <video> than videos",
        ),
        (llava("<image>\nWhat?", image="1"), "ends with a question", "its last turn must be an answer"),
        (llava("What?", " \n"), "empty turn", "turn 2 (assistant) is empty"),
        (llava("", "x"), "empty turn", "turn 1 (user) is empty"),
        ({"conversations": []}, "no turns", "has no turns"),
        ({"conversations": "hello"}, "no turns", "must be a list of turns"),
        ({"conversations": [{"from": "humn", "value": "x"}]}, "unknown role", "Did you mean 'human'?"),
        ({"conversations": [{"from": "human", "value": None}]}, "empty turn", "turn 1 has no text"),
        ({"conversations": ["hello"]}, "bad turn", "turn 1 must be a mapping"),
        ({"messages": [{"role": "tool", "content": "x"}, ANSWER]}, "unknown role", "unknown role 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "bad turn", "neither text, image"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
            "places without images",
            "1 ",
        ),
        (
            {"messages": [QUESTION, {"role": "system", "content": "x"}, ANSWER]},
            "system turn",
            "turn 2 is the",
        ),
        ({"texts": [{"user": "x"}]}, "bad turn", "must have the texts 'user' and 'assistant'"),
        (llava("a\ud800", "x"), "not UTF-8", "turn 1 has half of a surrogate pair"),
        (llava("<image>\na", "x", image=3), "bad record", "'image' must name a file"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": {"id": 1}}]}, ANSWER]},
            "image without a file",
            "the image of a part is named by {'id': 1}, not by a file",
        ),
        ({"id": 3}, "no turns", "it has neither of conversations, messages, texts"),
    ],
)
def test_a_record_that_makes_no_sample_says_why(values, cause, reason):
    with pytest.raises(DataError) as found:
        read(**values)
    assert reason in str(found.value) and cause in found.value.cause


def test_samples_of_a_file_with_images_in_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(png())
    address = f"data:image/png;base64,{base64.b64encode(png('blue')).decode()}"
    records = [
        llava("<image>\n<image>\nWhat?", "a", "And?", "b", image=["a/1.png", address], id="x"),
        llava("Hello", "hi"),
        llava("<image>\nWhat?", "a", image="a/2.png"),
        llava("<video>\nWhat?", "a", video="a/3.mp4"),
        llava("Hello"),
    ]
    (tmp_path / "talks.json").write_text(json.dumps(records))
    found = builder(annotations={"train": str(tmp_path / "talks.json"), "val": str(tmp_path / "talks.json")})
    train, val = found.get_split("train"), found.get_split("val")
    assert [tuple(image.shape) for image in train[0]["images"]] == [(3, 16, 16)] * 2
    assert train[1] == {"messages": read(**records[1])["messages"], "instance_id": "1", "images": []}
    assert len(val[0]["messages"]) == 3 and val.references()[0] == ["b"]
    drawn = {"messages": [QUESTION, {"role": "assistant", "content": [{"type": "image", "path": "a/1.png"}]}]}
    drawn["messages"][1]["content"].append({"type": "text", "text": "here"})
    (tmp_path / "drawn.jsonl").write_text(json.dumps(drawn))
    path = str(tmp_path / "drawn.jsonl")
    splits = builder(annotations={"train": path, "val": path}).build_datasets()
    assert [len(splits[split][0]["images"]) for split in ("train", "val")] == [1, 0]
    batch = train.collater([train[0], train[1], train[2]])
    assert [len(images) for images in batch["images"]] == [2, 0] and len(batch["skipped"]) == 1
    reasons = {i: train[i].reason for i in (2, 3, 4)}
    assert all(isinstance(train[i], Skipped) for i in reasons)
    assert (
        "is a video, and the model reads images only" in reasons[3] and "ends with a question" in reasons[4]
    )
    assert train[3].cause == "a video for a model of images" and train.sample_id(0) == "x"


def test_images_in_parquet_files_of_the_hub(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = [[{"bytes": png(), "path": None}, {"bytes": png("blue"), "path": None}], []]
    texts = [[{"user": "which?", "assistant": "red"}], [{"user": "hello", "assistant": "hi"}]]
    folder = tmp_path / "cauldron" / "aokvqa"
    folder.mkdir(parents=True)
    for shard in (0, 1):
        rows = pa.table({"images": images, "texts": texts})
        pq.write_table(rows, folder / f"train-0000{shard}-of-00002.parquet")
    dataset = builder(CauldronBuilder, tmp_path, annotations={"train": "cauldron/aokvqa"}).get_split("train")
    assert len(dataset) == 4
    red, blue = dataset[2]["images"]
    assert red[0].mean() > red[2].mean() and blue[0].mean() < blue[2].mean()
    assert dataset[3]["images"] == [] and shown(dataset.records[3]) == ["hello", "hi"]
    talks = pa.table({"messages": [[QUESTION, ANSWER]]})
    pq.write_table(talks, tmp_path / "talks.parquet")
    assert len(builder(annotations={"train": str(tmp_path / "talks.parquet")}).get_split("train")) == 1


def test_all_conversations_about_an_image_are_in_one_split(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png())
    records = [llava("<image>\nWhat?", str(i), image=f"{i % 4}.png") for i in range(12)]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = builder(annotations={"train": str(tmp_path / "talks.jsonl")}, split={"val": 0.25})
    images = {split: {r["visual"] for r in found.get_split(split).records} for split in ("train", "val")}
    assert len(found.get_split("val")) == 3 and not images["train"] & images["val"]
    pairs = [(5, 4), (0, 1), (3, 2), (1, 4), (2, 3), (5, 0)]  # 0, 1, 4 and 5 belong together, and 2 and 3
    records = [llava("<image>\n<image>\nWhat?", "a", image=[f"{i}.png" for i in pair]) for pair in pairs]
    for number in (4, 5):
        (tmp_path / f"{number}.png").write_bytes(png())
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = builder(annotations={"train": str(tmp_path / "pairs.jsonl")}, split={"val": 0.1})
    shown = [
        {name for r in found.get_split(split).records for _, name in r["visuals"]}
        for split in ("train", "val")
    ]
    assert sorted(map(sorted, shown)) == [["0.png", "1.png", "4.png", "5.png"], ["2.png", "3.png"]]


def test_a_file_without_conversations_and_published_ones_that_are_missing(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"image": "1.jpg", "caption": "a cat"}]))
    with pytest.raises(DataError, match="none of the columns conversations, messages, texts .*holds no conv"):
        builder(annotations={"train": str(tmp_path / "a.json")}).get_split("train")
    with pytest.raises(DataError, match="llava_v1_5_mix665k.json' is not there"):
        builder(LlavaInstructBuilder, tmp_path, annotations={"train": "llava_v1_5_mix665k.json"}).get_split(
            "train"
        )


def test_batches_of_similar_lengths_have_each_sample_once(tmp_path):
    records = [llava("x" * (40 * (i % 7) + 1), "hi") for i in range(30)]
    (tmp_path / "talks.json").write_text(json.dumps(records))
    dataset = builder(annotations=str(tmp_path / "talks.json"), split={}).get_split("train")
    plan = make_plan([dataset], 4, seed=1, group_by_length=True)
    batches = [[i for i, _ in batch] for batch, _ in zip(plan, range(7), strict=False)]
    assert len({i for batch in batches for i in batch}) == 28
    spread = [max(s) - min(s) for s in ([dataset.size(i) for i in batch] for batch in batches)]
    assert sum(spread) < 70  # of any batches: some 350
    two = [make_plan([dataset], 2, 1, rank=rank, world_size=2, group_by_length=True) for rank in (0, 1)]
    pairs = [[i for i, _ in a + b] for a, b, _ in zip(*two, range(7), strict=False)]
    assert pairs == batches
