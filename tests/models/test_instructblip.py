"""InstructBLIP: equal to transformers' class with the same weights, read and written; published
names; what it refuses."""

from __future__ import annotations

import pytest
import torch
from models.test_transformers_format import _LANGUAGES, _SMALL, _randomise
from PIL import Image
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

from evlgen import registry
from evlgen.common.errors import ConfigError, DataError
from evlgen.config.config import load_model_file
from evlgen.models.connectors.qformer_text import QFormerTokenizer
from evlgen.models.published.checkpoints import to_published_names
from evlgen.models.published.conversion import convert

PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
QUESTIONS = ["what is red?", "how many hearts are on the left side?"]
ANSWERS = ["a circle", "two"]


@pytest.fixture(scope="module", params=["t5", "llama"])
def pair(request, golden, tmp_path_factory):
    """Ours, read from a folder of transformers, and theirs, with random weights."""
    folder = tmp_path_factory.mktemp(request.param)
    words = QFormerTokenizer(str(golden / "evlgen_opt" / "language"), 64)
    config = InstructBlipConfig(
        vision_config={**_SMALL, "image_size": 28, "patch_size": 14},
        qformer_config={
            **_SMALL,
            "num_hidden_layers": 4,
            "vocab_size": len(words),
            "max_position_embeddings": 64,
        },
        text_config=_LANGUAGES[request.param],
        num_query_tokens=5,
        image_token_index=405,
    )
    theirs = InstructBlipForConditionalGeneration(config).eval()
    _randomise(theirs)
    theirs.save_pretrained(folder)
    AutoTokenizer.from_pretrained(golden / "evlgen_opt" / "language").save_pretrained(folder)
    words.tokenizer.save_pretrained(folder / "qformer_tokenizer")
    convert(folder, folder / "own", "own")
    section = load_model_file(folder / "own" / "config.yaml")
    return registry.get_model_class(section.arch).from_pretrained(folder / "own"), theirs, folder


def asked(ours, question):
    ids = ours.text_tokenizer([question])
    return {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def test_soft_prompts_losses_gradients_and_texts_are_those_of_transformers(pair):
    _assert_equal(*pair[:2])


def test_what_is_read_is_written_back_as_it_was(pair, tmp_path):
    ours, theirs, folder = pair
    convert(folder / "own", tmp_path / "back", "transformers")
    back = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    _assert_equal(ours, back)
    expected, found = theirs.state_dict(), back.state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert key.endswith("qkv.bias") or torch.equal(found[key], value), key  # keys' biases have no effect
    processor = AutoProcessor.from_pretrained(tmp_path / "back")
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    inputs = processor(images=image, text=QUESTIONS[0], return_tensors="pt")
    assert (inputs["input_ids"] == back.config.image_token_id).sum() == 5
    assert inputs["qformer_input_ids"].tolist() == ours.text_tokenizer(QUESTIONS[:1]).tolist()
    assert back.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1


def _assert_equal(ours, theirs):
    """Soft prompts, losses, gradients and greedy texts."""
    language, is_t5 = ours.language, theirs.config.text_config.is_encoder_decoder
    marks = [theirs.config.image_token_id] * 5
    both = ours.soft_prompts({"image": PIXELS, "text_input": QUESTIONS, "text_output": ANSWERS})
    for i, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        pixels, words = PIXELS[i : i + 1], asked(ours, question)
        expected = theirs.get_image_features(pixels, **words).pooler_output
        torch.testing.assert_close(both[i : i + 1], torch.stack(list(expected)), rtol=1e-4, atol=1e-5)
        (tokens,) = language.to_learn([question], [answer])
        read = [*tokens.before, *marks, *tokens.read]
        inputs = {"input_ids": torch.tensor([read]), "labels": torch.tensor([tokens.learned])}
        if not is_t5:
            labels = [-100] * len(read) + tokens.learned
            inputs = {"input_ids": torch.tensor([read + tokens.learned]), "labels": torch.tensor([labels])}
        loss = ours({"image": pixels, "text_input": [question], "text_output": [answer]})["loss"]
        expected = theirs(pixel_values=pixels, **words, **inputs).loss
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        pairs = {
            ours.text.words.weight: theirs.qformer.embeddings.word_embeddings.weight,
            ours.text.layers[1].up.weight: theirs.qformer.encoder.layer[1].intermediate.dense.weight,
            ours.connector.query_tokens: theirs.query_tokens,
        }
        found = torch.autograd.grad(loss, list(pairs))
        wanted = torch.autograd.grad(expected, list(pairs.values()))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
        assert found[0].abs().max() > 0
        (tokens,) = language.to_read([question])
        read = torch.tensor([[*tokens.before, *marks, *tokens.read]])
        written = theirs.generate(
            pixel_values=pixels,
            **words,
            input_ids=read,
            max_new_tokens=6,
            num_beams=1,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=getattr(language, "end_token_ids", None),
            pad_token_id=language.pad_token_id,
        )
        start = 1 if is_t5 else (read.shape[1] if written.shape[1] > 6 else 0)
        samples = {"image": pixels, "text_input": [question]}
        options = {"num_beams": 1, "max_len": 6, "min_len": 0, "repetition_penalty": 1.0}
        assert ours.predict_answers(samples, **options) == ours.texts([written[0, start:].tolist()])


def test_the_question_changes_what_is_seen_and_the_batch_does_not(pair):
    ours, *_ = pair
    one, other = (ours.soft_prompts({"image": PIXELS[:1], "prompt": q}) for q in QUESTIONS)
    assert (one - other).abs().max() > 1e-3
    both = ours.soft_prompts({"image": PIXELS[:1].expand(2, -1, -1, -1), "prompt": QUESTIONS})
    torch.testing.assert_close(both, torch.cat([one, other]), rtol=1e-4, atol=1e-5)
    ranked = ours.rank_answers({"image": PIXELS, "text_input": QUESTIONS}, ANSWERS)
    assert set(ranked) <= set(ANSWERS)


def test_of_a_video_each_frame_is_asked_and_their_soft_prompts_stand_in_a_row(pair, monkeypatch):
    ours, theirs, _ = pair
    monkeypatch.setattr(ours, "temporal", "each")
    video = torch.stack([PIXELS, PIXELS.flip(0), PIXELS.flip(3)], 2)  # [2, 3, T, H, W]
    found = ours.soft_prompts({"image": video, "prompt": QUESTIONS})
    for i, question in enumerate(QUESTIONS):
        frames = [theirs.get_image_features(f[None], **asked(ours, question)) for f in video[i].unbind(1)]
        expected = torch.cat([torch.stack(list(frame.pooler_output))[0] for frame in frames])
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)
    assert found.shape[1] == ours.num_soft_prompts(video[0]) == 3 * ours.num_soft_prompts(video[0, :, 0])
    assert len(ours.generate({"image": video, "prompt": QUESTIONS}, num_beams=1, max_length=3)) == 2
    one = {"image": video[:1], "text_input": QUESTIONS[:1], "text_output": ANSWERS[:1]}
    assert ours(one)["loss"].isfinite()


def test_published_names_and_a_saved_checkpoint_are_read_back(pair, tmp_path):
    ours, _, folder = pair
    state = ours.trained_state_dict()
    published = to_published_names(
        {k: v for k, v in state.items() if not k.startswith("vision.")}, "llm_proj"
    )
    names = {"Qformer.bert.embeddings.word_embeddings.weight", "query_tokens", "llm_proj.bias"}
    names |= {"Qformer.bert.encoder.layer.3.output.LayerNorm.weight", "ln_vision.weight"}
    assert names <= set(published) and not any(".cls." in name for name in published)
    torch.save({"model": published}, tmp_path / "published.pth")
    again = type(ours).from_pretrained(folder / "own")
    torch.nn.init.zeros_(again.text.words.weight)
    report = again.load_checkpoint(tmp_path / "published.pth")
    assert not report.missing and not report.unexpected
    assert all(torch.equal(again.state_dict()[name], value) for name, value in state.items())


def test_what_it_does_not_do_is_named(pair):
    ours, *_ = pair
    with pytest.raises(ConfigError, match="a conversation was given to it"):
        ours.chat([{"role": "user", "content": "who?"}])
    with pytest.raises(DataError, match="an image has several texts"):
        ours({"image": PIXELS, "text_input": QUESTIONS * 2, "num_texts": [2, 2]})
