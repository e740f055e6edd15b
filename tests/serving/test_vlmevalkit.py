"""The adapter for VLMEvalKit; driven by the real one where that is installed."""

from __future__ import annotations

import csv
import json
import sys

import pytest
from PIL import Image

from evlgen.common.errors import ConfigError
from evlgen.datasets.shapes.captions import captions
from evlgen.datasets.shapes.world import draw, scene
from evlgen.models.zoo import load_model
from evlgen.serving import vlmevalkit

COUNT = 12


@pytest.fixture(scope="module")
def model():
    return load_model("evlgen_opt")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for place in range(COUNT):
        Image.fromarray(draw(scene("test", place))).save(folder / f"{place}.png")
    return [str(folder / f"{place}.png") for place in range(COUNT)]


def image(file):
    return {"type": "image", "value": file}


def text(value):
    return {"type": "text", "value": value}


def test_texts_are_the_models_own(model, files):
    options = {"num_beams": 1, "max_length": 8}
    first, second = (Image.open(file) for file in files[:2])
    made = vlmevalkit.EVLGen(max_new_tokens=8)
    assert made.generate([image(files[0]), text(float("nan"))]) == model.generate([first], **options)[0]
    answers = [made.generate([image(files[0]), text(q)]) for q in ("how many", "a red")]
    samples = {"image": [first, first], "prompt": ["how many", "a red"]}
    assert answers == model.generate(samples, **options)
    talking = vlmevalkit.EVLGen(max_new_tokens=8, chat=True)
    parts = [text("one"), image(files[0]), text("or"), image(files[1]), text("?")]
    content = [{"type": p["type"], ("text" if p["type"] == "text" else "image"): p["value"]} for p in parts]
    content[1]["image"], content[3]["image"] = first, second
    assert talking.generate(parts) == model.chat([{"role": "user", "content": content}], max_length=8)
    assert talking.generate("hello") == model.chat([{"role": "user", "content": "hello"}], max_length=8)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vlmeval", None)
    with pytest.raises(ConfigError, match="VLMEvalKit cannot be imported .*docs/lmms-eval.md"):
        vlmevalkit.main()


def test_the_harness_finds_the_texts_cider_and_accuracy_that_we_do(model, files, tmp_path, monkeypatch):
    monkeypatch.setenv("LMUData", str(tmp_path))
    pytest.importorskip("vlmeval.run", reason="VLMEvalKit is not installed")
    from pycocoevalcap.cider.cider import Cider

    texts = [captions(scene("test", place)) for place in range(COUNT)]
    written = model.generate([Image.open(file) for file in files], num_beams=1, max_length=20)
    words = ["circle", "star", "square"]
    right = [next((w for w in words if w in one[0]), "circle") for one in texts]
    rows = [{"index": i, "image_path": file, "question": ""} for i, file in enumerate(files)]
    tables = {
        "shapes_captions": [{**row, "answer": repr(own)} for row, own in zip(rows, texts, strict=True)],
        "shapes_choices": [
            {
                **row,
                "question": "which?",
                **dict(zip("ABC", words, strict=True)),
                "answer": "ABC"[words.index(w)],
            }
            for row, w in zip(rows, right, strict=True)
        ],
    }
    for name, table in tables.items():
        with open(tmp_path / f"{name}.tsv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), delimiter="\t")
            writer.writeheader()
            writer.writerows(table)
    data = {
        "shapes_captions": {"class": "ImageCaptionDataset", "dataset": "shapes_captions"},
        "shapes_choices": {"class": "CustomMCQDataset", "dataset": "shapes_choices"},
    }
    config = {"model": {"mine": {"class": "EVLGen", "max_new_tokens": 20}}, "data": data}
    (tmp_path / "run.json").write_text(json.dumps(config))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "run",
            "--config",
            f"{tmp_path}/run.json",
            "--work-dir",
            f"{tmp_path}/out",
            "--judge",
            "exact_matching",
        ],
    )
    vlmevalkit.main()
    (scores,) = (tmp_path / "out" / "mine").glob("T*/mine_shapes_captions_score.json")
    references = {str(i): own for i, own in enumerate(texts)}
    ours = Cider().compute_score(references, {str(i): [one] for i, one in enumerate(written)})[0]
    assert json.loads(scores.read_text())["CIDEr"] == pytest.approx(100 * ours)
    (accuracy,) = (tmp_path / "out" / "mine").glob("T*/mine_shapes_choices_acc.csv")
    asked = [f"Question: which?\nOptions:\nA. {words[0]}\nB. {words[1]}\nC. {words[2]}\n"] * COUNT
    asked = [f"{one}Please select the correct answer from the options above. \n" for one in asked]
    samples = {"image": [Image.open(file) for file in files], "prompt": [one.strip() for one in asked]}
    answers = model.generate(samples, num_beams=1, max_length=20)
    met = [
        [w for w in words if w in answer.lower()] == [own] for answer, own in zip(answers, right, strict=True)
    ]
    with open(accuracy) as file:
        assert float(next(csv.DictReader(file))["Overall"]) == pytest.approx(sum(met) / COUNT)
