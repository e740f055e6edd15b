"""Tasks for questions: what they learn, ask, write and score, against values worked out by hand."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from evlgen.assemble import run as run_project
from evlgen.common.errors import ConfigError, DataError
from evlgen.common.registry import registry
from evlgen.config.config import Config, load_model_file
from evlgen.config.run_config import RunConfig
from evlgen.datasets.base_dataset import BaseDataset, collate
from evlgen.tasks import question_answering
from evlgen.tasks.caption_sheet import caption_sheet
from evlgen.tasks.lemmatizer import Lemmatizer
from evlgen.tasks.question_answering import means_by_kind

PROMPT = "Question: {} Short answer:"


class Questions(BaseDataset):
    """Questions with ids of mixed types about blank images; ``people`` answered."""

    def __init__(self, people, types=None, kinds=None, choices=None, right=None, listed=()):
        super().__init__(list(people))
        self.people, self.types, self.kinds = people, types or {}, kinds or {}
        self.choices, self.right, self.listed = choices, right or {}, list(listed)

    def load_sample(self, index):
        key = self.records[index]
        sample = {
            "image": torch.zeros(3, 2, 2),
            "text_input": f"question {key}?",
            "question_id": key,
            "instance_id": str(index),
        }
        return sample if self.choices is None else {**sample, "choices": self.choices.get(key, [])}

    def answers(self):
        return {key: people for key, people in self.people.items() if people}

    def answer_types(self):
        return self.types

    def question_types(self):
        return self.kinds

    def correct_choices(self):
        return self.right

    def answer_list(self):
        return self.listed


class Model:
    """Gives the answers it is told to, in turn, and keeps how it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked, self.ranked = list(answers), [], []
        self.encodings = 0

    def encoded(self, samples):
        self.encodings += 1
        return {**samples, "visual_tokens": samples["image"]}

    def predict_answers(self, samples, **options):
        self.asked.append(options)
        self.seen = samples
        return [self.answers.pop(0) for _ in samples["text_input"]]

    def rank_answers(self, samples, candidates, **options):
        self.ranked.append((candidates, options))
        assert samples is getattr(self, "seen", samples), "answered and ranked from the same tokens"
        lists = [candidates] * len(samples["text_input"]) if isinstance(candidates[0], str) else candidates
        return [answers[-1] for answers in lists]


def task_of(name, **run):
    return registry.get_task_class(name)(RunConfig(task=name, **run))


def evaluate(task, model, dataset, folder, batch_size=2):
    """All of the dataset, in batches; the last batch first, as processes may hand them in."""
    task.before_evaluation(dataset, "val")
    batches = [range(i, min(i + batch_size, len(dataset))) for i in range(0, len(dataset), batch_size)]
    results = [task.valid_step(model, collate([dataset[i] for i in batch])) for batch in batches]
    rows = [row for batch in reversed(results) for row in batch]
    return task.after_evaluation(json.loads(json.dumps(rows)), dataset, "val", folder)


def written(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def sheet(monkeypatch):
    """The lines of the sheet of images, which takes a second to draw."""
    lines = []
    monkeypatch.setattr(
        question_answering, "caption_sheet", lambda images, captions, path: lines.extend(captions)
    )
    return lines


# ---- vqa


def test_vqa_is_scored_as_the_challenge_does_by_kind_of_answer_and_of_question(tmp_path, sheet):
    people = {
        7: ["yes"] * 8 + ["no"] * 2,
        "a": ["2"] * 2 + ["3"] * 8,
        9: ["brown dog"] * 3 + ["dog"] * 7,
        10: ["no"] * 10,
    }
    types = {7: "yes/no", "a": "number", 9: "other", 10: "yes/no"}
    kinds = {7: "is the", "a": "how many", 9: "", 10: "is the"}
    dataset = Questions(people, types, kinds)
    metrics = evaluate(task_of("vqa"), Model("Yes.", "two", "a brown, dog", "yes"), dataset, tmp_path)
    # yes: 1; two of ten said 2: 0.6; three said brown dog: 0.9; nobody said yes: 0
    assert metrics == pytest.approx(
        {
            "accuracy": 62.5,
            "accuracy_yes_no": 50.0,
            "accuracy_number": 60.0,
            "accuracy_other": 90.0,
            "agg_metrics": 62.5,
        }
    )
    assert written(tmp_path, "answers.json") == [
        {"question_id": 7, "answer": "Yes."},
        {"question_id": "a", "answer": "two"},
        {"question_id": 9, "answer": "a brown, dog"},
        {"question_id": 10, "answer": "yes"},
    ]
    details = written(tmp_path, "metrics.json")
    assert details["accuracy_by_question_type"] == pytest.approx({"how many": 60.0, "is the": 50.0})
    assert details["questions"] == 4
    assert sheet == [
        ("question 7? Yes.", "yes"),
        ("question a? two", "3"),
        ("question 9? a brown, dog", "dog"),
    ] + [("question 10? yes", "no")]


def test_kinds_of_answers_in_any_script_have_their_own_scores(tmp_path):
    kinds = {1: "颜色", 2: "数量", 3: "où/là"}
    dataset = Questions({i: ["yes"] for i in kinds}, kinds)
    metrics = evaluate(task_of("vqa"), Model("yes", "no", "yes"), dataset, tmp_path)
    assert (metrics["accuracy_颜色"], metrics["accuracy_数量"], metrics["accuracy_où_là"]) == (100, 0, 100)


def test_questions_without_peoples_answers_are_written_and_not_scored(tmp_path, caplog):
    dataset = Questions({1: [], 2: ["no"] * 10})
    assert evaluate(task_of("vqa"), Model("yes", "no"), dataset, tmp_path)["accuracy"] == 100
    assert written(tmp_path, "metrics.json")["questions"] == 1
    hidden = Questions({1: [], 2: []})
    for name in ("vqa", "gqa", "video_qa", "aok_vqa"):
        folder = tmp_path / name
        assert evaluate(task_of(name), Model("yes", "no"), hidden, folder) == {}
        assert len(written(folder, "answers.json")) == 2 and not (folder / "metrics.json").exists()
    assert "written, not scored" in caplog.text


def test_a_file_to_upload_that_lacks_skipped_questions_is_told(tmp_path, caplog):
    dataset, task = Questions({i: ["no"] for i in range(5)}), task_of("vqa")
    rows = [{"question_id": i, "answer": "no", "question": "q", "instance_id": str(i)} for i in (0, 2, 3)]
    task.after_evaluation(rows, dataset, "test", tmp_path)
    assert "answers.json lacks 2 of 5 samples, which were skipped" in caplog.text
    caplog.clear()
    task_of("vqa", max_eval_samples=3).after_evaluation(rows, dataset, "test", tmp_path)
    assert "lacks" not in caplog.text


def test_how_the_model_is_asked_follows_from_the_run_section(tmp_path):
    dataset, model = Questions({1: ["yes"] * 10}), Model("yes", "yes")
    evaluate(task_of("vqa"), model, dataset, tmp_path)
    given = {
        **{"num_beams": 3, "max_len": 7, "min_len": 2, "prompt": PROMPT},
        **{"length_penalty": -1.0, "repetition_penalty": 1.5},
    }
    evaluate(task_of("vqa", **given), model, dataset, tmp_path)
    assert model.asked == [{"max_len": 10, "prompt": ""}, given], "the rest is the model's own"


def test_an_answer_of_more_tokens_at_least_than_at_most_is_refused():
    with pytest.raises(ConfigError, match=r"run\.min_len: is 15, more than max_len, 10 for answers"):
        task_of("vqa", min_len=15)


def test_ranking_chooses_from_the_datasets_list(tmp_path):
    dataset = Questions({1: ["no"] * 10}, listed=["yes", "no", "yes", "no"])
    model = Model()
    task = task_of("vqa", inference_method="rank", num_ans_candidates=7, prompt=PROMPT)
    assert evaluate(task, model, dataset, tmp_path)["accuracy"] == 100
    assert model.ranked == [(["yes", "no"], {"prompt": PROMPT, "num_candidates": 7})]


def test_ranking_without_a_list_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="split 'val' has none. Give the dataset an answer_list, or set"):
        evaluate(task_of("vqa", inference_method="rank"), Model(), Questions({1: ["no"]}), tmp_path)
    with pytest.raises(ConfigError, match="split 'val' has none"):  # before training
        task_of("vqa", inference_method="rank").check_split(Model(), Questions({1: ["no"]}), "val")


# ---- exact match


@pytest.mark.parametrize(
    ("name", "answer", "truth", "expected"),
    [
        ("gqa", "A Dog.", "dog", 100),
        ("gqa", "two", "2", 100),
        ("gqa", "two", "two", 0),  # the right answer is taken as it is written
        ("gqa", "t-shirt", "t-shirt", 0),
        ("gqa", "cat", "dog", 0),
        ("video_qa", "Arm  Wrestle.", "arm wrestle", 100),
        ("video_qa", "two", "two", 100),
        ("video_qa", "2", "two", 0),
        ("video_qa", "a dog", "dog", 0),
    ],
)
def test_exact_match(tmp_path, name, answer, truth, expected):
    metrics = evaluate(task_of(name), Model(answer), Questions({"q": [truth]}), tmp_path)
    assert metrics == {"accuracy": expected, "agg_metrics": expected}


def test_gqa_uploads_what_it_scores(tmp_path):
    evaluate(task_of("gqa"), Model("The Dog.", "two"), Questions({"201": ["dog"], 5: ["2"]}), tmp_path)
    assert written(tmp_path, "answers.json") == [
        {"questionId": "201", "prediction": "dog"},
        {"questionId": "5", "prediction": "2"},
    ]


@pytest.mark.parametrize("name", ["vqa", "gqa", "video_qa", "aok_vqa"])
def test_what_people_answered_is_asked_for_once(tmp_path, name):
    """It may be the answers to all questions of a large split."""
    dataset = Questions({1: ["a"] * 3, 2: ["b"] * 3})
    asked, answers = [], dataset.answers
    dataset.answers = lambda: asked.append(1) or answers()
    task, sample = task_of(name), {"text_input": ["question 1?"], "question_id": [1]}
    for _ in range(2):  # validations
        evaluate(task, Model("a", "b"), dataset, tmp_path)
        assert task.held_out(sample, dataset)["text_output"] == ["a"]
    assert asked == [1]
    assert task.held_out(sample, Questions({1: ["c"]}))["text_output"] == ["c"]


# ---- A-OKVQA


def test_aok_vqa_is_scored_in_both_settings(tmp_path):
    people = {"x": ["cab", "cab", "taxi"], "y": ["red"] * 10, "difficult": []}
    choices = {"x": ["train", "cab"], "y": ["red", "blue"], "difficult": ["one", "two", "three"]}
    dataset = Questions(people, choices=choices, right={"x": "cab", "y": "red", "difficult": "three"})
    model = Model("cab", "Red", "three")
    metrics = evaluate(task_of("aok_vqa", prompt=PROMPT), model, dataset, tmp_path)
    assert metrics == pytest.approx(
        {
            "accuracy_multiple_choice": 100 * 2 / 3,  # the model takes the last: cab, blue, three
            "accuracy_direct_answer": 100 * (2 / 3 + 0) / 2,  # by the letter, without the difficult one
            "agg_metrics": 100 / 3,
        }
    )
    assert model.ranked[0] == ([choices["x"], choices["y"]], {"prompt": PROMPT})
    assert written(tmp_path, "answers.json") == {
        "x": {"direct_answer": "cab", "multiple_choice": "cab"},
        "y": {"direct_answer": "Red", "multiple_choice": "blue"},
        "difficult": {"direct_answer": "three", "multiple_choice": "three"},
    }
    details = written(tmp_path, "metrics.json")
    assert (details["multiple_choice_questions"], details["direct_answer_questions"]) == (3, 2)


def test_a_question_without_choices_stands_beside_one_that_has_some(tmp_path):
    dataset = Questions({1: ["a"] * 3, 2: ["b"] * 3}, choices={2: ["a", "b"]}, right={2: "b"})
    model = Model("a", "b")
    metrics = evaluate(task_of("aok_vqa"), model, dataset, tmp_path)
    assert model.encodings == 1, "for both settings"
    assert metrics == {
        "accuracy_multiple_choice": 100,
        "accuracy_direct_answer": 100,
        "agg_metrics": 100,
    }
    assert "multiple_choice" not in written(tmp_path, "answers.json")["1"]


# ---- settings


def test_a_prompt_without_a_slot_is_refused_before_anything_is_read():
    with pytest.raises(ConfigError, match=r"'Answer:' \(run.prompt\) has 0 slots"):
        task_of("vqa", prompt="Answer:")


def test_base_forms_are_of_nouns_and_verbs_alone(tmp_path):
    def token(text, lemma, pos):
        return SimpleNamespace(text=text, lemma_=lemma, pos_=pos)

    documents = {
        "two dogs running": [
            token("two", "2", "NUM"),
            token("dogs", "dog", "NOUN"),
            token("running", "run", "VERB"),
        ],
        "better": [token("better", "well", "ADV")],
        "": [],
    }
    lemmatizer = Lemmatizer(lambda texts: [documents[text] for text in texts])
    assert lemmatizer(list(documents)) == ["two dog run", "better", ""]
    task = task_of("vqa")
    task.lemmatizer = lemmatizer
    dataset = Questions({1: ["2 dog run"] * 10})
    assert evaluate(task, Model("two dogs running"), dataset, tmp_path)["accuracy"] == 100


def test_without_spacy_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ConfigError, match=r'pip install "evlgen\[lemmatizer\]".*Or set it to false'):
        task_of("vqa", apply_lemmatizer=True)


def test_without_its_pipeline_it_is_said_how_to_get_it(monkeypatch):
    def load(name):
        raise OSError(f"[E050] Can't find model '{name}'.")

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    with pytest.raises(ConfigError, match="python -m spacy download en_core_web_sm"):
        task_of("vqa", apply_lemmatizer=True)


def test_base_forms_of_ranked_answers_are_refused():
    run = RunConfig(task="vqa", max_epoch=1, apply_lemmatizer=True, inference_method="rank")
    assert [key for key, _ in run.problems()] == ["apply_lemmatizer"]


def test_means_by_kind_leave_out_what_has_no_kind():
    assert means_by_kind({1: 1.0, 2: 0.0, 3: 1.0}, {1: "b", 2: "b", 3: ""}) == {"b": 50.0}


# ---- training


@pytest.fixture(scope="module")
def model(golden):
    cfg = load_model_file(golden / "evlgen_opt" / "model.yaml")
    return registry.get_model_class("evlgen_opt").from_config(cfg)


@pytest.fixture
def questions():
    image = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    return {"image": image, "text_input": ["what color?", "how many stars?"], "question_id": [1, 2]}


def test_one_answer_is_learned_after_the_question_as_it_is_asked(model, questions):
    samples = {**questions, "text_output": ["red", "two"]}
    out = task_of("vqa", prompt=PROMPT).train_step(model, samples)
    asked = [PROMPT.format(question) for question in questions["text_input"]]
    assert out["loss"].item() == model({**samples, "text_input": asked})["loss"].item()
    bare = task_of("vqa").train_step(model, samples)
    assert bare["loss"].item() == model(samples)["loss"].item() != out["loss"].item()


def test_all_answers_are_learned_by_their_weights(model, questions):
    answers, weights = [["red", "dark red"], ["two"]], [[0.7, 0.3], [1.0]]
    samples = {**questions, "answers": answers, "weights": weights}
    out = task_of("vqa", prompt=PROMPT).train_step(model, samples)
    expected = 0.0
    for row, (texts, shares) in enumerate(zip(answers, weights, strict=True)):
        for text, share in zip(texts, shares, strict=True):
            one = {
                "image": questions["image"][row : row + 1],
                "text_input": [PROMPT.format(questions["text_input"][row])],
                "text_output": [text],
            }
            alone = model(one)
            expected += share * alone["loss"].item() * alone["num_tokens"]
    assert out["loss"].item() == pytest.approx(expected / 2, rel=1e-5)
    assert out["num_tokens"] == 2, "batches weigh by their questions"


def test_samples_without_answers_are_named(model, questions):
    with pytest.raises(DataError, match="task vqa learns answers to questions, and these samples have none"):
        task_of("vqa").train_step(model, questions)


@pytest.mark.parametrize("train_answers", ["sample", "all"])
def test_a_project_trains_on_real_questions_and_ranks_their_answers(
    shared, write_project, tmp_path, monkeypatch, caplog, train_answers
):
    monkeypatch.setattr(question_answering, "caption_sheet", caption_sheet)
    monkeypatch.setenv("EVLGEN_CACHE", str(shared / "data" / "lavis_cache"))
    run = {
        "task": "vqa",
        "max_epoch": 1,
        "inference_method": "rank",
        "num_ans_candidates": 4,
        "prompt": PROMPT,
    }
    path = write_project(tmp_path, run=run)
    project = OmegaConf.load(path)
    project.datasets = {"coco_vqa": {"train_answers": train_answers}}
    OmegaConf.save(project, path)
    run_project(Config.load(path))
    assert "files of split 'val' are trained on too" in caplog.text  # as LAVIS trains on VQAv2
    (folder,) = (tmp_path / "output" / "latest" / "result").glob("val*")
    listed = json.loads((shared / "data/lavis_cache/coco/annotations/answer_list.json").read_text())
    assert {row["answer"] for row in written(folder, "answers.json")} <= set(listed)
    assert written(folder, "metrics.json")["questions"] == 4
    assert (folder / "answers.png").stat().st_size > 1000
