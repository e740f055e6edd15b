"""Several texts of an image in one row: equal to each text with soft prompts of its own."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from evlgen.models.language.causal import CausalLanguageModel
from evlgen.models.language.hugging_face import Tokens
from evlgen.models.language.text_trees import forest, packed, text_trees

TEXTS = ["a red dog on a table", "two dogs", "the dog", "a cat", "a small cat under a large table"]
COUNTS = [3, 2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, golden):
    """A small LLaMA (rotary positions) and a small GPT-2 (learned ones), with the golden tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(golden / "evlgen_opt" / "language")
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 2}
    made = {
        "llama": LlamaForCausalLM(
            LlamaConfig(
                **size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
            )
        ),
        "gpt2": GPT2LMHeadModel(GPT2Config(**size, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    }
    found = {}
    for name, model in made.items():
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("text_out", [None, ["yes", "no", "maybe so", "a cat", "no"]])
def test_as_each_text_alone(folders, kind, attention, text_out):
    model = CausalLanguageModel(str(folders[kind]), prompt="a photo of", attention=attention).eval()
    prompts = torch.randn(2, 4, 32, requires_grad=True)
    apart = prompts.repeat_interleave(torch.tensor(COUNTS), 0)
    expected = model.sample_losses(apart, TEXTS, text_out)
    found = model.sample_losses(prompts, TEXTS, text_out, num_texts=COUNTS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(losses.sum(), prompts)[0] for losses in (found[0], expected[0])]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    loss, count = model.loss(prompts, TEXTS, text_out, num_texts=COUNTS)
    assert count == int(expected[1].sum())
    torch.testing.assert_close(loss, expected[0].sum() / count, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lengths_rounded_up_for_a_gpu_do_not_change_losses(folders, kind, monkeypatch):
    model = CausalLanguageModel(str(folders[kind]), prompt="a photo of").eval()
    prompts = torch.randn(5, 4, 32)
    widths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )

    def losses(multiple: int) -> list[torch.Tensor]:
        monkeypatch.setattr("evlgen.models.language.causal._length_multiple", lambda device: multiple)
        found = [*model.sample_losses(prompts, TEXTS), *model.sample_losses(prompts[:2], TEXTS, None, COUNTS)]
        model.pack = True
        found += model.sample_losses(prompts, TEXTS)
        model.pack = False
        return found

    plain = losses(1)
    assert any(width % 8 for width in widths)
    widths.clear()
    torch.testing.assert_close(losses(8), plain, rtol=1e-5, atol=1e-5)
    assert len(widths) == 3 and not any(width % 8 for width in widths)


def test_lengths_are_rounded_up_to_the_models_positions_at_most(folders, monkeypatch):
    model = CausalLanguageModel(str(folders["gpt2"])).eval()
    monkeypatch.setattr("evlgen.models.language.causal._length_multiple", lambda device: 24)
    assert [model._training_width(longest) for longest in (1, 24, 25, 50, 64, 70)] == [24, 24, 48, 64, 64, 70]


def test_texts_of_an_image_share_what_they_read():
    question = [5, 6, 7]
    trees = text_trees([Tokens([1], question, [8, 2]), Tokens([1], question, [9, 2])], [2], num_soft=4)
    found = forest(trees, [[0]])
    assert [segment.ids for segment in found.rows[0]] == [[1], [], question, [], [], [8, 2], [], [9, 2]]
    assert found.positions.tolist() == [[*range(8), 8, 9, 8, 9]]
    assert found.places.tolist() == [[0] * 4, [7, 8, 7, 10]]  # both first tokens at the trunk's end
    assert found.targets.tolist() == [8, 2, 9, 2] and found.texts.tolist() == [0, 0, 1, 1]
    assert not found.visible[0, 10:, 8:10].any()  # a branch does not see the other
    assert found.visible[0, 11].tolist() == [True] * 8 + [False] * 2 + [True] * 2


def test_texts_that_read_different_things_are_apart():
    (tree,) = text_trees([Tokens([], [5], [8, 2]), Tokens([], [6, 7], [9])], [2], num_soft=1)
    assert [segment.ids for segment in tree.segments if segment.ids] == [[5], [8, 2], [6, 7], [9]]
    assert tree.positions == [0, 1, 2, 3, 1, 2, 3]
    assert tree.places == [1, 2, 5]


def test_trees_of_a_row_do_not_see_each_other():
    trees = text_trees([Tokens([], [], [8]), Tokens([], [], [9]), Tokens([], [], [7])], [2, 1], num_soft=1)
    found = forest(trees, [[1, 0]])
    assert found.images == [1, 0]
    assert found.positions.tolist() == [[0, 1, 0, 1, 1]]
    assert found.texts.tolist() == [2, 0, 1]
    assert found.places.tolist() == [[0, 0, 0], [0, 2, 2]]
    assert found.visible[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 0, 1],
    ]


def test_rows_are_as_long_as_is_cheapest():
    captions = [21, 21, 22, 22, 23, 24, 25, 25, 26, 38]
    narrow, wide = packed(captions, channels=64), packed(captions, channels=4096)
    assert sorted(sum(wide, [])) == [*range(10)]

    def width(rows: list[list[int]]) -> int:
        return max(sum(captions[place] for place in row) for row in rows)

    assert len(wide) * width(wide) < 1.1 * sum(captions)  # nearly nothing is padding
    assert width(narrow) < width(wide)
    assert packed([5] * 4, channels=1) == [[0], [1], [2], [3]]
    assert packed([], channels=8) == []


def test_packed_rows_are_wider_than_a_sample_where_that_saves_positions(folders):
    model = CausalLanguageModel(str(folders["gpt2"])).eval()  # 64 positions, which a row may exceed
    texts = [*TEXTS, "a dog " * 20] * 3
    prompts = torch.randn(len(texts), 4, 32)
    sizes: list[torch.Size] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    expected = model.sample_losses(prompts, texts)
    model.pack = True
    torch.testing.assert_close(model.sample_losses(prompts, texts), expected, rtol=1e-4, atol=1e-4)
    assert sizes[1].numel() < 0.8 * sizes[0].numel()
