"""Soft prompts that merge inside a language model: against a slow reader of one text at a time."""

from __future__ import annotations

import pytest
import torch

from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.config.config import load_model_config
from evlgen.config.model_config import SoftPromptMergingConfig
from evlgen.models.language import CausalLanguageModel, OPTLanguageModel, Seq2SeqLanguageModel
from evlgen.models.language.prefixes import SharedPrefix
from evlgen.models.language.segments import Learn, Read, Visual
from evlgen.models.language.soft_prompt_merging import merge_similar

PARTS = [
    [Visual(), Read("what is it?"), Learn("a red circle on a hill")],
    [Read("look:"), Visual(), Read("and"), Visual(), Learn("two blue stars")],
    [Read("how many stars are there?"), Learn("two")],
]
LENGTHS = [7, 7, 5]  # soft prompts of the images in them


def language_of(family, model_folder, r=None, layer=2, **options):
    kind = OPTLanguageModel if family == "opt" else CausalLanguageModel
    tome = {} if r is None else {"tome": SoftPromptMergingConfig(layer, r)}
    folder = model_folder(
        family, num_hidden_layers=4, **({} if family == "opt" else {"tie_word_embeddings": False})
    )
    return kind(str(folder), max_txt_len=40, **tome, **options).eval()


def images_of(language, lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    scale = language.embedding_rms()
    return [torch.randn(n, language.embed_dim, generator=generator) * scale for n in lengths]


def slowly_merged(x, r):
    """[M, C] -> what is left and its places, pair by pair, from the last one on."""
    values, sizes, places = list(x.flip(0)), [1] * len(x), list(range(len(x)))[::-1]
    while r > 0 and len(values) > 2:
        unit = [v / v.norm() for v in values]
        odd, even = range(1, len(values), 2), range(2, len(values), 2)
        best = {a: max(odd, key=lambda b, a=a: (unit[a] @ unit[b]).item()) for a in even}
        similarity = {a: (unit[a] @ unit[b]).item() for a, b in best.items()}
        gone = sorted(best, key=lambda a: -similarity[a])[: min(r, (len(values) - 1) // 2)]
        for b in odd:
            members = [a for a in gone if best[a] == b] + [b]
            size = sum(sizes[m] for m in members)
            values[b], sizes[b] = sum(values[m] * sizes[m] for m in members) / size, size
        left = [i for i in range(len(values)) if i not in gone]
        r -= len(gone)
        values, sizes, places = ([of[i] for i in left] for of in (values, sizes, places))
    return torch.stack(values).flip(0), places[::-1]


def slow_logits(language, row, images, layer, r):
    """The scores [L, vocabulary] of one sample; those of a position that is gone are nan."""
    pieces, starts = [], []
    images = iter(images)
    for segment in row:
        if segment.is_visual:
            starts.append((sum(map(len, pieces)), len(piece := next(images))))
        else:
            piece = language._embed_words(torch.tensor(segment.ids, dtype=torch.long))
        pieces.append(piece)
    model, places = language.model, torch.arange(sum(map(len, pieces)))
    hidden = torch.cat(pieces)[None]
    if language.KIND == "opt":
        decoder = model.model.decoder
        ones = torch.ones(1, len(places), dtype=torch.long)
        hidden = decoder.project_in(hidden) + decoder.embed_positions(ones, 0, position_ids=places[None])
    else:
        decoder = model.model
    for number, one in enumerate(decoder.layers):
        if number == layer:
            kept = torch.ones(len(places), dtype=torch.bool)
            for start, length in starts:
                values, left = slowly_merged(hidden[0, start : start + length], r(length))
                kept[start : start + length] = False
                kept[[start + i for i in left]] = True
                hidden[0, [start + i for i in left]] = values
            hidden, places = hidden[:, kept], places[kept]
        angles = (
            {}
            if language.KIND == "opt"
            else {"position_embeddings": decoder.rotary_emb(hidden, places[None])}
        )
        mask = torch.ones(len(places), len(places), dtype=torch.bool).tril()[None, None]
        hidden = one(hidden, attention_mask=mask, position_ids=places[None], **angles)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    if language.KIND == "opt":
        hidden = decoder.project_out(decoder.final_layer_norm(hidden))
    else:
        hidden = decoder.norm(hidden)
    scores = torch.full((sum(map(len, pieces)), language.model.config.vocab_size), torch.nan)
    scores[places] = language.model.lm_head(hidden)[0]
    return scores


def slow_losses(language, rows, images, layer, r):
    """The loss of each sample."""
    found, images = [], iter(images)
    for row in rows:
        own = [next(images) for segment in row if segment.is_visual]
        scores, counts, place, loss = slow_logits(language, row, own, layer, r), iter(map(len, own)), 0, 0.0
        for segment in row:
            if segment.learned:
                logits = scores[max(place, 1) - 1 :]
                ids = segment.ids[1:] if place == 0 else segment.ids
                loss -= sum(logits[i].log_softmax(-1)[token] for i, token in enumerate(ids))
            place += next(counts) if segment.is_visual else len(segment.ids)
        found.append(loss)
    return torch.stack(found)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
@pytest.mark.parametrize("r", [1, 0.5, 5])
@torch.no_grad()
def test_a_batch_is_read_as_each_sample_alone_with_fewer_soft_prompts(model_folder, family, r):
    language = language_of(family, model_folder, r)
    plain = language_of(family, model_folder)
    rows, images = [language.row_of_parts(parts) for parts in PARTS], images_of(language)

    def number(length):
        return min(round(r * length) if isinstance(r, float) else r, length - 2)

    losses, _ = language.rows_losses(images, rows)
    expected = slow_losses(plain, rows, images, 2, number)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    unmerged, _ = plain.rows_losses(images, rows)
    torch.testing.assert_close(
        unmerged, slow_losses(plain, rows, images, 2, lambda length: 0), rtol=1e-4, atol=1e-4
    )
    assert not torch.isclose(losses[:2], unmerged[:2], rtol=1e-5).any() and torch.isclose(
        losses[2], unmerged[2]
    )


@pytest.fixture(params=["llama", "opt"])
def language(request, model_folder):
    return language_of(request.param, model_folder, 0.5)


@torch.no_grad()
def test_generation_with_a_cache_is_reading_all_again_at_every_token(language, model_folder):
    plain = language_of("opt" if language.KIND == "opt" else "llama", model_folder)
    rows = [language.row_of_parts(parts[:-1]) for parts in PARTS]  # padding, and two images, one, none
    images = images_of(language)
    for chosen, own in ((rows, images), (rows[:1], images[:1])):
        found = language.continue_rows(own, chosen, num_beams=1, max_length=6, min_length=6)
        for row, tokens in zip(chosen, found, strict=True):
            own_images = images[:1] if row is rows[0] else images[1:] if row is rows[1] else []
            for place, token in enumerate(tokens):
                read = [*row, row[0]._replace(ids=tokens[:place], learned=False, is_visual=False)]
                scores = slow_logits(plain, read, own_images, 2, lambda n: round(n * 0.5))
                scores[-1, language.end_token_ids] = -torch.inf
                assert scores[-1].argmax() == token


@torch.no_grad()
def test_texts_behind_one_image_are_as_likely_as_each_alone(language):
    """Beams and ranking read several branches behind one prefix; so does training with several captions."""
    soft = torch.stack(images_of(language, [6, 6]))
    texts, prompts = ["red", "two blue stars", "a small cat"], ["what color?", "a"]
    found = language.log_likelihoods(soft, prompts, [texts, texts])
    for row, prompt in enumerate(prompts):
        each = [language.sample_losses(soft[row : row + 1], [prompt], [text])[0].item() for text in texts]
        assert (-found[row]).tolist() == pytest.approx(each, rel=1e-4)
        together, _ = language.sample_losses(soft[row : row + 1], [prompt] * 3, texts, num_texts=[3])
        assert together.tolist() == pytest.approx(each, rel=1e-4)
    beams = language.generate_tokens(soft, prompts, num_beams=3, max_length=5, min_length=1)
    alone = [
        language.generate_tokens(soft[i : i + 1], [prompts[i]], num_beams=3, max_length=5)[0] for i in (0, 1)
    ]
    assert beams == alone


@torch.no_grad()
def test_packed_rows_have_the_losses_of_rows_of_their_own(model_folder):
    packed, plain = (language_of("llama", model_folder, 3, pack=pack) for pack in (True, False))
    rows, images = [plain.row_of_parts(parts) for parts in PARTS], images_of(plain)
    torch.testing.assert_close(packed.rows_losses(images, rows)[0], plain.rows_losses(images, rows)[0])


def test_layers_behind_keep_fewer_keys_and_learning_reaches_every_soft_prompt(language, model_folder):
    rows, images = [language.row_of_parts(parts) for parts in PARTS], images_of(language)
    for image in images:
        image.requires_grad_(True)
    loss, _ = language.rows_loss(images, rows)
    loss.backward()
    assert all(image.grad.abs().amin(1).gt(0).all() for image in images)
    step = 1e-2 * torch.randn(images[0].shape, generator=torch.Generator().manual_seed(3)) / 10
    with torch.no_grad():
        ahead, _ = language.rows_loss([images[0] + step, *images[1:]], rows)
        back, _ = language.rows_loss([images[0] - step, *images[1:]], rows)
        assert (ahead - back).item() == pytest.approx(2 * (images[0].grad * step).sum().item(), rel=0.1)
        embeds, layout = language._embed(images[:1], rows[:1], padding_side="left")
        prefix = SharedPrefix(language.model, embeds, layout.mask, 2, 4)
    length = embeds.shape[1]
    assert [layer.length for layer in prefix.cache.layers] == [length, length, length - 4, length - 4]


@torch.no_grad()
def test_nothing_merges_where_r_is_0_and_halves_can_merge_again(model_folder):
    rows, images = (plain := language_of("opt", model_folder)).row_of_parts(PARTS[0]), images_of(plain)[:1]
    none = language_of("opt", model_folder, 0)
    assert torch.equal(none.rows_losses(images, [rows])[0], plain.rows_losses(images, [rows])[0])
    x = torch.randn(2, 13, 8, generator=torch.Generator().manual_seed(2))
    for r in (0, 1, 5, 6, 9, 11, 40):
        values, places, merge_map = merge_similar(x, r)
        for row, one in enumerate(x):
            expected, where = slowly_merged(one, r)
            torch.testing.assert_close(values[row], expected)
            assert places[row].tolist() == where
            assert torch.equal(merge_map[row][places[row]], torch.arange(len(where)))
        assert torch.equal(values[:, -1], x[:, -1])


def test_models_whose_layers_are_not_known_are_refused_by_name(model_folder, seq2seq_folder):
    tome = SoftPromptMergingConfig(1, 2)
    with pytest.raises(
        ConfigError, match="is a gpt_neox model, between whose layers nothing is merged: .*llama"
    ):
        CausalLanguageModel(str(model_folder("gpt_neox")), tome=tome)
    with pytest.raises(ConfigError, match="of kind 'seq2seq' merges no soft prompts"):
        Seq2SeqLanguageModel(str(seq2seq_folder("t5")), tome=tome)
    with pytest.raises(ConfigError, match="layer is 4, and .* has 4 layers: set it to 1 to 3"):
        language_of("llama", model_folder, 2, layer=4)


@torch.no_grad()
def test_it_is_a_setting_of_every_architecture_over_such_a_model():
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    samples, losses = {"image": images, "text_input": ["a red circle", "two stars"]}, []
    for tome in (None, {"layer": 2, "r": 0}, {"layer": 2, "r": 0.5}):
        cfg = load_model_config("evlgen_opt", "shapes", {"language": {"tome": tome}})
        model = registry.get_model_class("evlgen_opt").from_config(cfg).eval()
        losses.append(model(samples)["loss"].item())
        assert len(model.generate(samples, num_beams=2, max_length=4)) == 2
    assert losses[0] == losses[1] != losses[2]
    for r in (-1, 1.5, "half"):
        with pytest.raises(ConfigError, match=r"model.language.tome.r .*must be"):
            load_model_config("evlgen_opt", "shapes", {"language": {"tome": {"layer": 2, "r": r}}})
