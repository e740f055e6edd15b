"""Texts are measured as models read them, without their weights."""

from __future__ import annotations

import dataclasses

import pytest

from evlgen.commands.data_check import _measured
from evlgen.common.registry import registry
from evlgen.config.config import load_model_config
from evlgen.config.run_config import RunConfig
from evlgen.config.schema import build_dataclass
from evlgen.models.language import build_language_model
from evlgen.models.text_lengths import TextLength, WordLengths

QUESTION, ANSWER = "what color is the circle?", "a blue square"


def config(arch: str = "evlgen_opt", **changes):
    """The bundled model's section, as the class has it."""
    cls = registry.get_model_class(arch)
    section = load_model_config(
        arch, "shapes", {"language": {"precision": "fp32"}} if arch != "blip2" else {}
    )
    section.update(changes)
    return cls, build_dataclass(cls.CONFIG, section, path="model")


def lengths(arch: str = "evlgen_opt", kind: str | None = None, **changes):
    cls, cfg = config(arch, **changes)
    if kind:
        cfg = dataclasses.replace(cfg, language=dataclasses.replace(cfg.language, kind=kind))
    return cls.text_lengths(cfg)


def tokens(text: str) -> list[int]:
    cls, cfg = config()
    return build_language_model(cfg, cls.LANGUAGE_MODEL, "meta").tokenizer(text).input_ids


def test_opt_reads_question_and_answer_as_one_text_with_its_newline():
    whole, read = len(tokens(f"{QUESTION} {ANSWER}\n")), len(tokens(QUESTION))
    for limit, is_cut, is_lost in (
        *((whole, False, False), (whole - 1, True, False), (read + 1, True, False)),
        *((read, True, True), (read - 1, True, True)),
    ):
        (found,) = lengths(max_txt_len=limit).learned([QUESTION], [ANSWER])
        assert found == TextLength(read, whole - read, is_cut, is_lost), limit


def test_others_read_question_and_answer_up_to_a_limit_of_each():
    whole = lengths(kind="causal").learned([QUESTION], [ANSWER])[0]
    for read, learned, is_cut, is_lost in (
        *((0, 0, False, False), (-1, 0, True, False), (0, -1, True, False)),
        (0, 1 - whole.learned, True, True),  # one token is left: the end
    ):
        limits = {"max_txt_len": whole.read + read, "max_output_txt_len": whole.learned + learned}
        measure = lengths(kind="causal", **limits)
        assert measure.learned([QUESTION], [ANSWER]) == [whole._replace(is_cut=is_cut, is_lost=is_lost)]
        assert measure.asked([QUESTION]) == [TextLength(whole.read, 0, read < 0, False)]


def test_the_prompt_before_captions_is_read_and_not_learned():
    (found,) = lengths(prompt="a photo of").learned(["a photo of a red star"])
    assert found == TextLength(len(tokens("a photo of")), len(tokens("a red star\n")) - 1)


@pytest.mark.parametrize("kind", ["opt", "causal"])
def test_a_word_that_only_begins_like_the_prompt_is_learned(kind):
    cls, cfg = config(prompt="a red")
    cfg = dataclasses.replace(cfg, language=dataclasses.replace(cfg.language, kind=kind))
    reader = build_language_model(cfg, cls.LANGUAGE_MODEL, "meta")
    other, begins = reader.to_learn(["a reddish star", "a red star"])
    assert reader.tokenizer.decode(begins.learned).startswith(" star")
    assert "a reddish star" in reader.tokenizer.decode(other.learned)


def test_a_blank_after_the_prompt_takes_no_word_from_what_is_learned():
    reader = lengths(prompt="a photo of").learned(["a photo of a red star"])
    assert lengths(prompt="a photo of ").learned(["a photo of a red star"]) == reader


@pytest.mark.parametrize("kind", ["opt", "causal"])
def test_without_weights_texts_become_the_same_tokens(kind):
    cls, cfg = config(max_txt_len=6)
    cfg = dataclasses.replace(cfg, language=dataclasses.replace(cfg.language, kind=kind))
    whole, bare = (build_language_model(cfg, cls.LANGUAGE_MODEL, device) for device in ("cpu", "meta"))
    assert bare.to_learn([QUESTION], [ANSWER]) == whole.to_learn([QUESTION], [ANSWER])
    assert bare.to_read([QUESTION]) == whole.to_read([QUESTION])
    assert {weight.device.type for weight in bare.parameters()} == {"meta"}


def test_the_first_stage_reads_a_text_between_two_marks():
    count = len(tokens("a red star")) + 1  # of OPT: one mark before it
    assert lengths("blip2", max_txt_len=count).learned(["a red star"]) == [TextLength(0, count)]
    assert lengths("blip2", max_txt_len=count - 1).learned(["a red star"]) == [TextLength(0, count, True)]


def test_without_the_tokenizer_nothing_is_said_of_limits(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cls, cfg = config()
    cfg = dataclasses.replace(cfg, language=dataclasses.replace(cfg.language, name=str(tmp_path / "gone")))
    assert cls.text_lengths(cfg) is None and WordLengths().limits == {}
    assert WordLengths().learned(["one two"], ["three"]) == [TextLength(2, 1)]
    assert WordLengths().asked(["one two"]) == [TextLength(2, 0)]


def test_every_answer_of_a_question_is_measured_after_the_question_as_it_is_put():
    task = registry.get_task_class("vqa")(RunConfig(task="vqa", prompt="Q: {} A:"))
    sample = {"text_input": "who is it?", "answers": ["a cat", "no one here"], "weights": [0.5, 0.5]}
    assert _measured(WordLengths(), task, "train", sample) == [TextLength(5, 2), TextLength(5, 3)]
    assert _measured(WordLengths(), task, "val", {"text_input": "who is it?"}) == [TextLength(5, 0)]
