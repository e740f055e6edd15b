"""BLIP-2's first stage: its losses against slow forms and transformers, what sees what, the second stage."""

from __future__ import annotations

import copy
import datetime
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import BertConfig, BertForPreTraining, BertTokenizer, Blip2Config
from transformers.models.blip_2.modeling_blip_2 import Blip2ForImageTextRetrieval

from evlgen.common.errors import CheckpointError, ConfigError, DataError
from evlgen.common.registry import registry
from evlgen.config.config import load_model_config
from evlgen.datasets.shapes.captions import captions
from evlgen.datasets.shapes.world import draw, scene
from evlgen.models import blip2_stage1
from evlgen.models.blip2_stage1 import Blip2Stage1
from evlgen.models.connectors.qformer_text import QFormerTokenizer, _Prefix, read_text, write
from evlgen.models.connectors.qformer_weights import own_to_qformer, qformer_to_own
from evlgen.models.image_text_losses import hard_negatives, image_keys
from evlgen.models.published.checkpoints import to_published_names
from evlgen.processors.image import BlipImageEvalProcessor

CONNECTOR = {
    "name": "qformer",
    "num_query_token": 5,
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
COUNT = 6


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(arch: str = "blip2", **changes):
    torch.manual_seed(0)
    overrides = {"connector": CONNECTOR, **changes}
    cfg = load_model_config(arch, "shapes", overrides=overrides)
    return registry.get_model_class(arch).from_config(cfg)


def shake(model: nn.Module, seed: int = 5) -> nn.Module:
    """Every trained weight away from its start, so that none that is left out goes unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and name != "temp":
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


@pytest.fixture(scope="module")
def samples():
    process = BlipImageEvalProcessor(image_size=64, mean=[0.5] * 3, std=[0.5] * 3)
    scenes = [scene("train", i) for i in range(COUNT)]
    return {
        "image": torch.stack([process(Image.fromarray(draw(s))) for s in scenes]),
        "text_input": [captions(s)[i % 5] for i, s in enumerate(scenes)],
        "image_id": list(range(COUNT)),
    }


@pytest.fixture(scope="module")
def model():
    return shake(build())


@pytest.fixture(scope="module")
def reference(model):
    """Transformers' image-text retrieval with the model's weights; its vision encoder gives what was set."""
    config = Blip2Config(
        qformer_config={
            "vocab_size": len(model.tokenizer),
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "encoder_hidden_size": 128,
            "cross_attention_frequency": 2,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "use_qformer_text_input": True,
        },
        vision_config={"hidden_size": 128, "num_hidden_layers": 1, "intermediate_size": 8, "image_size": 28},
        num_query_tokens=5,
        image_text_hidden_size=64,
    )
    theirs = Blip2ForImageTextRetrieval(config).eval()
    names = {
        "Qformer.bert.encoder.": "qformer.encoder.",
        "Qformer.bert.embeddings.LayerNorm.": "qformer.layernorm.",
        "Qformer.bert.embeddings.": "embeddings.",
        "vision_proj.": "vision_projection.",
        "text_proj.": "text_projection.",
    }
    state = {}
    for key, value in own_to_qformer(model.state_dict()).items():
        prefix = next((p for p in names if key.startswith(p)), None)
        key = key if prefix is None else names[prefix] + key.removeprefix(prefix)
        state[key.replace("attention.self.", "attention.attention.")] = value
    wanted = {k for k in theirs.state_dict() if not k.startswith("vision_model.")}
    theirs.load_state_dict({k: state[k] for k in wanted}, strict=False)
    theirs.vision_model = _Given()
    return theirs


def test_several_texts_of_an_image_are_refused(model, samples):
    together = {**samples, "image": samples["image"][:3], "num_texts": [2, 2, 2]}
    with pytest.raises(DataError, match="an image has several texts.*captions_together: false"):
        model(together)
    assert model({**samples, "num_texts": [1] * COUNT})["loss"] > 0


class _Given(nn.Module):
    tokens: torch.Tensor

    def forward(self, *args, **kwargs):
        return [self.tokens]


def visual_tokens(model, samples) -> torch.Tensor:
    return model._normed(model.encode(samples["image"]))


# ---- numbers ----


@pytest.mark.parametrize("head", ["itm", "itc"])
def test_pairs_match_as_transformers_says(model, reference, samples, head):
    ids = model.tokenizer(samples["text_input"])
    reference.vision_model.tokens = visual_tokens(model, samples)
    with torch.no_grad():
        wanted = reference(
            pixel_values=samples["image"],
            input_ids=ids,
            attention_mask=(ids != model.tokenizer.pad).long(),
            use_image_text_matching_head=head == "itm",
        )
    got = model.match(samples, head)
    expected = wanted.logits_per_image if head == "itm" else wanted.logits_per_image.diagonal()[:, None]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_text_is_written_as_one_sequence_under_the_multimodal_causal_mask_would_be(model, reference, samples):
    """Queries see queries, text sees queries and what stands before: here in one pass under one mask."""
    ids = model.tokenizer(samples["text_input"])
    ids[:, 0] = model.tokenizer.begin
    queries, length = 5, ids.shape[1]
    mask = torch.zeros(queries + length, queries + length, dtype=torch.bool)
    mask[:, :queries] = True
    mask[queries:, queries:] = torch.ones(length, length).tril().bool()
    tokens = visual_tokens(model, samples)
    with torch.no_grad():
        embeds = reference.embeddings(ids, query_embeds=reference.query_tokens.expand(COUNT, -1, -1))
        hidden = reference.qformer(
            query_embeds=embeds,
            query_length=queries,
            attention_mask=mask.expand(COUNT, 1, -1, -1),
            encoder_hidden_states=tokens,
        ).last_hidden_state
        text = model.text
        inner = F.layer_norm(
            F.gelu(hidden[:, queries:] @ text.head_dense.weight.T + text.head_dense.bias),
            (32,),
            text.head_norm.weight,
            text.head_norm.bias,
            eps=1e-12,
        )
        logits = inner @ text.words.weight.T + text.head_bias
        _, past = model.connector.read(model.connector.keys_values(tokens), COUNT)
        got, _ = write(model.connector, text, ids, past)
        got_loss = model(samples)["loss_lm"]
    torch.testing.assert_close(text.logits(got), logits, atol=1e-5, rtol=1e-5)

    losses = []  # every token that is no padding is predicted by the one before it
    for row, words in zip(logits.log_softmax(-1), ids, strict=True):
        for place in range(1, length):
            if words[place] != model.tokenizer.pad:
                losses.append(-0.9 * row[place - 1][words[place]] - 0.1 * row[place - 1].mean())
    torch.testing.assert_close(got_loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def test_later_text_changes_nothing_before_it_and_never_the_queries(model, samples):
    connector, text = model.connector, model.text
    ids = model.tokenizer(samples["text_input"])[:, :6]
    with torch.no_grad():
        _, past = connector.read(connector.keys_values(visual_tokens(model, samples)), COUNT)
        before, seen = write(connector, text, ids, past)
        for place in range(ids.shape[1]):
            changed = ids.clone()
            changed[:, place] = (changed[:, place] + 7) % 400
            after, seen_now = write(connector, text, changed, past)
            same = torch.isclose(before, after, atol=1e-6).all(-1).all(0)
            assert same.tolist() == [i < place for i in range(ids.shape[1])]
            for old, new in zip(seen, seen_now, strict=True):
                torch.testing.assert_close(old[:, : 5 + place], new[:, : 5 + place])


def slow_contrast(images, texts, temp: float, image_ids: list[int]) -> float:
    """Contrast of features [B, M, E] and [B, E], one pair at a time."""
    total, count = 0.0, len(texts)
    for by_image in (True, False):
        for row in range(count):
            scores = []
            for column in range(count):
                image, text = (row, column) if by_image else (column, row)
                scores.append(max(float(query @ texts[text]) for query in images[image]) / temp)
            log_sum = math.log(sum(math.exp(s) for s in scores))
            right = [c for c in range(count) if image_ids[c] == image_ids[row]]
            loss = sum(0.9 / len(right) * (log_sum - scores[c]) for c in right)
            loss += sum(0.1 / count * (log_sum - s) for s in scores)
            total += loss / count / 2
    return total


@pytest.mark.parametrize("image_ids", [list(range(COUNT)), [0, 1, 0, 2, 3, 0]])
def test_contrast_is_that_of_the_slow_form(model, samples, image_ids):
    batch = {**samples, "image_id": image_ids}
    images = model.extract_features(samples, mode="image")["image_embeds_proj"]
    texts = model.extract_features(samples, mode="text")["text_embeds_proj"][:, 0]
    expected = slow_contrast(images.double(), texts.double(), model.temp.item(), image_ids)
    with torch.no_grad():
        assert model(batch)["loss_itc"].item() == pytest.approx(expected, rel=1e-5)
        if image_ids == list(range(COUNT)):  # without ids each pair is of an image of its own
            del batch["image_id"]
            assert model(batch)["loss_itc"].item() == pytest.approx(expected, rel=1e-5)


def test_matching_is_judged_on_each_pair_and_its_two_hard_negatives(model, samples, monkeypatch):
    images, texts = torch.tensor([1, 2, 3, 4, 5, 0]), torch.tensor([3, 0, 1, 5, 2, 4])
    known = torch.ones(COUNT, dtype=torch.bool)
    drawn = iter([(images, known), (texts, known & (texts != 5))])  # one image had no other text
    asked = []
    monkeypatch.setattr(
        blip2_stage1, "hard_negatives", lambda *arguments: (asked.append(arguments), next(drawn))[1]
    )
    pairs = [(i, i, 1) for i in range(COUNT)]
    pairs += [(int(images[i]), i, 0) for i in range(COUNT)]
    pairs += [(i, int(texts[i]), 0) for i in range(COUNT) if texts[i] != 5]
    losses = []
    for image, text, fits in pairs:
        one = {"image": samples["image"][[image]], "text_input": [samples["text_input"][text]]}
        losses.append(-model.match(one).log_softmax(-1)[0, fits])
    with torch.no_grad():
        got = model(samples)
    torch.testing.assert_close(got["loss_itm"], torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    queries = model.extract_features(samples, mode="image")["image_embeds_proj"]
    texts = model.extract_features(samples, mode="text")["text_embeds_proj"][:, 0]
    cosines = torch.stack([(q @ texts.T).amax(0) for q in queries]) / model.temp  # [images, texts]
    for (similarity, positive), expected in zip(asked, (cosines.T, cosines), strict=True):
        torch.testing.assert_close(similarity, expected, atol=1e-4, rtol=1e-5)
        assert torch.equal(positive, torch.eye(COUNT, dtype=torch.bool))
    assert got["loss"].item() == pytest.approx(sum(got[f"loss_{k}"].item() for k in ("itc", "itm", "lm")))


def test_hard_negatives_are_drawn_by_similarity_and_never_right_partners():
    torch.manual_seed(0)
    similarity = torch.tensor([[50.0, 0.0, 1.0, 2.0], [900.0, 1000.0, -900.0, 950.0]])
    positive = torch.tensor([[True, False, False, False], [False, True, False, True]])
    draws = torch.stack([hard_negatives(similarity, positive)[0] for _ in range(3000)])
    shares = torch.stack([(draws[:, 0] == c).float().mean() for c in range(4)])
    expected = torch.tensor([0.0, *torch.tensor([0.0, 1.0, 2.0]).softmax(0)])
    torch.testing.assert_close(shares, expected, atol=0.04, rtol=0)
    assert shares[0] == 0
    assert set(draws[:, 1].tolist()) == {0}
    index, found = hard_negatives(similarity[:, :1], torch.tensor([[True], [False]]))
    assert found.tolist() == [False, True] and index[1] == 0


def test_a_batch_without_negatives_is_learned_from_all_the_same(model, samples):
    one = {key: value[:1] for key, value in samples.items()}
    losses = model(one)
    assert losses["loss"].isfinite() and losses["loss_itc"] == 0
    torch.testing.assert_close(losses["loss_itm"], -model.match(one).log_softmax(-1)[0, 1])


def test_an_images_key_is_its_ids_and_no_others():
    keys = image_keys(["a", 7, "7", "a", "b"], torch.device("cpu"))
    assert keys[0] == keys[3] and keys[1] == keys[2] and len(set(keys.tolist())) == 3


# ---- several processes ----


def _argmax_negatives(similarity, positive):
    return similarity.masked_fill(positive, -torch.inf).argmax(1), ~positive.all(1)


def _gradients(model, samples, weight: float = 1.0) -> dict[str, torch.Tensor]:
    """Of all three losses; and the losses, all times what the samples weigh."""
    losses = model(samples)
    (losses["loss"] * weight).backward()
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {**gradients, **{k: v.detach() * weight for k, v in losses.items()}}


# of the last, no image has a negative
IMAGES = [list(range(COUNT)), [0, 1, 0, 2, 3, 0], [0] * COUNT]


def _one_of_two(rank: int, address: str, samples) -> list[dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timeout)
    try:
        blip2_stage1.hard_negatives = _argmax_negatives
        mine = slice(0, 4) if rank == 0 else slice(4, COUNT)  # of other sizes, and texts of other lengths
        part = {key: value[mine] for key, value in samples.items()}
        found = []
        for image_ids in IMAGES:
            part["image_id"] = image_ids[mine]
            found.append(_gradients(shake(build()).train(), part, len(part["text_input"]) / COUNT))
            for value in found[-1].values():
                dist.all_reduce(value)
        return found
    finally:
        dist.destroy_process_group()


def test_two_processes_learn_what_one_learns_of_all_their_samples(forks, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(blip2_stage1, "hard_negatives", _argmax_negatives)
    address = f"file://{tmp_path / 'meeting'}"
    other = forks.start(_one_of_two, 1, address, samples)
    got = _one_of_two(0, address, samples)
    other.join()
    assert other.exitcode == 0
    for image_ids, ours in zip(IMAGES, got, strict=True):
        expected = _gradients(shake(build()).train(), {**samples, "image_id": image_ids})
        assert ours.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                ours[key], value, atol=2e-6, rtol=2e-4, msg=lambda text, key=key: f"{key}: {text}"
            )


# ---- training ----


@pytest.fixture(scope="module")
def trained(samples):
    """A model after a few steps, its weights before them, and the losses."""
    model = build().train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(40):
        out = model(samples)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append({key: value.item() for key, value in out.items()})
    return model.eval(), before, losses


def test_all_three_losses_fall(trained):
    losses = trained[2]
    mean = lambda key, part: sum(step[key] for step in part) / len(part)  # noqa: E731
    for key, share in (("loss_itc", 0.9), ("loss_itm", 0.98), ("loss_lm", 0.6)):
        assert mean(key, losses[-5:]) < share * mean(key, losses[:5]), key


def test_everything_but_the_frozen_encoder_learns(trained):
    model, before, _ = trained
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    own = {k for k, p in model.named_parameters() if p.requires_grad}
    assert not any(k.startswith("vision.") for k in own) and changed == own == set(model.trained_state_dict())


def test_it_computes_in_bfloat16_near_float32(trained, samples):
    model = trained[0]
    with torch.no_grad():
        torch.manual_seed(0)
        exact = model(samples)
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(samples)
    for key, value in exact.items():
        assert rough[key].dtype == torch.float32
        torch.testing.assert_close(rough[key], value, atol=0.1, rtol=0.02)


def test_dropout_is_of_training_only(samples):
    model = build(connector={**CONNECTOR, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1})
    assert torch.equal(model.match(samples), model.match(samples))
    model.train()
    assert not torch.equal(model.match(samples), model.match(samples))
    model(samples)["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_vision_encoder_that_is_trained_gets_gradients(samples):
    model = build(vision={"freeze": False}).train()
    model(samples)["loss"].backward()
    assert any(p.grad.any() for p in model.vision.parameters())
    assert any(k.startswith("vision.") for k in model.trained_state_dict())


# ---- use ----


def test_captions_are_those_of_rereading_everything_for_each_word(trained, samples):
    model, words = trained[0], 7
    texts = model.generate(samples, num_beams=1, max_length=words)
    connector, tokenizer = model.connector, model.tokenizer
    for row in range(COUNT):
        visual = connector.keys_values(visual_tokens(model, {"image": samples["image"][[row]]}))
        ids = tokenizer.to_write_after("")
        with torch.no_grad():
            while ids.shape[1] <= words and ids[0, -1] != tokenizer.end:
                _, past = connector.read(visual, 1)
                hidden, _ = write(connector, model.text, ids, past)
                ids = torch.cat([ids, model.text.logits(hidden)[:, -1:].argmax(-1)], dim=1)
        assert tokenizer.decode(ids[:, 1:]) == [texts[row]]


def test_branches_of_a_beam_search_read_their_own_words_only(model, samples):
    connector, text = model.connector, model.text
    with torch.no_grad():
        visual = connector.keys_values(visual_tokens(model, samples))
        _, past = connector.read(visual, COUNT)
        start = model.tokenizer.to_write_after("a").expand(COUNT, -1)
        prefix = _Prefix(connector, text, past, start, 2)
        first = torch.arange(20, 20 + 2 * COUNT).view(COUNT, 2)
        second, branches = first + 30, torch.tensor([[1, 1]] * COUNT)
        prefix.read(first)
        logits = prefix.read(second, branches)
        for branch in range(2):
            ids = torch.cat([start, first[:, 1:], second[:, branch : branch + 1]], dim=1)
            hidden, _ = write(connector, text, ids, past)
            torch.testing.assert_close(logits[:, branch], text.logits(hidden[:, -1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3, "num_captions": 2}, {"use_nucleus_sampling": True, "num_captions": 2}]
)
def test_several_captions_of_each_image(trained, samples, options):
    torch.manual_seed(0)
    texts = trained[0].generate(samples, max_length=5, **options)
    assert len(texts) == 2 * COUNT and all(isinstance(t, str) for t in texts)


def test_a_prompt_is_continued(trained, samples):
    model = trained[0]
    assert len(model.generate({**samples, "prompt": "a red"}, num_beams=1, max_length=4)) == COUNT
    with pytest.raises(ConfigError, match="one prompt for all images"):
        model.generate({**samples, "prompt": [str(i) for i in range(COUNT)]})
    with pytest.raises(ConfigError, match=r"takes 61 positions, .* has 64|takes 101 positions.*has 64"):
        model.generate(samples, max_length=100)


def test_features_have_lavis_names_and_unit_length(model, samples):
    image = model.extract_features(samples, mode="image")
    text = model.extract_features(samples, mode="text")
    assert image["image_embeds"].shape == (COUNT, 5, 32) and image["image_embeds_proj"].shape == (
        COUNT,
        5,
        64,
    )
    assert text["text_embeds_proj"].shape == (*text["text_embeds"].shape[:2], 64)
    torch.testing.assert_close(
        text["text_embeds_proj"].norm(dim=-1), torch.ones(text["text_embeds"].shape[:2])
    )
    together = model.extract_features(samples)["multimodal_embeds"]
    torch.testing.assert_close(model.itm_head(together).mean(1), model.match(samples))


def test_padding_and_batch_mates_change_nothing(model, samples):
    together, similar = model.match(samples), model.match(samples, "itc")
    for row, text in enumerate(samples["text_input"]):
        one = {"image": samples["image"][[row]], "text_input": text}
        torch.testing.assert_close(model.match(one)[0], together[row], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.match(one, "itc")[0], similar[row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, s: m.match(s, head="lm"), "head 'lm' for matching"),
        (lambda m, s: m.extract_features(s, mode="video"), "mode 'video'"),
        (lambda m, s: m(dict(s, image=s["image"][:, :, None])), "a model of images"),
    ],
)
def test_what_it_cannot_do_is_named(model, samples, call, message):
    with pytest.raises(ConfigError, match=message):
        call(model, samples)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image[0], "One image is a batch of one"),
        (lambda image: image[:, :1], r"it must be \[B, 3, H, W\]"),
        (lambda image: image[..., :16, :16], "the vision encoder reads"),
    ],
)
def test_images_of_other_shapes_are_named(model, samples, change, message):
    for call in (model.forward, model.generate, model.match, model.extract_features):
        with pytest.raises(DataError, match=message):
            call({**samples, "image": change(samples["image"])})


# ---- tokenizers and starts ----


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "##s", "blue", "star"]
    (folder / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=24,
    )
    bert = BertForPreTraining(config)
    with torch.no_grad():
        for p in bert.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        bert.bert.embeddings.token_type_embeddings.weight.zero_()  # which a Q-Former has none of
    bert.save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_texts_are_tokenised_as_bert_does(bert_folder):
    own, theirs = QFormerTokenizer(str(bert_folder), 5), BertTokenizer.from_pretrained(bert_folder)
    texts = ["a red circle", "red", "a blue star a red star a circle", ""]
    expected = theirs(texts, padding=True, truncation=True, max_length=5, return_tensors="pt").input_ids
    assert torch.equal(own(texts), expected)
    assert len(own) == len(theirs) + 1 and own.begin == len(theirs)  # [DEC]
    assert own.to_write_after("a red").tolist() == [[len(theirs), *theirs("a red").input_ids[1:-1]]]


def test_a_tokenizer_of_another_kind_gets_what_it_lacks(model):
    tokenizer = model.tokenizer
    assert sorted([tokenizer.start, tokenizer.begin, tokenizer.end]) == [497, 498, 499]
    ids = tokenizer(["a red circle", "a"])
    assert ids[0, 0] == tokenizer.start and ids[0, -1] == tokenizer.end
    assert ids[1, 2:].tolist() == [tokenizer.end, *[tokenizer.pad] * (ids.shape[1] - 3)]
    assert tokenizer.decode(ids) == ["a red circle", "a"]


def from_bert(folder, **changes):
    sizes = {key: None for key in CONNECTOR if key not in ("name", "num_query_token", "num_layers")}
    connector = {**CONNECTOR, **sizes, "init": str(folder)}
    text = {"tokenizer": str(folder), "max_position_embeddings": None}
    return build(**{"connector": connector, "text": text, "max_txt_len": 12, **changes})


def test_its_text_branch_starts_as_the_bert_it_is_given(bert_folder):
    model = from_bert(bert_folder)
    bert = BertForPreTraining.from_pretrained(bert_folder).eval()
    ids = model.tokenizer(["a red circle", "a blue star a star"])
    mask = ids != model.tokenizer.pad
    with torch.no_grad():
        expected = bert.bert(ids, attention_mask=mask.long()).last_hidden_state
        got = read_text(model.connector, model.text, ids, mask)
        torch.testing.assert_close(got[mask], expected[mask], atol=1e-5, rtol=1e-5)
        logits = model.text.logits(got)[..., :-1]  # but for [DEC]
    torch.testing.assert_close(logits[mask], bert.cls.predictions(expected)[mask], atol=1e-5, rtol=1e-5)
    for queries, text in zip(model.connector.layers, model.text.layers, strict=True):
        assert torch.equal(queries.up.weight, text.up.weight)
        assert torch.equal(queries.out_norm.bias, text.out_norm.bias)


def test_another_tokenizer_than_the_berts_is_refused(bert_folder, tmp_path):
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for file in ("config.json", "model.safetensors"):
        (fewer / file).write_bytes((bert_folder / file).read_bytes())
    (fewer / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    BertTokenizer(str(fewer / "vocab.txt")).save_pretrained(fewer)
    with pytest.raises(
        CheckpointError, match=r"text.words.weight has shape \(11, 32\).*model.text.tokenizer"
    ):
        from_bert(bert_folder, text={"tokenizer": str(fewer), "max_position_embeddings": None})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"connector": {"name": "tomeformer", "r": 4}}, ConfigError, "first stage trains a qformer"),
        ({"vision": {"temporal": {"form": "mean"}}}, ConfigError, "model.vision.temporal"),
        ({"max_txt_len": 65}, ConfigError, "max_txt_len is 65, and text has 64 positions"),
        ({"max_txt_len": 2}, ConfigError, "max_txt_len is 2"),
        ({"text": {"tokenizer": "./nowhere"}}, CheckpointError, "model.text.tokenizer './nowhere'"),
    ],
)
def test_what_does_not_fit_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        build(**changes)


# ---- checkpoints and the second stage ----


def test_saved_and_loaded_models_are_equal(trained, samples, tmp_path):
    model = trained[0]
    again = Blip2Stage1.from_pretrained(model.save_pretrained(tmp_path / "saved"))
    assert torch.equal(again.match(samples), model.match(samples))
    assert again.cfg.text == model.cfg.text


def test_a_whole_model_goes_to_published_names_and_back(trained, samples, tmp_path):
    model = trained[0]
    published = to_published_names(model.trained_state_dict())
    assert "Qformer.cls.predictions.decoder.weight" in published and "query_tokens" in published
    torch.save({"model": published}, tmp_path / "blip2_pretrained.pth")
    again = build(checkpoint=str(tmp_path / "blip2_pretrained.pth"))
    assert torch.equal(again.match(samples), model.match(samples))
    assert qformer_to_own(own_to_qformer(model.state_dict())).keys() == model.state_dict().keys()


@pytest.mark.parametrize("published", [False, True])
def test_a_second_stage_starts_from_what_the_first_learned(trained, samples, tmp_path, caplog, published):
    first = trained[0]
    path = tmp_path / ("blip2_pretrained.pth" if published else "saved")
    if published:
        torch.save({"model": to_published_names(first.trained_state_dict())}, path)
    else:
        first.save_pretrained(path)
    second = build("blip2_opt")
    with caplog.at_level("INFO"):
        report = second.load_checkpoint(path)
    assert report.missing == ["connector.proj_out.bias", "connector.proj_out.weight"]
    assert not report.unexpected and "ln_vision.weight" in report.loaded
    assert [r.levelname for r in caplog.records if "are left out" in r.message] == ["INFO"]
    queries = first.extract_features(samples, mode="image")["image_embeds"]
    torch.testing.assert_close(second.soft_prompts(samples), second.connector.proj_out(queries))


def test_other_weights_of_a_strange_checkpoint_are_no_spare_ones(trained, tmp_path):
    state = trained[0].trained_state_dict()
    torch.save({**state, "temporal.weight": torch.zeros(2)}, tmp_path / "strange.pth")
    with pytest.raises(CheckpointError, match=r"brings temporal.weight"):
        build("blip2_opt", checkpoint=str(tmp_path / "strange.pth"))
    saved = trained[0].save_pretrained(tmp_path / "saved")
    tomeformer = {**CONNECTOR, "name": "tomeformer", "r": 2}
    del tomeformer["num_query_token"]
    with pytest.raises(CheckpointError, match="another architecture"):
        build("evlgen_opt", checkpoint=str(saved), connector=tomeformer)


def test_both_stages_run_one_after_the_other(tmp_path):
    from evlgen.assemble import run
    from evlgen.config.config import Config

    def train(stage: int, *more: str) -> dict:
        options = [f"model.connector.{k}={v}" for k, v in CONNECTOR.items()]
        options += [f"datasets.shapes_caption.{split}_size=12" for split in ("train", "test")]
        options += ["run.max_iters=4", "run.batch_size_train=4", "run.metrics=[bleu]", "run.max_len=6"]
        options += [f"run.output_dir={tmp_path}/{stage}", "run.tensorboard=false", *more]
        return run(Config.load(f"projects/blip2/shapes_stage{stage}.yaml", options))

    assert "Bleu_4" in train(1, "run.cache_vision=true")["test"]
    saved = tmp_path / "1" / "latest" / "checkpoints" / "latest"
    assert "Bleu_4" in train(2, f"model.checkpoint={saved}")["test"]
