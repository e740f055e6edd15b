"""What generation does by itself belongs to the architecture; a task passes on what the user set."""

from __future__ import annotations

import pytest
import torch

from evlgen.common.registry import registry
from evlgen.config.config import load_model_config
from evlgen.config.run_config import RunConfig

# lavis/models/blip2_models: (length, repetition) of captions, and of answers
PUBLISHED = {
    "blip2_opt": ((1.0, 1.0), (0.0, 1.0)),
    "blip2_t5": ((1.0, 1.0), (-1.0, 1.0)),
    "blip2_vicuna": ((1.0, 1.5), (0.0, 1.5)),
    "evlgen_opt": ((1.0, 1.0), (0.0, 1.0)),
    "evlgen_causal": ((1.0, 1.0), (0.0, 1.0)),
    "evlgen_vicuna": ((1.0, 1.5), (0.0, 1.5)),
    "evlgen_video_opt": ((1.0, 1.0), (0.0, 1.0)),
    "evlgen_video_vicuna": ((1.0, 1.5), (0.0, 1.5)),
}


@pytest.fixture(scope="module")
def parts(model_folder, llama_folder, seq2seq_folder):
    """A small ``model`` section of an architecture, without a model type."""

    def section(arch: str, **changes):
        shapes = load_model_config("evlgen_opt", "shapes")
        language = {
            "seq2seq": lambda: seq2seq_folder("t5"),
            "vicuna": lambda: llama_folder("tokenizer.json"),
        }.get(registry.get_model_class(arch).LANGUAGE_MODEL, lambda: model_folder("opt"))
        return {
            "arch": arch,
            "vision": dict(shapes.vision),
            "connector": dict(shapes.connector),
            "language": {"name": str(language()), "precision": "fp32"},
            **changes,
        }

    return section


@pytest.fixture
def record(monkeypatch):
    """Writes down what a model's language model is asked for, and lets it answer."""

    def watch(model):
        seen, generate = [], model.language.generate

        def noted(soft_prompts, prompts, **options):
            seen.append(options)
            return generate(soft_prompts, prompts, **options)

        monkeypatch.setattr(model.language, "generate", noted)
        return seen

    return watch


def penalties(options) -> tuple[float, float]:
    return options["length_penalty"], options["repetition_penalty"]


def samples(**more):
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return {"image": image, "image_id": [1, 2], "instance_id": [0, 1], "question_id": [1, 2], **more}


QUESTIONS = {"text_input": ["what color is it?", "how many?"]}


@pytest.mark.parametrize("arch", ["blip2_opt", "blip2_t5", "blip2_vicuna"])
def test_an_architectures_defaults_are_the_published_ones(arch, parts, record):
    model = registry.get_model_class(arch).from_config(parts(arch))
    seen = record(model)
    run = RunConfig("captioning", max_epoch=1, max_len=3)
    for task, batch in (("captioning", samples()), ("vqa", samples(**QUESTIONS))):
        registry.get_task_class(task)(run).valid_step(model, batch)
    assert tuple(map(penalties, seen)) == PUBLISHED[arch]
    assert [options["num_beams"] for options in seen] == [5, 5]
    assert [options["min_length"] for options in seen] == [1, 1]

    seen.clear()
    own = RunConfig("vqa", max_epoch=1, max_len=3, num_beams=2, length_penalty=0.5, repetition_penalty=1.2)
    for task, batch in (("captioning", samples()), ("vqa", samples(**QUESTIONS))):
        registry.get_task_class(task)(own).valid_step(model, batch)
    assert [penalties(options) for options in seen] == [(0.5, 1.2)] * 2
    model.predict_answers(samples(**QUESTIONS), max_len=3, length_penalty=0, repetition_penalty=1.0)
    assert penalties(seen[-1]) == (0, 1.0)


def test_a_config_may_say_otherwise(parts, record):
    generation = {"answer_length_penalty": 0.5, "repetition_penalty": 1.1}
    model = registry.get_model_class("blip2_t5").from_config(parts("blip2_t5", generation=generation))
    seen = record(model)
    model.predict_answers(samples(**QUESTIONS), max_len=3)
    model.generate(samples(), max_length=3)
    assert [penalties(options) for options in seen] == [(0.5, 1.1), (1.0, 1.1)]


@pytest.mark.parametrize("arch", PUBLISHED)
def test_every_types_yaml_says_what_its_architecture_does(arch):
    cls = registry.get_model_class(arch)
    own = cls.GENERATION
    assert PUBLISHED[arch] == (
        (own.length_penalty, own.repetition_penalty),
        (own.answer_length_penalty, own.repetition_penalty),
    )
    for model_type in cls.MODEL_TYPES:
        shown = load_model_config(arch, model_type).get("generation", {})
        for key, value in shown.items():
            assert value in (None, getattr(own, key)), (model_type, key)
        if own != registry.get_model_class("evlgen_opt").GENERATION:
            assert shown, "what differs from transformers' own defaults is in the YAML"


def test_a_model_of_the_users_own_keeps_its_defaults():
    class Model:
        def generate(self, samples, num_beams=2, max_length=9, min_length=3, length_penalty=7.0):
            return [f"{num_beams} {min_length} {length_penalty}"] * 2

        def predict_answers(self, samples, num_beams=2, max_len=9, min_len=3, prompt="", length_penalty=7.0):
            return [f"{num_beams} {min_len} {length_penalty}"] * 2

    run = RunConfig("captioning", max_epoch=1)
    rows = registry.get_task_class("captioning")(run).valid_step(Model(), samples())
    assert [row["caption"] for row in rows] == ["2 3 7.0"] * 2
    rows = registry.get_task_class("vqa")(run).valid_step(Model(), samples(**QUESTIONS))
    assert [row["answer"] for row in rows] == ["2 3 7.0"] * 2
