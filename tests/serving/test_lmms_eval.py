"""The adapter for lmms-eval, driven by the real harness."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install 'evlgen[lmms]'")

from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.models.registry_v2 import ModelRegistryV2  # noqa: E402

from evlgen.common.errors import ConfigError  # noqa: E402
from evlgen.datasets.shapes.captions import captions  # noqa: E402
from evlgen.datasets.shapes.world import draw, scene  # noqa: E402
from evlgen.models.zoo import load_model  # noqa: E402
from evlgen.serving import lmms_eval as adapter  # noqa: E402
from evlgen.tasks.metrics import score_captions  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
TASKS = ROOT / "run_scripts" / "lmms"
GREEDY = {"max_new_tokens": 12, "temperature": 0, "do_sample": False, "until": ["\n"]}


@pytest.fixture(scope="module")
def model():
    return load_model("evlgen_opt")


@pytest.fixture(scope="module")
def images():
    return [Image.fromarray(draw(scene("test", place))) for place in range(5)]


@pytest.fixture
def harnessed(images):
    def make(visuals=None, **arguments):
        made = adapter.EVLGen(**{"batch_size": 2, **arguments})
        made.task_dict = {"shapes": {"test": visuals or [[image] for image in images]}}
        return made

    return make


def requests(kind, *pairs):
    """Requests about the samples 0, 1, ..; ``pairs`` are (place, text, second argument)."""
    return [
        Instance(
            kind,
            arguments=(text, second, lambda visuals: visuals, place, "shapes", "test"),
            idx=0,
            metadata={"task": "shapes", "doc_id": place, "repeats": 1},
        )
        for place, text, second in pairs
    ]


def generate(made, *pairs):
    return made.generate_until(requests("generate_until", *pairs))


def score(made, *pairs):
    return [result.text for result in made.loglikelihood(requests("loglikelihood", *pairs))]


def test_the_package_names_the_adapter_by_entry_point(tmp_path, monkeypatch):
    tomllib = pytest.importorskip("tomllib")
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    folder = tmp_path / "evlgen_here-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: evlgen_here\nVersion: 0\n")
    lines = [f"[{group}]\n{name} = {value}\n" for group, of in groups.items() for name, value in of.items()]
    (folder / "entry_points.txt").write_text("".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    registry = ModelRegistryV2()
    registry.load_entrypoint_manifests(overwrite=True)
    assert registry.get_model_class("evlgen") is adapter.EVLGen


def test_texts_are_the_models_own_in_the_order_of_the_requests(harnessed, model, images):
    made = harnessed()
    expected = model.generate(images, num_beams=1, max_length=12)
    asked = [(place, "", GREEDY) for place in (3, 0, 4, 1, 2)]
    assert generate(made, *asked) == [expected[place] for place, _, _ in asked]
    prompts = ["a red", "there is", "two", "a", "small"]
    continued = model.generate({"image": images, "prompt": prompts}, num_beams=3, max_length=8)
    how = {"max_new_tokens": 8, "num_beams": 3}
    asked = [(place, prompts[place], how if place % 2 else GREEDY) for place in range(5)]
    assert generate(made, *asked)[1::2] == continued[1::2]
    cut = expected[0].split(" ")[1]
    assert generate(made, (0, "<image>", {**GREEDY, "until": cut})) == [expected[0].split(cut)[0]]


def test_a_text_ends_where_the_language_model_has_no_more_room(harnessed, model):
    assert len(generate(harnessed(), (0, "", {"max_new_tokens": 10**6}))) == 1


def test_scores_are_log_likelihoods_and_what_greedy_search_writes_is_known(harnessed, model, images):
    made = harnessed(batch_size=3)
    (written,) = model.generate(images[:1], num_beams=1, min_length=0, max_length=30)
    choices = [captions(scene("test", place))[0] for place in range(4)]
    found = score(made, *((0, "", f" {text}") for text in [*choices, written]))
    pixels = torch.stack([made._questions(requests("", (0, "", "")))[0].images[0]] * 5)
    losses = model.sample_losses({"image": pixels, "text_input": [*choices, written]})["losses"]
    assert [loss for loss, _ in found] == pytest.approx(losses.tolist(), rel=1e-4)
    assert [is_greedy for _, is_greedy in found] == [text == written for text in [*choices, written]]
    best = min(range(4), key=lambda place: found[place][0])
    assert [choices[best]] == model.rank_answers({"image": images[:1], "text_input": [""]}, choices)
    of_document = requests("loglikelihood", (1, "", lambda visuals: choices[1]))
    assert made.loglikelihood(of_document)[0].text == pytest.approx(
        score(made, (1, "", choices[1]))[0], rel=1e-4
    )


def test_samples_of_several_images_of_none_and_conversations(harnessed, model, images):
    made = harnessed([[images[0], images[1]], [], [images[2]]])
    two = "first <image> then <image> :"
    texts = generate(made, (0, two, GREEDY), (1, "a red", GREEDY), (2, "a", GREEDY))
    assert len(texts) == 3 and texts[2:] == model.generate(
        {"image": [images[2]], "prompt": ["a"]}, num_beams=1, max_length=12
    )
    found = score(made, (0, two, "a red circle"), (1, "a red", "circle"), (2, "a", "red circle"))
    assert all(loss > 0 for loss, _ in found)
    alone = score(harnessed([[images[0], images[1]], []], batch_size=1), (0, two, "a red circle"))
    assert alone[0] == pytest.approx(found[0], rel=1e-4)
    talk = harnessed([[images[0]]], chat=True)
    messages = [{"role": "user", "content": [{"type": "image", "image": images[0]}, "what is this"]}]
    assert generate(talk, (0, "what is this", GREEDY)) == [model.chat(messages, max_length=12)]
    assert score(talk, (0, "what is this", "a circle"))[0][0] > 0


def test_videos_as_files_and_frames(harnessed, images, tmp_path):
    path = tmp_path / "two.gif"
    images[0].save(path, save_all=True, append_images=images[1:3], duration=100, loop=0)
    project = ROOT / "evlgen" / "configs" / "models" / "evlgen_video_opt" / "shapes.yaml"
    made = harnessed([[images[:3]], [images[0]]], cfg_path=str(project), num_frames=3)
    texts = generate(made, (0, "", GREEDY), (1, "", GREEDY))
    frames = [made._questions(requests("", (place, "", "")))[0].images[0].shape[1] for place in (0, 1)]
    assert frames == [3, 1] and all(isinstance(text, str) for text in texts)
    with pytest.raises(ConfigError, match="a model of images, and the conversation has a video"):
        generate(harnessed([[images[:3]]]), (0, "", GREEDY))


def test_wrong_arguments_are_named(harnessed):
    with pytest.raises(ConfigError, match="no argument 'num_frame'. Did you mean 'num_frames'"):
        harnessed(num_frame=3)
    with pytest.raises(ConfigError, match="batch_size auto"):
        harnessed(batch_size="auto")
    with pytest.raises(ConfigError, match="one round"):
        harnessed().generate_until_multi_round([])


def test_the_harness_finds_the_same_cider_and_accuracy_as_we_do(tmp_path, monkeypatch, model):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    spec = importlib.util.spec_from_file_location("make_table", TASKS / "make_table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    images, texts = {}, {}
    for place in range(12):
        Image.fromarray(draw(scene("test", place))).save(tmp_path / "image.png")
        images[f"{place}.png"] = (tmp_path / "image.png").read_bytes()
        texts[f"{place}.png"] = captions(scene("test", place))
    table.write_table(tmp_path, texts, images)
    made = adapter.EVLGen(batch_size=5)
    found = simple_evaluate(
        made,
        tasks=["table_captions", "table_choices"],
        task_manager=TaskManager("ERROR", include_path=str(TASKS / "tasks"), include_defaults=False),
        log_samples=False,
        bootstrap_iters=0,
    )["results"]
    opened = [Image.fromarray(draw(scene("test", place))) for place in range(12)]
    written = dict(enumerate(model.generate(opened, num_beams=1, max_length=24)))
    ours = score_captions(dict(enumerate(texts.values())), written, ["cider"]).values["CIDEr"]
    assert found["table_captions"]["CIDEr,none"] == pytest.approx(ours, rel=1e-6)
    lists = list(table.choices_of(texts).values())
    ranked = model.rank_answers({"image": opened, "text_input": [""] * 12}, lists)
    right = [answer == own[0] for answer, own in zip(ranked, texts.values(), strict=True)]
    assert found["table_choices"]["acc,none"] == pytest.approx(sum(right) / 12)
    assert "table_captions" not in sys.modules
