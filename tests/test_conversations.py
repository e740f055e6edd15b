"""Conversations from a file to a trained model: training, evaluation, data check, chat in a terminal."""

from __future__ import annotations

import io
import json
import random

import pytest
from omegaconf import OmegaConf
from PIL import Image

from evlgen import cli
from evlgen.commands.chat import Chat
from evlgen.common.registry import registry
from evlgen.config.run_config import RunConfig
from evlgen.datasets.conversation_dataset import ConversationDataset
from evlgen.datasets.conversation_records import read_conversations
from evlgen.datasets.media import ImageFiles
from evlgen.datasets.tables import open_table
from evlgen.models.zoo import load_model
from evlgen.processors.base_processor import UnchangedProcessor

ROUND = [
    ("human", "<image>\nWhat is it?"),
    ("gpt", "a red circle"),
    ("human", "and now?"),
    ("gpt", "a blue star"),
]


def llava(number, turns, **keys):
    return {"id": number, "conversations": [{"from": f, "value": v} for f, v in turns], **keys}


RECORDS = [
    *(llava(i, ROUND, image=f"{i % 3}.png", source="shapes") for i in range(5)),
    llava(
        5, [("human", "<image> or <image>, which is red?"), ("gpt", "the first")], image=["0.png", "1.png"]
    ),
    llava(6, [("human", "is <image> a tag?"), ("gpt", "yes, <image> is")]),
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]},
    llava(8, [("human", "<image>\nWhat?"), ("gpt", "x")]),  # its image is missing
]


@pytest.fixture
def project(tiny_project, tmp_path):
    draw = random.Random(0)
    for number in range(3):
        color = tuple(draw.randrange(256) for _ in range(3))
        Image.new("RGB", (40, 30), color).save(tmp_path / f"{number}.png")
    (tmp_path / "talks.json").write_text(json.dumps(RECORDS))
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, RECORDS[2:8])))

    def write(**run):
        path = tiny_project(run={"task": "conversation", "max_epoch": 1, "max_skipped_share": 0.2, **run})
        content = OmegaConf.load(path)
        content.datasets = {
            "conversations": {
                "annotations": {"train": str(tmp_path / "talks.json"), "val": str(tmp_path / "talks.jsonl")}
            }
        }
        OmegaConf.save(content, path)
        return str(path)

    return write


def test_a_run_learns_and_scores_conversations(project, tmp_path, capsys, monkeypatch):
    path = project(valid_splits=["val"], batch_size_train=2)
    assert cli.train(["--cfg-path", path]) == 0
    folder = tmp_path / "output" / "latest"
    metrics = json.loads((folder / "result" / "val_epoch1" / "metrics.json").read_text())
    assert {"accuracy", "CIDEr", "agg_metrics", "accuracy_shapes"} <= set(metrics)
    answers = json.loads((folder / "result" / "val_epoch1" / "answers.json").read_text())
    assert [a["question"] for a in answers] == [
        *3 * ["and now?"], "or , which is red?", "is <image> a tag?", "hello"
    ]  # fmt: skip
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert any("image_worth" in record or "eval_loss" in record for record in log)
    assert (
        "conversations: 3 of the 3 files of split 'val' are trained on too"
        in (folder / "log.txt").read_text()
    )
    skipped = (folder / "skipped.jsonl").read_text()
    assert "it has 1 markers (<image>, <video>) and 0 images" in skipped

    # the model that was trained answers in a terminal
    lines = f"what?\n/image {tmp_path / 'no.png'}\n/exit\nnot asked\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert cli.main(["chat", "--checkpoint", str(folder), "--max-length", "4", str(tmp_path / "0.png")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert any(line.startswith("/image PATH shows another image") for line in told) and "no.png" in told[-1]


def test_what_the_model_cannot_answer_is_skipped_and_counted(project, tmp_path):
    asked = [llava(0, ROUND, image="0.png"), llava(1, [("gpt", "hi"), *ROUND[2:]]), llava(2, ROUND[2:])]
    long = [("human", "what? " * 300), ("gpt", "a star")]
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, [*asked, llava(3, long)])))
    alternate = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('The user begins') }}{% endif %}"
        "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    )
    (tmp_path / "mine.jinja").write_text(alternate)
    options = [
        f"datasets.conversations.annotations.val={tmp_path / 'val.jsonl'}",
        f"model.language.chat_template={tmp_path / 'mine.jinja'}",
    ]
    path = project(test_splits=["val"], evaluate=True, max_skipped_share=0.6)
    assert cli.evaluate(["--cfg-path", path, "--options", *options]) == 0
    folder = tmp_path / "output" / "latest"
    (answers,) = folder.glob("result/*/answers.json")
    assert [a["instance_id"] for a in json.loads(answers.read_text())] == ["0", "2"]
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    reasons = {record["id"]: record["reason"] for record in skipped}
    assert reasons["1"] == "The user begins" and "leaves no room for 5 tokens" in reasons["3"]


def test_a_first_stage_says_that_it_holds_no_conversations(tmp_path, capsys):
    (tmp_path / "model.yaml").write_text("model: {arch: blip2, model_type: shapes}")
    assert cli.main(["chat", "--cfg-path", str(tmp_path / "model.yaml")]) == 1
    assert "first stage holds no conversations" in capsys.readouterr().err


def test_data_check_counts_turns_images_and_lengths(project, tmp_path, capsys):
    assert cli.main(["data", "check", "--cfg-path", project(), "--to", str(tmp_path / "check")]) == 0
    told = capsys.readouterr().out
    assert "turns: 4 in the middle, 4 at most; images: 2 with 0, 5 with 1, 1 with 2" in told
    assert "1 places without images" in told
    assert "conversations/train: 9 samples of 3 images or videos" in told
    assert "conversations/train and conversations/val share 3 images or videos" in told
    assert "model.max_sequence_len: " in told
    report = json.loads((tmp_path / "check" / "report.json").read_text())
    assert report["conversations/train"]["images"] == {"0": 2, "1": 5, "2": 1}


def test_a_model_of_videos_sees_several_frames_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.png")
    written = []
    chat = Chat(load_model("evlgen_video_opt", "shapes"), None, {"max_length": 3, "num_frames": 3})
    for name in ("a.gif", "a.png"):
        chat.show(str(tmp_path / name))
    chat.hold(iter(["what happens?"]), written.append)
    assert [part["image"].shape[1] for part in chat.messages[0]["content"][:2]] == [3, 1]
    assert chat.messages[1]["content"] in "".join(written)


def test_ctrl_c_stops_an_answer_and_not_the_chat(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    chat = Chat(load_model("evlgen_opt", "shapes"), "be short", {"max_length": 6})
    written = []

    def write(text):
        written.append(text)
        if len(written) == 1:  # in the first answer
            raise KeyboardInterrupt

    chat.show(str(tmp_path / "red.png"))
    chat.hold(iter(["what is it?", "", "/help", "and now?"]), write)
    assert written[1] == " [stopped]\n" and "/clear begins again" in written[2]
    assert [m["role"] for m in chat.messages] == ["system", *2 * ["user", "assistant"]]
    assert written[0] == chat.messages[2]["content"]
    assert [part["type"] for part in chat.messages[1]["content"]] == ["image", "text"]
    chat.hold(iter(["/clear", "/image nowhere.png"]), written.append)
    assert [m["role"] for m in chat.messages] == ["system"] and "nowhere.png" in written[-1]


def test_the_letter_of_a_choice_is_met_by_itself_alone(tmp_path):
    rows = [llava(i, [("human", "A or B?"), ("gpt", letter)]) for i, letter in enumerate("AAAAAB")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    media = ImageFiles(tmp_path)
    records = read_conversations([open_table(tmp_path / "a.jsonl")])
    dataset = ConversationDataset(records, media, media, UnchangedProcessor(), learned=False)
    task = registry.get_task_class("conversation")(RunConfig(task="conversation"))
    written = ["A", "a.", "", "the", "?", "b"]
    results = [
        {"instance_id": str(i), "question": "A or B?", "answer": answer} for i, answer in enumerate(written)
    ]
    assert task.after_evaluation(results, dataset, "val", tmp_path)["accuracy"] == 50
