"""Questions about images and videos: every published layout, and what is wrong with some records."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from evlgen.common.errors import ConfigError, DataError
from evlgen.common.registry import registry
from evlgen.config.schema import check_section
from evlgen.datasets.base_dataset import BadRecord, Skipped
from evlgen.datasets.question_annotations import coco_2014_name, read_questions
from evlgen.datasets.question_builders import QuestionBuilder
from evlgen.files.io import PACKAGE_ROOT

DATASETS = ("coco_vqa", "vg_vqa", "ok_vqa", "aok_vqa", "gqa", "msrvtt_qa", "msvd_qa")
SIZED = {
    role: {"name": "blip_image_eval", "image_size": 16} for role in ("train", "eval")
}  # of videos too: what is tested here does not open them
NINE_YES = ["yes"] * 9 + ["no"]


def builder(name: str, root: Path, **changes) -> QuestionBuilder:
    """The builder of a dataset with its own YAML, and changes to it."""
    cls = registry.get_builder_class(name)
    section = OmegaConf.load(PACKAGE_ROOT / cls.DEFAULT_CONFIG).datasets[name]
    section.vis_processor = SIZED
    section = OmegaConf.to_container(OmegaConf.merge(section, changes))
    return cls(
        name=name,
        cache_root=root,
        **check_section(section, cls, f"datasets.{name}", ignore=cls.FROM_FRAMEWORK),
    )


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def paint(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), "red").save(path)


def texts(sample: dict) -> dict:
    """A sample without its pixels."""
    assert sample["image"].shape == (3, 16, 16)
    return {key: value for key, value in sample.items() if key != "image"}


def read(tmp_path: Path, *contents, **options) -> list:
    files = [write(tmp_path / f"{i}.json", content) for i, content in enumerate(contents)]
    return list(read_questions(files, **options).records)


@pytest.fixture
def vqa(tmp_path: Path) -> Path:
    """A data root with VQAv2 as LAVIS lays it out: one question to learn in each file, two to answer."""
    folder = tmp_path / "coco/annotations"
    image = coco_2014_name("val2014", 42)
    rows = [{"question_id": 1, "question": "Is it red?", "image": image}]
    rows += [{"question_id": 2, "question": "How many?", "image": image}]
    write(folder / "vqa_train.json", [{**rows[0], "answer": NINE_YES, "dataset": "vqa"}])
    write(folder / "vqa_val.json", [{**rows[1], "answer": ["2"] * 10, "dataset": "vqa"}])
    write(folder / "vqa_val_eval.json", rows)
    write(folder / "vqa_test.json", rows)
    write(folder / "answer_list.json", ["yes", "no", "2"])
    write(folder / "v2_questions.json", official_questions())
    write(folder / "v2_mscoco_val2014_annotations.json", official_answers())
    paint(tmp_path / "coco/images" / image)
    return tmp_path


def official_questions() -> dict:
    asked = {1: "Is it red?", 2: "How many?"}
    questions = [{"image_id": 42, "question": text, "question_id": i} for i, text in asked.items()]
    return {"task_type": "Open-Ended", "data_subtype": "val2014", "questions": questions}


def official_answers(**more) -> dict:
    given = {1: (NINE_YES, "yes/no", "is it"), 2: (["2"] * 10, "number", "how many")}
    annotations = [
        {
            "question_id": key,
            "image_id": 42,
            "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(answers, 1)],
            "answer_type": answer_type,
            "question_type": question_type,
        }
        for key, (answers, answer_type, question_type) in given.items()
    ]
    return {"annotations": annotations, **more}


def test_training_files_are_read_one_after_the_other_and_an_answer_is_drawn_as_often_as_given(vqa) -> None:
    dataset = builder("coco_vqa", vqa).get_split("train")
    torch.manual_seed(0)
    drawn = Counter(dataset.load_text(0)["text_output"] for _ in range(300))
    assert set(drawn) == {"yes", "no"} and 15 <= drawn["no"] <= 45  # 30 expected
    torch.manual_seed(3)
    first = dataset[0]["text_output"]
    torch.manual_seed(3)
    assert dataset[0]["text_output"] == first
    assert texts(dataset[1]) == {
        "text_input": "how many?",
        "text_output": "2",
        "question_id": 2,
        "instance_id": "1",
    }


def test_all_answers_come_with_the_share_of_people_who_gave_them(vqa) -> None:
    sample = builder("coco_vqa", vqa, train_answers="all").get_split("train")[0]
    assert sample["answers"] == ["yes", "no"] and sample["weights"] == pytest.approx([0.9, 0.1])
    assert "text_output" not in sample


def test_evaluation_has_no_answers_in_its_samples_and_scores_against_the_official_ones(vqa) -> None:
    dataset = builder("coco_vqa", vqa).get_split("val")
    assert texts(dataset[0]) == {
        "text_input": "is it red?",
        "question_id": 1,
        "image_id": "val2014/COCO_val2014_000000000042.jpg",
        "instance_id": "0",
    }
    assert dataset.answers() == {1: NINE_YES, 2: ["2"] * 10}
    assert dataset.answer_types() == {1: "yes/no", 2: "number"}
    assert dataset.question_types() == {1: "is it", 2: "how many"}
    assert dataset.answer_list() == ["yes", "no", "2"]


@pytest.mark.parametrize("hidden", [{}, {"answer": ""}, {"answer": ["", " "]}, {"answer": None}])
def test_a_split_without_answers_is_asked_and_not_scored(vqa, hidden) -> None:
    path = vqa / "coco/annotations/vqa_test.json"
    write(path, [{**row, **hidden} for row in json.loads(path.read_text())])
    dataset = builder("coco_vqa", vqa).get_split("test")
    assert len(dataset) == 2 and dataset.answers() == {}


@pytest.mark.parametrize("role", ["train", "val"])
def test_official_pair_is_read_in_place_of_a_list(vqa, role: str) -> None:
    pair = ["v2_mscoco_val2014_annotations.json", "v2_questions.json"]
    storage = [f"coco/annotations/{name}" for name in pair]
    made = builder("coco_vqa", vqa, build_info={"annotations": {role: {"storage": storage}}})
    dataset = made.get_split(role)
    assert [dataset[i]["question_id"] for i in range(2)] == [1, 2]
    assert dataset.answers() == {1: NINE_YES, 2: ["2"] * 10}
    assert role == "train" or dataset[0]["image_id"] == 42


def test_lavis_list_of_four_files_asks_every_question_once_in_any_order(vqa) -> None:
    names = ["v2_questions.json", "answer_list.json", "vqa_val_eval.json"]
    names += ["v2_mscoco_val2014_annotations.json"]
    storage = [f"coco/annotations/{name}" for name in names]
    info = {"annotations": {"val": {"storage": storage}}, "ground_truth": {"val": {"storage": "none.json"}}}
    dataset = builder("coco_vqa", vqa, build_info=info, answer_list={"storage": "none.json"}).get_split("val")
    assert len(dataset) == 2 and not any(isinstance(r, BadRecord) for r in dataset.records)
    assert dataset.answers()[1] == NINE_YES and dataset.answer_list() == ["yes", "no", "2"]


def test_a_list_of_answers_that_is_not_there_is_named_when_it_is_asked_for(vqa) -> None:
    (vqa / "coco/annotations/answer_list.json").unlink()
    dataset = builder("coco_vqa", vqa).get_split("val")
    with pytest.raises(
        DataError, match=r"list of answers.*answer_list\.json\. Download https://\S+/answer_list"
    ):
        dataset.answer_list()


def test_ok_vqa_question_types_have_their_names(vqa) -> None:
    truth = official_answers(question_types={"is it": "Vehicles", "how many": "Sports"})
    write(vqa / "okvqa/annotations/mscoco_val2014_annotations.json", truth)
    rows = json.loads((vqa / "coco/annotations/vqa_val_eval.json").read_text())
    write(vqa / "okvqa/annotations/vqa_val_eval.json", rows)
    dataset = builder("ok_vqa", vqa).get_split("test")
    assert dataset.question_types() == {1: "Vehicles", 2: "Sports"}


def test_one_answer_of_visual_genome_weighs_a_fifth_as_published(tmp_path) -> None:
    rows = [{"image": "VG_100K/1.jpg", "question": "What is it?", "answer": " a red\nbus ", "dataset": "vg"}]
    write(tmp_path / "vg/annotations/vg_qa.json", rows)
    paint(tmp_path / "vg/images/VG_100K/1.jpg")
    assert texts(builder("vg_vqa", tmp_path, train_answers="all").get_split("train")[0]) == {
        "text_input": "what is it?",
        "answers": ["a red bus"],
        "weights": [0.2],
        "question_id": 0,
        "instance_id": "0",
    }


def aokvqa(**changes) -> dict:
    return {
        "split": "val",
        "image_id": 299207,
        "question_id": "22Mex",
        "question": "What awaits he?",
        "choices": ["skateboarder", "train", "delivery", "cab"],
        "correct_choice_idx": 3,
        "direct_answers": ["cab"] * 7 + ["taxi"] * 3,
        "difficult_direct_answer": False,
        **changes,
    }


def test_aok_vqa_has_choices_and_direct_answers_but_for_those_the_publisher_does_not_score(tmp_path) -> None:
    rows = [aokvqa(), aokvqa(question_id="hard", difficult_direct_answer=True)]
    for split in ("train", "val"):
        write(tmp_path / f"aokvqa/annotations/aokvqa_v1p0_{split}.json", rows)
    paint(tmp_path / "coco/images/val2017/000000299207.jpg")
    dataset = builder("aok_vqa", tmp_path).get_split("val")
    assert texts(dataset[0]) == {
        "text_input": "what awaits he?",
        "question_id": "22Mex",
        "image_id": 299207,
        "choices": ["skateboarder", "train", "delivery", "cab"],
        "instance_id": "0",
    }
    assert dataset.correct_choices() == {"22Mex": "cab", "hard": "cab"}
    assert dataset.answers() == {"22Mex": ["cab"] * 7 + ["taxi"] * 3}
    learned = builder("aok_vqa", tmp_path, train_answers="all").get_split("train")
    assert learned[1]["answers"] == ["cab", "taxi"] and learned[1]["weights"] == pytest.approx([0.7, 0.3])


def test_aok_vqa_of_the_hidden_test_has_choices_alone(tmp_path) -> None:
    row = aokvqa(image="test2017/7.jpg")
    del row["correct_choice_idx"], row["direct_answers"]
    write(tmp_path / "aokvqa/annotations/aokvqa_v1p0_test.json", [row])
    paint(tmp_path / "coco/images/test2017/7.jpg")
    dataset = builder("aok_vqa", tmp_path).get_split("test")
    assert len(dataset[0]["choices"]) == 4 and dataset.correct_choices() == dataset.answers() == {}


GQA = {"imageId": "n42", "question": "Is it red?", "answer": "yes", "types": {"structural": "verify"}}


def test_gqa_is_read_as_lavis_and_as_stanford_publishes_it(tmp_path) -> None:
    write(tmp_path / "gqa/annotations/val_balanced_questions.json", {"0123": GQA})
    listed = {"image": "n42.jpg", "question": "Is it red?", "question_id": "0123", "answer": "yes"}
    write(tmp_path / "gqa/annotations/testdev_balanced_questions.json", [listed])
    paint(tmp_path / "gqa/images/n42.jpg")
    made = builder("gqa", tmp_path)
    stanford, lavis = made.get_split("val"), made.get_split("testdev")
    assert stanford[0]["question_id"] == lavis[0]["question_id"] == "0123"
    assert stanford.answers() == lavis.answers() == {"0123": ["yes"]}
    assert stanford.question_types() == {"0123": "verify"}
    assert (stanford[0]["image_id"], lavis[0]["image_id"]) == ("n42", "n42.jpg")


@pytest.mark.parametrize("name", ["msrvtt_qa", "msvd_qa"])
def test_videos_have_one_answer_and_the_list_is_ordered_by_its_numbers(tmp_path, name: str) -> None:
    folder = tmp_path / name.removesuffix("_qa")
    rows = [{"video": "video3.mp4", "question": "what is it", "answer": "pool", "question_id": 7}]
    write(folder / "annotations/qa_test.json", rows)
    write(folder / "annotations/qa_ans2label.json", {"pool": 1, "makeup": 0})
    (folder / "videos").mkdir()
    dataset = builder(name, tmp_path).get_split("test")
    assert dataset.load_text(0) == {
        "text_input": "what is it",
        "question_id": 7,
        "image_id": "video3.mp4",
        "instance_id": "0",
    }
    assert dataset.answers() == {7: ["pool"]} and dataset.answer_list() == ["makeup", "pool"]


def test_list_of_answers_among_the_splits_as_lavis_has_it_is_no_split(tmp_path) -> None:
    path = write(tmp_path / "list.json", {"no": 1, "yes": 0})
    annotations = {"ans2label": {"storage": str(path)}}
    made = builder("msrvtt_qa", tmp_path, build_info={"annotations": annotations}, answer_list=None)
    assert made.splits == ["train", "val", "test"]
    write(tmp_path / "msrvtt/annotations/qa_test.json", [{"video": "v", "question": "q", "answer": "yes"}])
    (tmp_path / "msrvtt/videos").mkdir()
    assert made.get_split("test").answer_list() == ["yes", "no"]


ROW = {"image": "a.jpg", "question": "red?", "answer": "yes", "question_id": 1}


@pytest.mark.parametrize(
    ("row", "cause", "reason"),
    [
        ("x", "bad record", r'must be a mapping with \'image\' and \'question\', not "x"'),
        ({"question": "q"}, "bad record", r"has no 'image' and no 'video'; it is a mapping with 'question'"),
        ({**ROW, "image": 3}, "bad record", r"must have a file name as 'image', not 3"),
        ({"image": "a.jpg"}, "bad record", r"has no 'question'"),
        ({**ROW, "question": 3}, "bad record", r"must have text as 'question', not 3"),
        ({**ROW, "question": " "}, "empty question", r"empty question"),
        ({**ROW, "question": "a\0"}, "bad record", r"holds a null byte in 'question'"),
        ({**ROW, "answer": ["3", True]}, "bad record", r"must have text as an answer, not true"),
        ({**ROW, "question_id": True}, "bad record", r"question id true"),
        ({**ROW, "choices": []}, "bad record", r"list of texts as 'choices', not \[\]"),
        (
            {**ROW, "choices": ["a"], "correct_choice_idx": 1},
            "bad record",
            r"1 choices and the right one is 1",
        ),
        (ROW, "duplicate id", r"question_id 1 is there a second time"),
    ],
)
def test_a_bad_record_is_skipped_in_its_own_place_and_says_why(
    tmp_path, row, cause: str, reason: str
) -> None:
    first, bad, last = read(tmp_path, [ROW, row, {**ROW, "question_id": "last"}])
    assert (first["question_id"], last["question_id"]) == (1, "last")
    assert bad.cause == cause and bad.id == f"record 1 of {tmp_path / '0.json'}"
    assert re.search(reason, bad.reason)


def test_in_training_ids_may_repeat_and_every_record_needs_an_answer(tmp_path) -> None:
    rows = [ROW, ROW, {**ROW, "answer": [" "]}, {"image": "a.jpg", "question": "q"}]
    records = read(tmp_path, rows, scored=False)
    assert [r.cause for r in records if isinstance(r, BadRecord)] == ["no answer", "no answer"]
    assert records[1]["question_id"] == 1


def test_a_question_without_answers_among_those_given_is_skipped_and_named(tmp_path) -> None:
    truth = write(tmp_path / "truth.json", {"annotations": official_answers()["annotations"][:1]})
    first, second = read(tmp_path, official_questions(), truth=truth)
    assert first["answers"] == NINE_YES
    assert (second.cause, second.id) == ("no answer", f"question 1 of {tmp_path / '0.json'}")


def test_a_bad_annotation_of_answers_is_left_out_and_named_and_its_question_skipped(tmp_path, caplog) -> None:
    annotations = official_answers()["annotations"]
    del annotations[1]["answers"]
    truth = write(tmp_path / "truth.json", {"annotations": [*annotations, "x"]})
    first, second = read(tmp_path, official_questions(), truth=truth)
    assert first["answers"] == NINE_YES and second.cause == "no answer"
    assert re.search(r"left out: 2, such as annotation 1 of .*truth\.json: it must have", caplog.text)


@pytest.mark.parametrize("own", [int, str])
@pytest.mark.parametrize("theirs", [int, str])
def test_questions_and_answers_find_each_other_by_ids_as_number_or_text(tmp_path, own, theirs) -> None:
    questions, answers = official_questions(), official_answers()
    for row in questions["questions"]:
        row.update(question_id=own(row["question_id"]), image_id=own(row["image_id"]))
    for row in answers["annotations"]:
        row["question_id"] = theirs(row["question_id"])
    listed = [{**ROW, "question_id": 1}]  # LAVIS's list of the same questions
    records = read(tmp_path, listed, questions, answers)
    assert [(r["question_id"], r["answers"][0]) for r in records] == [(theirs(1), "yes"), (theirs(2), "2")]
    assert records[1]["visual"] == "val2014/COCO_val2014_000000000042.jpg"


def test_a_question_in_the_official_layout_keeps_the_name_of_its_own_image(tmp_path) -> None:
    questions = official_questions()
    questions["questions"][0]["image"] = "mine/1.jpg"
    assert [r["visual"] for r in read(tmp_path, questions)] == ["mine/1.jpg", coco_2014_name("val2014", 42)]


def test_numbers_among_answers_and_choices_are_the_texts_that_they_are(tmp_path) -> None:
    row = {**ROW, "answer": [3, "3", 0.5], "choices": [2, 3], "correct_choice_idx": 1}
    (record,) = read(tmp_path, [row])
    assert record["answers"] == ["3", "3", "0.5"] and record["correct_choice"] == "3"


def test_bad_records_come_out_as_skipped_samples(vqa) -> None:
    rows = json.loads((vqa / "coco/annotations/vqa_test.json").read_text())
    write(vqa / "coco/annotations/vqa_test.json", [rows[0], {}, {**rows[1], "question_id": "other"}])
    dataset = builder("coco_vqa", vqa).get_split("test")
    batch = dataset.collater([dataset[i] for i in range(3)])
    assert batch["question_id"] == [1, "other"] and batch["instance_id"] == ["0", "2"]
    assert [(s.index, s.cause) for s in batch["skipped"]] == [(1, "bad record")]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            [[{"image": "a.jpg", "caption": "x"}] * 3],
            r"record 0 of .*0\.json: it has no 'question'.*So it is with all 3",
        ),
        ([{"images": []}], r"annotation .*0\.json must be a list of records with .*mapping with 'images'"),
        ([[]], r"annotation .*0\.json has no records"),
        ([["yes", "no"]], r"0\.json: no questions are in there, only answers"),
        (
            [[ROW], {"annotations": [{"question_id": 1}]}],
            r"annotation 0 of .*1\.json: it must have a 'question_id'.*So it is with all",
        ),
        ([[ROW], {"annotations": ["x"]}], r"annotation 0 of .*1\.json: it must have a 'question_id'"),
        ([[ROW], {"annotations": []}], r"1\.json lists no annotations"),
        (
            [{"questions": [{"image_id": 42, "question": "red?", "question_id": 1}]}],
            r"question 0 of .*no 'image' and no 'video'; COCO's follows from the file's 'data_subtype'",
        ),
    ],
)
def test_a_file_of_another_layout_is_refused_by_name(tmp_path, contents: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, *contents)


def test_ground_truth_of_another_layout_is_refused_by_name(tmp_path) -> None:
    truth = write(tmp_path / "truth.json", [ROW])
    with pytest.raises(DataError, match=r"ground truth .*truth\.json must be .*annotations"):
        read(tmp_path, [ROW], truth=truth)


def test_annotations_from_an_address_do_not_lead_out_of_the_image_folder(vqa) -> None:
    rows = json.loads((vqa / "coco/annotations/vqa_test.json").read_text())
    write(vqa / "coco/annotations/vqa_test.json", [{**rows[0], "image": "../secret.jpg"}])
    with pytest.raises(DataError, match=r"refused.*'\.\./secret\.jpg' leads out"):
        builder("coco_vqa", vqa).get_split("test")


def test_an_image_folder_that_is_missing_is_named_before_anything_is_read(vqa) -> None:
    (vqa / "coco/images/val2014").rename(vqa / "elsewhere")
    with pytest.raises(DataError, match=r"val2014 is missing: 2 of 2 records .*evlgen download vqav2"):
        builder("coco_vqa", vqa).get_split("val")


@pytest.mark.parametrize("name", DATASETS)
def test_what_is_missing_is_said_with_the_command_that_gets_it(tmp_path, name: str) -> None:
    made = builder(name, tmp_path)
    lines = made.missing()
    assert len(lines) == sum(2 if split == "train" and name == "coco_vqa" else 1 for split in made.splits) + 1
    assert all("EVLGEN_CACHE" in line for line in lines)
    assert all("Run `python -m evlgen download " in line for line in lines[:-1])


def test_wrong_keys_are_named() -> None:
    with pytest.raises(ConfigError, match=r"datasets\.coco_vqa\.train_answers.*'sample' or 'all'"):
        builder("coco_vqa", Path("nowhere"), train_answers="every")
    with pytest.raises(ConfigError, match=r"datasets\.coco_vqa\.answer_weight.*more than 0"):
        builder("coco_vqa", Path("nowhere"), answer_weight=0)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("coco_vqa", {"train": 20, "val": 4, "test": 4}),
        ("ok_vqa", {"train": 16, "test": 4}),
        ("gqa", {"train": 16, "val": 4, "testdev": 4}),
        ("msrvtt_qa", {"train": 3, "val": 2, "test": 2}),
    ],
)
def test_real_files_in_published_layout(shared, name: str, sizes: dict[str, int]) -> None:
    made = builder(name, shared / "data/lavis_cache")
    for split, size in sizes.items():
        dataset = made.get_split(split)
        assert len(dataset) == size and not any(isinstance(r, BadRecord) for r in dataset.records)
        if name != "msrvtt_qa":  # whose processor of videos is not the one of this file
            assert not isinstance(dataset[0], Skipped) and isinstance(dataset[0]["text_input"], str)
    if name != "coco_vqa":
        assert set(dataset.answers()) == {r["question_id"] for r in dataset.records}
