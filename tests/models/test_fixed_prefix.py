"""Decoding in fixed shapes, which a GPU records, writes the texts that growing ones do."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import weakref

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, OPTConfig, PreTrainedModel

from evlgen.common.registry import registry
from evlgen.config.config import load_model_file
from evlgen.models.language.fixed_prefix import FixedPrefix, FixedShapes, fixed_shape
from evlgen.models.language.generation import Decoding, decode, decode_stepwise, search
from evlgen.models.ops import cuda_graphs

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "opt": OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=128),
    "llama": LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2),
    "gemma3": Gemma3TextConfig(
        **SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=8, sliding_window=32
    ),
}
END, PAD = 5, 1
OPTIONS = {
    "greedy": Decoding(num_beams=1, max_length=12),
    "greedy, no repeats": Decoding(num_beams=1, max_length=12, repetition_penalty=1.7, min_length=3),
    "beams": Decoding(num_beams=5, max_length=12),
    "beams, no repeats": Decoding(num_beams=4, max_length=12, repetition_penalty=1.7, length_penalty=-1.0),
    "three captions": Decoding(num_beams=4, max_length=8, num_captions=3, min_length=6),
    "sampled": Decoding(num_beams=1, max_length=12, use_nucleus_sampling=True, num_captions=3),
}


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    """One of each kind, whose texts end, each at a length of its own."""
    made = {}
    for kind, config in CONFIGS.items():
        torch.manual_seed(0)
        made[kind] = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            made[kind].get_output_embeddings().weight[END] *= 3.0
    return made


def inputs(rows: int = 3, seed: int = 1, padded: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft prompts and a prompt, some of it padding."""
    embeds = 2.0 * torch.randn(rows, 7, 32, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(rows, 7, dtype=torch.long)
    if padded:
        mask[0, :2] = 0
        mask[-1, 0] = 0
    return embeds, mask


def in_fixed_shapes(model, embeds, mask, options, shapes: FixedShapes | None = None) -> torch.Tensor:
    def prefix_of(branches: int) -> FixedPrefix:
        known = shapes or FixedShapes(model, embeds, *fixed_shape(embeds, branches, options.max_length))
        return FixedPrefix(known, embeds, mask)

    torch.manual_seed(3)
    return search(prefix_of, options, torch.tensor([END]), PAD)


def as_ever(model, embeds, mask, options) -> torch.Tensor:
    torch.manual_seed(3)
    return decode(model, embeds, mask, options, [END], PAD)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_texts_are_the_same(models, kind, options, padded):
    embeds, mask = inputs(padded=padded)
    ours, theirs = (way(models[kind], embeds, mask, options) for way in (in_fixed_shapes, as_ever))
    assert ours.tolist() == theirs.tolist()


@torch.no_grad()
def test_shapes_serve_one_batch_after_another_and_fewer_rows_than_they_have(models):
    model, options = models["opt"], OPTIONS["beams"]
    embeds, mask = inputs()
    shapes = FixedShapes(model, embeds, 4, 16, 5, 16)
    places = None
    for seed, rows in ((1, 3), (2, 4), (3, 1)):
        embeds, mask = inputs(rows, seed)
        ours = in_fixed_shapes(model, embeds, mask, options, shapes)
        assert ours.tolist() == as_ever(model, embeds, mask, options).tolist()
        kept = [value for value in vars(shapes).values() if isinstance(value, torch.Tensor)]
        kept += [states for layer in shapes.layers for states in (layer.keys, layer.values)]
        assert places in (None, [tensor.data_ptr() for tensor in kept]), "tensors stay where they are"
        places = [tensor.data_ptr() for tensor in kept]
    assert shapes.num_bytes > sum(layer.keys.nbytes for layer in shapes.layers)


def test_few_shapes_occur():
    for rows, width, length in ((1, 30, 20), (7, 31, 32), (8, 17, 17)):
        assert fixed_shape(torch.empty(rows, width, 8), 5, length) == (rows, 32, 5, 32)
    assert fixed_shape(torch.empty(63, 600, 8), 1, 200) == (64, 640, 1, 224)


@torch.no_grad()
def test_asked_only_now_and_then_whether_texts_have_ended_they_are_the_same(models, monkeypatch):
    model, (embeds, mask) = models["llama"], inputs()
    expected = {name: as_ever(model, embeds, mask, options) for name, options in OPTIONS.items()}
    monkeypatch.setattr("evlgen.models.language.generation._question_every", lambda device: 8)
    for name, options in OPTIONS.items():
        found = as_ever(model, embeds, mask, options)
        assert found[:, : expected[name].shape[1]].tolist() == expected[name].tolist(), name
        assert (found[:, expected[name].shape[1] :] == PAD).all(), name


@torch.no_grad()
def test_what_cannot_be_recorded_is_decoded_without(models, monkeypatch, caplog):
    """This machine has no CUDA device, so that recording fails, as it may on one that has."""
    model = copy.deepcopy(models["llama"])
    embeds, mask = inputs()
    expected = as_ever(model, embeds, mask, OPTIONS["greedy"])
    monkeypatch.setattr(cuda_graphs, "can_record", lambda module, device: module not in cuda_graphs._failed)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert as_ever(model, embeds, mask, OPTIONS["greedy"]).tolist() == expected.tolist()
    assert [r.message.split(":")[0] for r in caplog.records] == ["LlamaForCausalLM runs without CUDA graphs"]


class Stream:
    cuda_stream = 0


@pytest.fixture
def recorder(monkeypatch) -> list:
    """A stand-in for the card: "records" functions by keeping them. What is around it is real."""
    recorded: list = []

    def record(function, pool):
        function()
        recorded.append(function)
        return function

    monkeypatch.setattr(cuda_graphs, "can_record", lambda module, device: not torch.is_grad_enabled())
    monkeypatch.setattr(cuda_graphs, "_record", record)
    monkeypatch.setattr(cuda_graphs, "_UNRECORDED_USES", 0)
    monkeypatch.setattr(cuda_graphs, "_make_room", lambda kept, device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    return recorded


@torch.no_grad()
def test_a_shape_is_recorded_once_and_again_when_weights_have_moved(models, recorder):
    model = copy.deepcopy(models["opt"])
    embeds, mask = inputs()
    for name, options in OPTIONS.items():
        plain = in_fixed_shapes(model, embeds, mask, options)
        assert as_ever(model, embeds, mask, options).tolist() == plain.tolist(), name
    branches = {1, 5, 4, 3}
    assert len(recorder) == 2 * len(branches), "a prefix and a token each"
    as_ever(model, embeds, mask, OPTIONS["greedy"])
    assert len(recorder) == 2 * len(branches)
    head = model.get_output_embeddings().weight
    head.data = head.data.clone()
    as_ever(model, embeds, mask, OPTIONS["greedy"])
    assert len(recorder) == 2 * len(branches) + 2
    cuda_graphs.forget(model)
    assert model not in cuda_graphs._kept


@torch.no_grad()
def test_a_shape_is_recorded_when_it_comes_again(models, recorder, monkeypatch):
    """One caption alone is written sooner than its work is recorded."""
    monkeypatch.setattr(cuda_graphs, "_UNRECORDED_USES", 1)
    model = copy.deepcopy(models["opt"])
    embeds, mask = inputs()
    texts = []
    for known in (0, 2, 2):
        texts.append(as_ever(model, embeds, mask, OPTIONS["greedy"]).tolist())
        assert len(recorder) == known
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_texts_are_the_same_by_graphs_of_a_card(models, kind, dtype, monkeypatch):
    model = copy.deepcopy(models[kind]).to("cuda", dtype)
    for rows in (1, 3, 5):
        embeds, mask = (x.cuda() for x in inputs(rows, seed=rows))
        for name, options in OPTIONS.items():
            monkeypatch.setenv("EVLGEN_CUDA_GRAPHS", "0")
            expected = as_ever(model, embeds.to(dtype), mask, options).tolist()
            monkeypatch.delenv("EVLGEN_CUDA_GRAPHS")
            for _ in range(3):
                assert as_ever(model, embeds.to(dtype), mask, options).tolist() == expected, (rows, name)
    assert cuda_graphs._kept[model].by_key and model not in cuda_graphs._failed


@torch.no_grad()
def test_shapes_in_use_are_not_given_twice(models, recorder):
    model, shape = models["opt"], (3, 16, 1, 16)
    embeds, _ = inputs()

    def ask():
        return cuda_graphs.recorded(model, embeds.device, shape, lambda: FixedShapes(model, embeds, *shape))

    with ask() as first, ask() as second:
        assert first is not None and second is None
    with ask() as third:
        assert third is first
    cuda_graphs.forget(model)


@torch.no_grad()
def test_texts_are_streamed_from_fixed_shapes_too(models, recorder):
    model, (embeds, mask) = models["llama"], inputs(rows=1)
    options = OPTIONS["greedy"]
    tokens = [token for (token,) in decode_stepwise(model, embeds, mask, options, [END], PAD)]
    assert tokens == in_fixed_shapes(model, embeds, mask, options)[0].tolist()
    pieces = decode_stepwise(model, embeds, mask, options, [END], PAD)
    next(pieces)
    pieces.close()  # nobody reads on: the shapes are free again
    assert as_ever(model, embeds, mask, options)[0].tolist() == tokens
    assert len(recorder) == 2
    cuda_graphs.forget(model)


def test_a_few_images_are_encoded_by_what_was_recorded(golden, recorder):
    cfg = load_model_file(golden / "evlgen_opt" / "model.yaml")
    model = registry.get_model_class("evlgen_opt").from_config(cfg).eval()
    image = load_file(golden / "evlgen_opt" / "expected.safetensors")["image"]
    other = image.flip(0).contiguous()
    with torch.no_grad():
        expected = [model.soft_prompts({"image": pixels}) for pixels in (image, other)]
        found = [model._prompts_to_continue({"image": pixels}) for pixels in (image, other)]
    torch.testing.assert_close(found, expected)
    assert len(recorder) == 1
    texts = [model.generate({"image": pixels}, max_length=8) for pixels in (image, other)]
    assert len(recorder) == 3, "the prompt and a token besides"
    assert model in cuda_graphs._kept
    model.train()
    assert not {model, model.language.model} & {*cuda_graphs._kept}, "training needs the memory"
    model.eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graphs, "can_record", lambda module, device: False)
        assert [model.generate({"image": pixels}, max_length=8) for pixels in (image, other)] == texts
    many = image[:1].expand(17, -1, -1, -1)
    model.generate({"image": many}, max_length=1)
    assert len(recorder) == 3, "many images keep a card busy without"


@torch.no_grad()
def test_a_model_is_freed_though_it_was_recorded(models, recorder):
    model = copy.deepcopy(models["llama"])
    as_ever(model, *inputs(), OPTIONS["greedy"])
    recorder.clear()
    kept = cuda_graphs._kept[model]
    for recording, _ in kept.by_key.values():
        recording.play([lambda: None, lambda: None])  # as graphs do, it needs no model
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_draws_are_those_of_torch():
    from evlgen.models.language.generation import _draw

    probabilities = torch.rand(2, 3, 50).masked_fill_(torch.rand(2, 3, 50) < 0.3, 0.0)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = torch.multinomial(probabilities.flatten(0, -2), 1).view(2, 3)
        torch.manual_seed(seed)
        assert (_draw(probabilities, torch.arange(2), 2) == expected).all()
