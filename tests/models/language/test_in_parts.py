"""A batch that goes through the language model a part at a time: losses and gradients of the whole batch."""

from __future__ import annotations

import weakref

import pytest
import torch

from evlgen.config.model_config import LoraConfig
from evlgen.models.language.causal import CausalLanguageModel
from evlgen.models.language.in_parts import parts_of, total_loss
from evlgen.models.language.segments import VISUAL, Segment, Tokens
from evlgen.models.language.seq2seq import Seq2SeqLanguageModel

TEXTS = ["a red circle on a hill", "a cat", "two blue stars and a green square", "red", "a small cat", "yes"]
ANSWERS = ["yes", "no", "red", "two blue stars", "left", "above"]


def build(path, positions: int, cls=CausalLanguageModel, **settings):
    torch.manual_seed(1)
    settings = {"dtype": torch.float64, **settings}  # T5 of this size magnifies rounding
    model = cls(str(path), prompt="a photo of", **settings).eval()
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora" in name)
        if "lora" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.positions_at_once = positions
    return model


def found(model, soft_prompts, *inputs, method="loss", **options):
    """The loss, the number of tokens, and all gradients; and how often the model was asked."""
    given = [soft_prompts] if isinstance(soft_prompts, torch.Tensor) else list(soft_prompts)
    given = [prompts.clone().requires_grad_() for prompts in given]
    calls: list[int] = []
    handle = model.model.register_forward_hook(lambda *_: calls.append(1))
    is_tensor = isinstance(soft_prompts, torch.Tensor)
    loss, count = getattr(model, method)(given[0] if is_tensor else given, *inputs, **options)
    handle.remove()
    (3 * loss).backward()
    trained = [weight.grad for weight in model.parameters() if weight.requires_grad]
    gradients = [prompts.grad for prompts in given] + trained
    model.zero_grad()
    return (loss.detach(), count, gradients), len(calls)


def check(path, *args, cls=CausalLanguageModel, settings=None, **options) -> None:
    whole, asked_once = found(build(path, 10**6, cls, **(settings or {})), *args, **options)
    parts, asked = found(build(path, 16, cls, **(settings or {})), *args, **options)
    assert asked_once == 1 and asked > 1
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("text_out", [None, ANSWERS])
@pytest.mark.parametrize("family", ["opt", "llama", "gemma2", "mamba"])
def test_a_decoder(model_folder, family, text_out):
    check(model_folder(family), torch.randn(6, 3, 24 if family == "opt" else 32), TEXTS, text_out)


@pytest.mark.parametrize("text_out", [None, ANSWERS])
@pytest.mark.parametrize("family", ["flan-t5", "bart"])
def test_an_encoder_decoder(seq2seq_folder, family, text_out):
    check(seq2seq_folder(family), torch.randn(6, 3, 32), TEXTS, text_out, cls=Seq2SeqLanguageModel)


@pytest.mark.parametrize("settings", [{}, {"pack": True}, {"lora": LoraConfig(target_modules=["v_proj"])}])
def test_several_texts_of_an_image_packed_rows_and_adapters(model_folder, settings):
    torch.manual_seed(0)
    check(model_folder("llama"), torch.randn(6, 3, 32), TEXTS, settings=settings)
    for counts in ([3, 1, 2], [2, 0, 4]):
        check(model_folder("llama"), torch.randn(3, 3, 32), TEXTS, settings=settings, num_texts=counts)


@pytest.mark.parametrize("num_texts", [None, [3, 1, 2], [2, 0, 4]])
@pytest.mark.parametrize("kind", ["texts", "answers", "tokens"])
def test_texts_that_weigh_differently(model_folder, kind, num_texts):
    """The sum of the single texts' losses, each times its weight, and its gradients."""
    torch.manual_seed(0)
    prompts = torch.randn(len(num_texts or TEXTS), 3, 32)
    weights, several = torch.randn(6), {} if num_texts is None else {"num_texts": num_texts}

    def results(positions: int, weighs_itself: bool):
        model = build(model_folder("llama"), positions, lora=LoraConfig(target_modules=["v_proj"]))
        calls: list[int] = []
        model.model.register_forward_hook(lambda *_: calls.append(1))
        given = prompts.clone().requires_grad_()
        tokens = [model.tokenizer(text).input_ids for text in ANSWERS]
        texts = (TEXTS, tokens) if kind == "tokens" else (TEXTS, ANSWERS if kind == "answers" else None)
        if weighs_itself:
            rows = (model.tokens_to_learn if kind == "tokens" else model.to_learn)(*texts)
            loss = model.weighted_loss(given, rows, weights, **several)
        else:
            losses_of = model.token_losses if kind == "tokens" else model.sample_losses
            loss = (losses_of(given, *texts, **several)[0] * weights).sum()
        (2 * loss).backward()
        gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
        return [loss.detach(), given.grad, *gradients], len(calls)

    expected, _ = results(10**6, False)
    for positions, is_cut in ((16, True), (10**6, False)):
        found, asked = results(positions, True)
        assert (asked > 1) is is_cut
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_samples_of_several_images_of_other_lengths_and_of_none(model_folder):
    words = [Segment([5, 6, 7, 8, 9, 10], learned=True)]
    rows = [[VISUAL, VISUAL, *words], words * 3, [VISUAL, Segment([4, 5]), *words], words, [VISUAL, *words]]
    lengths = (2, 5, 3, 4)
    check(model_folder("llama"), [torch.randn(length, 32) for length in lengths], rows, method="rows_loss")


def test_a_part_with_nothing_to_learn_is_left_out(model_folder):
    rows = [Tokens([], [5] * 20, []), Tokens([], [5] * 20, []), Tokens([], [5], [6] * 10)]
    check_rows = [*rows, Tokens([], [7], [8] * 12), Tokens([], [7], [9] * 14)]
    check(model_folder("llama"), torch.randn(5, 3, 32), check_rows, method="rows_loss")


@pytest.mark.parametrize("case", ["trained", "float16", "without gradients"])
def test_where_a_batch_stays_whole(model_folder, case):
    model = build(model_folder("llama"), 16, dtype=torch.float16 if case == "float16" else torch.float32)
    model.requires_grad_(case == "trained")
    calls: list[int] = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    with torch.set_grad_enabled(case != "without gradients"):
        model.loss(torch.randn(6, 3, 32, requires_grad=True), TEXTS)
    assert len(calls) == 1


def test_no_more_than_one_part_is_kept(model_folder):
    model = build(model_folder("llama"), 10**6)
    prompts = torch.randn(12, 3, 32, requires_grad=True)

    def peak(positions: int) -> tuple[int, int]:
        """Bytes that were kept for the backward pass at most, and after the loss is there."""
        model.positions_at_once = positions
        alive: dict[int, weakref.ref] = {}
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        most = 0

        def kept() -> int:
            tensors = [tensor for found in alive.values() if (tensor := found()) is not None]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
            return sum(size for address, size in storages.items() if address not in weights)

        class Kept:
            def __init__(self, tensor):
                self.tensor = tensor

        def keep(tensor):
            nonlocal most
            box = Kept(tensor)
            alive[id(box)] = weakref.ref(tensor)
            most = max(most, kept())
            return box

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda box: box.tensor):
            loss, _ = model.loss(prompts, TEXTS * 2)
            most, after = max(most, kept()), kept()
        loss.backward()
        return most, after

    (whole, whole_after), (part, part_after) = peak(10**6), peak(40)
    assert part < 0.4 * whole
    assert part_after < 0.1 * whole_after


def test_a_weight_that_no_loss_uses_has_no_gradient():
    prompts, used, unused = (torch.randn(n, requires_grad=True) for n in (4, 1, 1))
    parts = parts_of([Tokens([], [], [5])] * 4, [1] * 4, None, 4)
    loss, count = total_loss(lambda own, _: own[:, 0] * used, prompts[:, None], parts, [used, unused])
    loss.backward()
    assert len(parts) == 2 and count == 4
    torch.testing.assert_close(used.grad, prompts.detach().sum()[None])
    assert unused.grad is None


def test_parts_are_about_even_and_hold_together():
    samples = [Tokens([1], [], [5] * n) for n in (3, 9, 1, 1, 20, 2, 2)]
    parts = parts_of(samples, [4] * 7, None, 20)
    assert [part.samples for part in parts] == [part.images for part in parts]
    assert [n for part in parts for n in range(7)[part.samples]] == [*range(7)]
    assert [n for part in parts for n in range(28)[part.prompts]] == [*range(28)]
    by_image = parts_of(samples, [4, 4, 4], [2, 3, 2], 20)
    assert [part.num_texts for part in by_image] == [[2], [3], [2]]
    assert [part.samples for part in by_image] == [slice(0, 2), slice(2, 5), slice(5, 7)]


def test_samples_without_any_image(model_folder):
    rows = [[Segment([4, 5]), Segment([5, 6, 7, 8, 9, 10], learned=True)]] * 5
    check(model_folder("llama"), torch.randn(0, 3, 32), rows, method="rows_loss")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_soft_prompts_of_less_precision_than_the_model(model_folder, dtype):
    torch.manual_seed(0)
    prompts = torch.randn(6, 3, 32, dtype=dtype)

    def gradient(positions: int) -> torch.Tensor:
        model = build(model_folder("llama"), positions, dtype=torch.float32)
        given = prompts.clone().requires_grad_()
        loss, _ = model.loss(given, TEXTS)
        (2**20 / 3 * loss).backward()  # as a loss is scaled in float16
        return given.grad

    whole, parts = gradient(10**6), gradient(16)
    assert parts.dtype == dtype and whole.isfinite().all()
    assert (parts == whole).float().mean() > 0.9  # rounded once, as there


def test_each_sample_is_measured_once():
    measured: list[int] = []

    class Row(list):
        def __iter__(self):
            measured.append(1)
            return super().__iter__()

    rows = [Row([VISUAL, Segment([1, 2], learned=True)]) for _ in range(50)]
    assert len(parts_of(rows, [4] * 50, None, 20)) > 10
    assert len(measured) <= 3 * len(rows)
