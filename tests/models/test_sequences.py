"""Samples that are sequences of segments: captions and questions are short ones, images stand anywhere."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from evlgen.common.errors import ConfigError, DataError
from evlgen.models.language.segments import Learn, Read, Visual
from evlgen.models.sequences import rows_to_continue
from evlgen.models.soft_prompts import SoftPromptHead
from evlgen.models.zoo import load_model

TALK = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nwhat is it?"}]}]
ANSWER = {"role": "assistant", "content": "a red star"}
TEXT_ONLY = [{"role": "user", "content": "hello, is <image> a tag?"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture(scope="module")
def model():
    return load_model("evlgen_opt", "shapes")


@pytest.fixture(scope="module")
def images(model):
    size = model.vision.image_size
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))


def loss(model, messages, images):
    with torch.no_grad():
        found = model({"messages": messages, "images": images})
    return found["loss"].item(), found["num_tokens"]


def test_captions_and_questions_are_short_sequences(model, images, monkeypatch):
    monkeypatch.setattr(model.language, "prompt", "a photo of")
    captions = ["a red circle", "two blue stars", "a hill"]
    with torch.no_grad():
        short = model({"image": images, "text_input": [f"a photo of {caption}" for caption in captions]})
        parts = [[Visual(), Read("a photo of"), Learn(caption)] for caption in captions]
        long = model({"images": [[image] for image in images], "segments": parts})
        assert short["num_tokens"] == long["num_tokens"] and torch.equal(short["loss"], long["loss"])
        question = {"image": images, "text_input": ["what?"] * 3, "text_output": captions}
        parts = [[Visual(), Read("what?"), Learn(caption)] for caption in captions]
        short, long = model.sample_losses(question), model.sample_losses({"image": images, "segments": parts})
        torch.testing.assert_close(short["losses"], long["losses"])


def test_a_batch_is_its_samples_whatever_number_of_images_each_has(model, images):
    a, b, c = images
    seen = [*TALK, ANSWER]
    several = [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image"}]},
        ANSWER,
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]},
        {"role": "assistant", "content": "two"},
    ]
    alone = [loss(model, [seen], [[a]]), loss(model, [TEXT_ONLY], [[]]), loss(model, [several], [[c, a, b]])]
    total = sum(n for _, n in alone)
    together = loss(model, [seen, TEXT_ONLY, several], [[a], [], [c, a, b]])
    assert together[1] == total
    assert together[0] == pytest.approx(sum(value * n for value, n in alone) / total, rel=1e-5)
    assert loss(model, [several], [[c, b, a]])[0] != pytest.approx(alone[2][0], rel=1e-6), "order matters"


@torch.no_grad()
def test_sequences_may_weigh_differently(model, images):
    talks = {"messages": [[*TALK, ANSWER], TEXT_ONLY], "images": [[images[0]], []]}
    alone = model.sample_losses(talks)["losses"]
    found = model({**talks, "text_weights": [2.0, -0.5]})
    assert found["num_tokens"] == 2
    torch.testing.assert_close(found["loss"], (2 * alone[0] - 0.5 * alone[1]) / 2)


def test_a_batch_without_an_image_trains_with_all_that_is_trained(model):
    places = model.connector.num_soft_prompts(model.vision.num_tokens)
    head = SoftPromptHead(places, model.language.embed_dim, model.language.embedding_rms(), 0.4)
    model.prompt_head = head
    model.train()
    try:
        model({"messages": [TEXT_ONLY], "images": [[]]})["loss"].backward()
        learned = [p for p in model.parameters() if p.requires_grad]
        assert len(learned) > 20 and all(p.grad is not None and not p.grad.any() for p in learned)
        assert head.num_batches == 0, "no image is no statistic"
    finally:
        model.prompt_head = None
        model.zero_grad(set_to_none=True)
        model.eval()


def test_packed_conversations_have_the_losses_and_gradients_of_unpacked_ones(model, images, monkeypatch):
    a, b, c = images
    long = [*TALK, ANSWER, *TALK, ANSWER, *TEXT_ONLY]
    batch = [(TEXT_ONLY, []), (long, [a, b]), ([*TALK, ANSWER], [c]), (TEXT_ONLY[:1] + [ANSWER], [])]
    samples = {"messages": [m for m, _ in batch], "images": [of_one for _, of_one in batch]}
    widths = []

    def measured():
        hook = model.language.model.get_input_embeddings().register_forward_hook(
            lambda module, args, out: widths.append(tuple(out.shape[:2]))
        )
        losses = model.sample_losses(samples)
        found = model(samples)["loss"]
        found.backward()
        hook.remove()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return losses, found, gradients

    plain = measured()
    monkeypatch.setattr(model.language, "pack", True)
    packed = measured()
    torch.testing.assert_close(packed[0], plain[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[1], plain[1], rtol=1e-5, atol=1e-6)
    for name, value in plain[2].items():
        torch.testing.assert_close(packed[2][name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert widths[0][0] == 4 and widths[-1][0] < 4 and widths[-1][1] == widths[0][1]


def test_a_reader_of_the_whole_sequence_finds_the_same_loss(model, images):
    """Embeddings put together by hand, all logits computed, labels read off the row."""
    language = model.language
    messages = [*TALK, ANSWER, *TEXT_ONLY]
    samples = {"messages": [messages], "images": [[images[0]]]}
    row, prompts = model._rows(samples, model.soft_prompts({"image": images[:1]}))
    embeds, labels = [], []
    for segment in row[0]:
        if segment.is_visual:
            embeds.append(prompts[0])
            labels += [-100] * len(prompts[0])
        else:
            embeds.append(language.model.get_input_embeddings()(torch.tensor(segment.ids, dtype=torch.long)))
            labels += segment.ids if segment.learned else [-100] * len(segment.ids)
    with torch.no_grad():
        out = language.model(inputs_embeds=torch.cat(embeds)[None], labels=torch.tensor([labels]))
    assert loss(model, [messages], [[images[0]]])[0] == pytest.approx(out.loss.item(), rel=1e-5)


def test_what_is_too_long_is_cut_and_what_leaves_nothing_is_named(model, images, monkeypatch):
    talk = [*TALK, ANSWER, *TEXT_ONLY]
    _, num_all = loss(model, [talk], [[images[0]]])
    monkeypatch.setattr(model, "max_sequence_len", 40)
    _, num_cut = loss(model, [talk], [[images[0]]])
    assert 0 < num_cut < num_all
    monkeypatch.setattr(model, "max_sequence_len", 12)
    samples = {"messages": [talk, TEXT_ONLY], "images": [[images[0]], []]}
    assert "within the 12 positions of model.max_sequence_len" in model.not_learnable(samples)[0]


@pytest.mark.parametrize(
    ("messages", "count", "reason"),
    [
        ([*TALK, ANSWER], 0, "1 places of images and 0 images"),
        ([*TALK, ANSWER], 2, "1 places of images and 2 images"),
        (TALK, 1, "ends with a question"),
        ([{"role": "users", "content": "x"}, ANSWER], 0, "unknown role 'users'. Did you mean 'user'?"),
        ([TEXT_ONLY[0], {"role": "assistant", "content": " "}], 0, "turn 2 (assistant) is empty"),
        ([], 0, "has no turns"),
        ([{"role": "user", "content": 3}], 0, "content must be a text or a list of parts"),
    ],
)
def test_conversations_that_cannot_be_learned_are_left_out_with_the_reason(
    model, images, messages, count, reason
):
    samples = {"messages": [messages, TEXT_ONLY], "images": [list(images[:count]), []]}
    found = model.not_learnable(samples)
    assert list(found) == [0] and reason in found[0]


def test_kept_tokens_of_an_image_take_the_room_that_the_image_takes(model, images, monkeypatch):
    talks = [[*TALK, ANSWER], [*TALK, ANSWER]]
    pixels = {"messages": talks, "image": images[:2]}
    kept = model.encoded(pixels)
    assert "image" not in kept and model.not_learnable(kept) == model.not_learnable(pixels) == {}
    asked = {"messages": [TALK, TALK]}
    for limit in (12, 40):
        monkeypatch.setattr(model, "max_sequence_len", limit)
        assert model.not_learnable(kept) == model.not_learnable(pixels)
        room = model.language.max_positions - limit
        assert model.not_answerable({**kept, **asked}, room) == model.not_answerable(
            {**pixels, **asked}, room
        )
    assert model.not_answerable({**kept, **asked}, model.language.max_positions - 12)


def test_chat_answers_in_one_piece_or_in_several(model, images):
    photo = Image.new("RGB", (30, 20), "red")
    asked = [
        {"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": "what?"}]}
    ]
    answer = model.chat(asked, max_length=12)
    pieces = list(model.chat(asked, stream=True, max_length=12))
    assert answer and "".join(pieces) == answer and all(pieces)
    again = [*asked, {"role": "assistant", "content": answer}, {"role": "user", "content": "and now?"}]
    assert isinstance(model.chat(again, max_length=3), str)
    assert isinstance(model.chat([{"role": "user", "content": "no image"}]), str), "as long as there is room"
    batch = {"messages": [TALK, TEXT_ONLY[:1]], "images": [[images[0]], []]}
    alone = model.answer_turns({"messages": [TALK], "images": [[images[0]]]}, max_length=6)
    assert model.answer_turns(batch, max_length=6)[0] == alone[0], "padding changes nothing"


def test_old_turns_make_room_for_an_answer(model, images, caplog):
    question = [{"type": "image"}, {"type": "text", "text": "what is on the left of the red circle? " * 4}]
    turns = [{"role": "user", "content": question}, ANSWER]
    talk = [{"role": "system", "content": "be short"}, *turns * 3, TALK[0]]
    long = {"messages": [talk, TALK], "images": [list(images[[0, 1, 2, 1]]), [images[0]]]}
    short = {"messages": [[talk[0], *talk[3:]], TALK], "images": [list(images[[1, 2, 1]]), [images[0]]]}
    with torch.no_grad():
        found, wanted = (
            rows_to_continue(model.language, s, model.sequence_prompts(s), room=20) for s in (long, short)
        )
    assert found[0] == wanted[0] and torch.equal(found[1], wanted[1])
    assert "its turns before turn 4 are left out" in caplog.text
    assert len(model.answer_turns(long, max_length=20)) == 2
    with pytest.raises(ConfigError, match="Lower max_length"):
        model.chat([{"role": "user", "content": "a star " * 400}])


def test_chat_names_what_is_wrong(model):
    video = [
        {"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "what?"}]}
    ]
    with pytest.raises(ConfigError, match="this is a model of images, and the conversation has a video"):
        model.chat(video)
    with pytest.raises(DataError, match="the last one must be the user's"):
        model.chat([*TEXT_ONLY])
    with pytest.raises(ConfigError, match="set it to 1"):
        list(model.chat(TEXT_ONLY[:1], stream=True, num_beams=3, max_length=5))
    with pytest.raises(ConfigError, match="Lower max_length"):
        model.chat(TEXT_ONLY[:1], max_length=500)
    with pytest.raises(DataError, match="holds no image"):
        model.chat([{"role": "user", "content": [{"type": "image", "url": "data:image/png;base64,!"}]}])


def test_an_encoder_decoder_says_that_it_reads_no_conversations():
    from evlgen.models.language.seq2seq import Seq2SeqLanguageModel

    with pytest.raises(ConfigError, match="need a decoder"):
        Seq2SeqLanguageModel.row_of_turns(Seq2SeqLanguageModel.__new__(Seq2SeqLanguageModel), [])
