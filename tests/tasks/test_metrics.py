"""Scores of captions: values of pycocoevalcap, what is left out where, and what is refused."""

from __future__ import annotations

import json
import math
import stat
import subprocess

import pytest

from evlgen.common.errors import DataError, RegistryError
from evlgen.common.registry import registry
from evlgen.tasks.metrics import (
    BegunMetrics,
    CaptionMetric,
    MetricResult,
    Scores,
    captioning,
    meteor,
    score_captions,
)
from evlgen.tasks.metrics.java import Java, find_java
from evlgen.tasks.metrics.spice import STANFORD_JARS

pytestmark = pytest.mark.usefixtures("with_java")
WITHOUT_JAVA = ["bleu", "rouge_l", "cider"]
# By pycocoevalcap's own PTBTokenizer, Bleu(4), Meteor, Rouge and Cider on `five_images`, Java 17.
PUBLISHED = {
    "Bleu_1": 0.4079448162175584,
    "Bleu_2": 0.2631036140417249,
    "Bleu_3": 0.12443290545369158,
    "Bleu_4": 1.5839754199172006e-05,
    "METEOR": 0.15735854262348603,
    "ROUGE_L": 0.33574259325239125,
    "CIDEr": 0.4391250456367863,
}


@pytest.fixture(scope="module")
def five_images(golden):
    """References of five images and a candidate for each: COCO captions, two candidates damaged."""
    captions = [caption for caption, _ in json.loads((golden / "ptb_tokens.json").read_text("utf-8"))["coco"]]
    images = [captions[place : place + 5] for place in range(0, 25, 5)]
    references = dict(zip([1, 2, "three", 4, "cinq"], [image[1:] for image in images], strict=True))
    candidates = dict(zip(references, [image[0] for image in images], strict=True))
    candidates[4] = 'a café,\nwith a "dog\'s" bed'
    candidates["cinq"] = ""
    return references, candidates


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)


@pytest.fixture
def stand_in_java(monkeypatch, tmp_path):
    """Puts a shell script in the place of ``java``: for what a good Java does not do."""

    def put(script: str) -> None:
        folder = tmp_path / "java" / "bin"
        folder.mkdir(parents=True)
        executable = folder / "java"
        executable.write_text(f"#!/bin/sh\n{script}\n")
        executable.chmod(executable.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("JAVA_HOME", str(folder.parent))

    return put


def java_or_skip() -> Java:
    java = find_java()
    if isinstance(java, str):
        pytest.skip(java)
    return java


@pytest.fixture
def started(monkeypatch):
    """The processes that a test starts."""
    java_or_skip()
    found = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            found.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    return found


def test_values_are_those_of_pycocoevalcap_and_nothing_is_printed(five_images, capfd, started):
    metrics = BegunMetrics()  # while captions are being written
    assert any(process.poll() is None for process in started)
    scores = score_captions(*five_images, metrics)
    assert scores.values == pytest.approx(PUBLISHED, abs=1e-9) and scores.tokenizer == "java"
    assert scores.agg_metrics == pytest.approx(PUBLISHED["CIDEr"] + PUBLISHED["Bleu_4"], abs=1e-9)
    assert capfd.readouterr() == ("", "")
    assert started and all(process.poll() is not None for process in started)


def test_a_program_of_an_evaluation_that_was_stopped_ends(started):
    metrics = BegunMetrics(["meteor"])
    process = started[-1]
    assert process.poll() is None
    del metrics
    assert process.poll() is not None


def test_a_program_that_dies_while_captions_are_written_is_told(five_images, started):
    metrics = BegunMetrics(["meteor", "rouge_l"])
    started[-1].kill()
    scores = score_captions(*five_images, metrics)
    assert scores.values == pytest.approx({"ROUGE_L": PUBLISHED["ROUGE_L"]}, abs=1e-9)
    assert "ended without an answer" in scores.left_out["METEOR"]


@pytest.fixture
def asked(monkeypatch):
    """What METEOR's program is asked, as it is asked."""
    found = []
    ask = meteor._Program.ask
    monkeypatch.setattr(meteor._Program, "ask", lambda self, line: (found.append(line), ask(self, line))[1])
    return found


def test_what_is_written_already_is_scored_meanwhile_and_once(five_images, started, monkeypatch, asked):
    references, candidates = five_images
    first, second, third, *rest = candidates
    monkeypatch.setattr("evlgen.tasks.metrics.captioning._TAKEN_AT_ONCE", 2)
    metrics = BegunMetrics()
    metrics.take(references, {first: candidates[first], "not to be scored": "a dog"})
    metrics.take(references, {second: candidates[second], third: "what is written otherwise in the end"})
    metrics.wait()
    metrics.take(references, {rest[0]: candidates[rest[0]]})  # too few to be taken
    metrics.wait()
    assert len(asked) == 3 and all(line.startswith("SCORE") for line in asked)
    scores = score_captions(references, candidates, metrics)
    assert scores.values == pytest.approx(PUBLISHED, abs=1e-9)
    assert len(asked) == 3 + 3 + 1 and asked[-1].startswith("EVAL")  # the last three, and all of them


def test_a_program_that_dies_in_the_middle_is_started_again(five_images, started, monkeypatch, asked):
    monkeypatch.setattr("evlgen.tasks.metrics.captioning._TAKEN_AT_ONCE", 2)
    metrics = BegunMetrics(["meteor"])
    started[-1].kill()
    metrics.take(*five_images)
    metrics.wait()
    assert score_captions(*five_images, metrics).values == pytest.approx({"METEOR": PUBLISHED["METEOR"]})


def test_metrics_that_take_nothing_or_fail_to_cost_nothing(five_images, monkeypatch):
    monkeypatch.setattr("evlgen.tasks.metrics.captioning._TAKEN_AT_ONCE", 2)
    cut = []
    tokenize = captioning.tokenize_captions
    monkeypatch.setattr(captioning, "tokenize_captions", lambda *a: (cut.append(a), tokenize(*a))[1])
    metrics = BegunMetrics(["cider"])
    metrics.take(*five_images)
    metrics.wait()
    assert not cut

    class Broken(type(metrics.metrics["cider"])):
        def takes(self):
            return True

        def take(self, references, candidates):
            raise KeyError("a mistake")

    metrics = BegunMetrics({"cider": Broken()})
    for _ in range(3):
        metrics.take(*five_images)
        metrics.wait()
    assert len(cut) == 1, "not tried again"
    assert score_captions(*five_images, metrics).values == pytest.approx({"CIDEr": PUBLISHED["CIDEr"]})


def test_without_java_the_rest_has_the_same_values_and_the_reason_is_told(five_images, no_java, capfd):
    scores = score_captions(*five_images)
    rest = {name: value for name, value in PUBLISHED.items() if name != "METEOR"}
    assert scores.values == pytest.approx(rest, abs=1e-9) and scores.tokenizer == "python"
    assert set(scores.left_out) == {"METEOR", "SPICE"}
    assert "Java is not installed" in scores.left_out["METEOR"]
    assert capfd.readouterr() == ("", "")


def test_spice_without_its_models_is_left_out_with_the_command_that_gets_them(
    five_images, monkeypatch, tmp_path
):
    monkeypatch.setattr("evlgen.tasks.metrics.spice.pycocoevalcap_file", tmp_path.joinpath)
    scores = score_captions(*five_images, metrics=["spice"])
    assert scores.values == {}
    reason = scores.left_out["SPICE"]
    assert "python -m pycocoevalcap.spice.get_stanford_models" in reason and str(tmp_path) in reason


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'java version \"1.7.0_80\"' >&2", "Java 7, too old"),
        ("echo 'No Java runtime present' >&2; exit 1", "does not run (No Java runtime present)"),
        ("echo nonsense", "does not run (nonsense)"),
    ],
)
def test_a_java_that_does_not_serve_is_told(five_images, stand_in_java, script, reason):
    stand_in_java(script)
    scores = score_captions(*five_images, metrics=["meteor", "bleu"])
    assert reason in scores.left_out["METEOR"] and "Bleu_4" in scores.values and scores.tokenizer == "python"


def test_programs_that_fail_are_told_and_cost_no_other_metric(
    five_images, stand_in_java, monkeypatch, tmp_path, caplog
):
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    for name in STANFORD_JARS:
        (tmp_path / "spice" / "lib" / name).touch()
    monkeypatch.setattr("evlgen.tasks.metrics.spice.pycocoevalcap_file", tmp_path.joinpath)
    stand_in_java(
        "[ $1 = -version ] && echo 'openjdk version \"17.0.1\"' >&2 && exit 0\n"
        "echo 'Exception in thread \"main\" java.lang.OutOfMemoryError: Java heap space' >&2; exit 1"
    )
    scores = score_captions(*five_images)
    assert set(scores.values) == {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"}
    assert "OutOfMemoryError" in scores.left_out["METEOR"]
    assert "OutOfMemoryError" in scores.left_out["SPICE"]
    assert scores.tokenizer == "python" and "tokenised without Java" in caplog.text


def test_spice_keeps_images_apart_and_is_run_with_what_new_java_needs(
    five_images, stand_in_java, monkeypatch, tmp_path
):
    """The real program needs models of 400 MB; this one answers in its format, last image first."""
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    for name in STANFORD_JARS:
        (tmp_path / "spice" / "lib" / name).touch()
    monkeypatch.setattr("evlgen.tasks.metrics.spice.pycocoevalcap_file", tmp_path.joinpath)
    rows = [{"image_id": place, "scores": {"All": {"f": place / 10}}} for place in reversed(range(5))]
    (tmp_path / "answer.json").write_text(json.dumps(rows))
    stand_in_java(
        "[ $1 = -version ] && echo 'openjdk version \"21\" 2023-09-19' >&2 && exit 0\n"
        f'echo "$@" > {tmp_path}/command\n'
        "while [ $# -gt 0 ]; do\n"
        f'  case "$1" in *questions.json) cp "$1" {tmp_path}/asked;;\n'
        f'    -out) cp {tmp_path}/answer.json "$2";; esac\n'
        "  shift\ndone"
    )
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    scores = score_captions(*five_images, metrics=["spice"])
    assert scores.values == pytest.approx({"SPICE": 0.2})
    assert scores.per_image["SPICE"] == pytest.approx({1: 0, 2: 0.1, "three": 0.2, 4: 0.3, "cinq": 0.4})
    assert "--add-opens=java.base/java.lang=ALL-UNNAMED" in (tmp_path / "command").read_text()
    asked = json.loads((tmp_path / "asked").read_text())
    assert [len(entry["refs"]) for entry in asked] == [4] * 5 and asked[4]["test"] == ""


def test_values_per_image_belong_to_their_images(five_images, no_java):
    references, candidates = five_images
    scores = score_captions(references, dict(reversed(candidates.items())), WITHOUT_JAVA)
    assert set(scores.per_image["CIDEr"]) == set(candidates)
    assert scores.per_image["CIDEr"]["cinq"] == scores.per_image["ROUGE_L"]["cinq"] == 0
    assert scores.per_image["CIDEr"][1] > 0.1
    mean = sum(scores.per_image["CIDEr"].values()) / len(candidates)
    assert scores.values["CIDEr"] == pytest.approx(mean)
    assert scores.values["CIDEr"] == pytest.approx(PUBLISHED["CIDEr"])


def test_cider_counts_documents_over_exactly_the_scored_images(no_java):
    """Each candidate is its only reference: the highest score, unless both images say the same."""
    references = {1: ["red dog runs far"], 2: ["blue cat sits here"]}
    exact = score_captions(references, {1: "red dog runs far", 2: "blue cat sits here"}, ["cider"])
    assert exact.values["CIDEr"] == pytest.approx(10)
    shared_words = score_captions({1: ["a dog"], 2: ["a dog"]}, {1: "a dog", 2: "a dog"}, ["cider"])
    assert shared_words.values["CIDEr"] == 0


def test_a_single_image_has_no_cider_and_is_warned_about(no_java, caplog):
    assert score_captions({1: ["a dog"]}, {1: "a dog"}, ["cider"]).values["CIDEr"] == 0
    assert "single image" in caplog.text


def test_empty_text_on_both_sides_gives_numbers(no_java):
    scores = score_captions({1: [""], 2: ["."]}, {1: "", 2: "!"}, WITHOUT_JAVA)
    assert all(math.isfinite(value) for value in scores.values.values())
    assert scores.values["CIDEr"] == scores.values["Bleu_4"] == 0


def test_agg_metrics_needs_both_of_its_parts():
    assert Scores({"CIDEr": 1.25, "Bleu_4": 0.5}).agg_metrics == 1.75
    assert Scores({"CIDEr": 1.25}).agg_metrics is None


def test_a_registered_metric_is_computed_on_the_tokens(no_java):
    @registry.register_metric("test_words")
    class Words(CaptionMetric):
        names = ("Words",)

        def compute(self, references, candidates):
            per_image = {image: float(len(line.split())) for image, (line,) in candidates.items()}
            return MetricResult({"Words": sum(per_image.values())}, {"Words": per_image})

    @registry.register_metric("test_plain_class")
    class Plain:
        names = ("Plain",)
        needs_java = True

        def compute(self, references, candidates):
            return {"Plain": 1.0}

    scores = score_captions({1: ["x"]}, {1: "The dog's, bone."}, ["test_words", "test_plain_class"])
    assert scores.values == {"Words": 4.0} and scores.per_image == {"Words": {1: 4.0}}
    assert "Java is not installed" in scores.left_out["Plain"]


def test_a_misspelt_metric_names_the_nearest():
    with pytest.raises(RegistryError, match="Did you mean 'cider'"):
        score_captions({1: ["a"]}, {1: "a"}, ["ciderr"])


@pytest.mark.parametrize(
    ("references", "candidates", "message"),
    [
        ({1: ["a"], 2: ["b"]}, {1: "a"}, "image 2 has no generated caption"),
        ({1: ["a"]}, {1: "a", "x": "b", "y": "c"}, r"2 images \('x', 'y'\) have no reference captions"),
        ({i: ["a"] for i in range(9)}, {0: "a"}, r"8 images \(1, 2, 3, 4, 5 and 3 more\) have no generated"),
        ({1: ["a"]}, {"1": "a"}, "make them the same type"),
        ({}, {}, "no captions to score"),
        ({1: "a dog"}, {1: "a"}, "references of image 1 must be a list of at least one text, not 'a dog'"),
        ({1: []}, {1: "a"}, "references of image 1 must be a list"),
        ({1: ["a"]}, {1: None}, "generated caption of image 1 must be text, not None"),
    ],
)
def test_what_cannot_be_scored_is_named(references, candidates, message):
    with pytest.raises(DataError, match=message):
        score_captions(references, candidates)
