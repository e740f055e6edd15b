"""The page of a run, from a folder that is written here: what it shows, and that it stands alone."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from evlgen import cli
from evlgen.config.config import Config
from evlgen.files.io import PACKAGE_ROOT
from evlgen.report.run_folder import RunFolder
from evlgen.report.run_page import duration, run_names, run_page

HOSTILE = "<script>alert(1)</script>\x1b[31m"


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def make_run(tmp_path):
    """Writes a run's folder: two epochs of ten iterations, captions of two samples, one of them hostile."""

    def make(name="one/20260101-000000", **run):
        folder = tmp_path / name
        (folder / "samples").mkdir(parents=True)
        options = [f"run.{key}={json.dumps(value)}" for key, value in run.items()]
        cfg = Config.load(PACKAGE_ROOT / "projects/shapes/caption.yaml", options)
        (folder / "config.yaml").write_text(cfg.to_yaml())
        numbers = {"lr": 1e-3, "grad_norm": 2.0, "samples_per_s": 9.5}
        effort = [{"trained_seconds": 2.0 * i, "trained_samples": 8 * i} for i in range(21)]
        steps = [
            {"type": "train", "iteration": i, "epoch": 0, "loss": 5.0 / i, **numbers, **effort[i]}
            for i in range(1, 21)
        ]
        scored = {"type": "evaluation", "split": "val", "samples": 2, "skipped": 1, "seconds": 1.0}
        evaluations = [
            {**scored, "label": f"epoch{e}", "iteration": 10 * e, "CIDEr": 0.25 * e, "image_worth": 0.125 * e}
            | effort[10 * e]
            for e in (1, 2)
        ]
        lines(folder / "log.jsonl", [*steps, *evaluations, {"type": "train", "iteration": "x"}, ["no"]])
        with open(folder / "log.jsonl", "a") as file:
            file.write('{"type": "train", "iter')  # being written
        Image.new("RGB", (8, 8), "red").save(folder / "samples" / "val_0.png")
        first = {"id": 0, "reference": "a red square", "score": 0.5, "image": "samples/val_0.png"}
        other = {"id": HOSTILE, "text": HOSTILE, "reference": "", "image": "../../secret.png"}
        shown = [[{**first, "text": f"written at {e}"}, other] for e in (1, 2)]
        lines(
            folder / "samples.jsonl",
            [
                {"type": "evaluation", "split": "val", "label": f"epoch{e}", "iteration": 10 * e}
                | {"metric": "CIDEr", "samples": rows, "best": rows[:1], "worst": rows[:1]}
                for e, rows in zip((1, 2), shown, strict=True)
            ],
        )
        skipped = [{"id": f"{i}.jpg", "cause": cause, "reason": HOSTILE} for i, cause in enumerate("aab")]
        lines(folder / "skipped.jsonl", skipped)
        (folder / "facts.json").write_text(
            json.dumps({"wall_seconds": 3725, "starts": 2, "state": "finished"})
        )
        Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
        return folder

    return make


def test_a_page_has_what_the_run_left_and_stands_alone(make_run, capsys):
    folder = make_run(init_lr=0.5, batch_size_train=77)
    assert cli.main(["report", str(folder.parent / "20260101-000000")]) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    page = (folder / "report.html").read_text()
    sources = re.findall(r'(?:src|href)\s*=\s*["\']?([^"\'\s>]*)', page)
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert sum("image/svg" in source for source in sources) == 3
    assert sum("image/png" in source for source in sources) == 3, "one sample, the best and the worst"
    assert "<script" not in page and "\x1b" not in page and "&lt;script&gt;" in page
    for text in ("written at 1", "iteration 10", "written at 2", "iteration 20", "0.500", "1 h 02 min"):
        assert text in page
    assert re.search(r"run.init_lr</code></td><td[^>]*>0.0001</td><td[^>]*>0.5<", page)
    assert re.search(r"<td>a</td><td>2</td>", page)
    assert "batch_size_train: 77" in page, "the whole configuration"
    assert str(folder.parent.parent) not in page


def test_runs_are_laid_beside_each_other(make_run):
    runs = [RunFolder(make_run(f"{name}/run", seed=i)) for i, name in enumerate(("one", "two"))]
    assert run_names(runs) == ["one", "two"]
    page = run_page(runs)
    assert "<h1>Runs</h1>" in page and page.count("written at 2") == 2 + 4 and "written at 1" not in page
    row = re.search(r"run.seed</code></td>(.*?)</tr>", page).group(1)
    assert re.findall(r">(\d+)<", row) == ["42", "0", "1"]
    assert page.index("run.seed<") < page.index("run.max_epoch<" if "run.max_epoch<" in page else "</html>")


def test_captions_of_a_run_that_was_only_tested_are_those_of_its_split(make_run):
    folder = make_run()
    name = folder / "samples.jsonl"
    line = json.loads(name.read_text().splitlines()[0])
    lines(name, [{**line, "split": "test", "label": "", "iteration": None}])
    with open(folder / "log.jsonl", "a") as file:
        record = {"type": "evaluation", "split": "test", "label": "", "iteration": None}
        file.write('"}\n' + json.dumps(record) + "\n")
    page = run_page([RunFolder(folder)])
    assert "<dt>test</dt><dd>written at 1</dd>" in page and "<td>test</td>" in page
    assert "iteration None" not in page and "test, test" not in page


@pytest.mark.parametrize("kind", ["image_text", "coco_caption", "shapes_caption"])
@pytest.mark.parametrize("name", ["mine", None])
def test_only_what_was_set_differs_from_the_defaults(tmp_path, kind, name):
    """Whether a dataset has a name of its own, and whether its builder needs keys that have no default."""
    options = ["model.arch=evlgen_opt", "model.model_type=shapes", "model.connector.r=3", "run.max_epoch=2"]
    section = {"builder": kind, "vis_processor": {"eval": {"image_size": 64}}}
    expected = {"model.connector.r", "run.max_epoch", "run.runner"}
    if kind == "image_text":
        section["annotations"] = {"train": "my.csv"}
        expected.add(f"datasets.{name or kind}.annotations.train")
    if kind == "coco_caption":
        section["build_info"] = {"images": {"storage": "photos"}}
        expected.add(f"datasets.{name or kind}.build_info.images.storage")
    options.append(f"datasets={json.dumps({name or kind: section})}")
    Config.load(None, options).save(tmp_path / "config.yaml")
    found = RunFolder(tmp_path).differing()
    assert found.keys() == expected
    assert found["model.connector.r"][0] == 3 and found["model.connector.r"][1] not in (3, None)


def test_a_run_that_has_only_begun_has_a_page(make_run):
    folder = make_run()
    for name in ("log.jsonl", "samples.jsonl", "skipped.jsonl", "facts.json"):
        (folder / name).unlink()
    assert "there is no log.jsonl" in run_page([RunFolder(folder)])


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "not a run's folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (5.55, "5.5 s"), (184, "3 min 04 s"), (3725, "1 h 02 min"), (90000, "25 h 00 min")],
)
def test_durations_are_written_for_people(seconds, text):
    assert duration(seconds) == text
