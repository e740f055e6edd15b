"""Samples spread evenly over a model's distribution, and of several texts the one that is most like them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from evlgen.config.config import Config
from evlgen.config.model_config import GenerationConfig
from evlgen.models.language.causal import CausalLanguageModel
from evlgen.models.language.consensus import SAMPLING, most_alike
from evlgen.models.language.generation import Decoding, nucleus, search
from evlgen.models.language.seq2seq import Seq2SeqLanguageModel

WORDS = torch.tensor([[3.0, 1.0, 0.5, -1.0, -2.0], [0.0, 2.0, 1.9, 0.3, -1.0], [0.2, 0.1, 0.0, 0.4, 1.5]])


class Table:
    """A prefix whose next words follow from the last one alone; word 4 ends."""

    def __init__(self, branches: int, batch: int = 2) -> None:
        self.next_position = torch.zeros(batch, branches, dtype=torch.long)
        self.logits = WORDS[0].expand(batch, 1, -1)

    def read(self, tokens, branches=None):
        return WORDS[tokens.clamp(max=2)]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_each_text_is_sampled_as_often_as_it_is_likely(temperature):
    count = 1000
    options = Decoding(
        **{**SAMPLING, "temperature": temperature}, num_captions=count, max_length=3, min_length=0
    )
    found = search(Table, options, torch.tensor([4]), pad_token=9).unflatten(0, (2, count))
    assert torch.equal(found[0], found[1]), "the same for every image"
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for text, share in expected.items():
            if text[-1:] == (4,) or text[-1:] == (9,):
                longer[(*text, 9)] = share
                continue
            logits = WORDS[min(text[-1], 2)] if text else WORDS[0]
            values, tokens = nucleus(logits[None] / temperature, options.top_p, options.top_k)
            shares = (values / values.sum())[0].tolist()
            for token, one in zip(tokens[0].tolist(), shares, strict=True):
                if one:
                    longer[(*text, token)] = share * one
        expected = longer
    counts = Counter(map(tuple, found[0].tolist()))
    assert counts.keys() <= expected.keys()
    for text, share in expected.items():
        assert abs(counts[text] - count * share) < 3 * (count * share * (1 - share)) ** 0.5 + 1
    first = Counter(text[0] for text in found[0].tolist())
    for token in range(5):
        share = sum(share for text, share in expected.items() if text[0] == token)
        assert abs(first[token] - count * share) < 1.01, "points at even distances leave nothing to chance"


@pytest.fixture(scope="module")
def language(model_folder):
    return CausalLanguageModel(str(model_folder("llama"))).eval()


def sample(language, soft_prompts, count: int = 6):
    options = {**SAMPLING, "num_captions": count, "max_length": 8}
    return language.generate_tokens(soft_prompts, [""] * len(soft_prompts), **options)


def test_the_samples_of_an_image_depend_on_nothing_but_it(language, soft_prompts):
    prompts = soft_prompts(language, 9)
    torch.manual_seed(5)
    together = sample(language, prompts)
    before = torch.get_rng_state()
    alone = [text for prompt in prompts for text in sample(language, prompt[None])]
    assert together == alone
    assert len({tuple(text) for text in together[:6]}) > 2
    assert torch.equal(before, torch.get_rng_state())


def test_the_most_alike():
    a, b, c = [1, 2, 3, 4], [1, 2, 3, 5], [7, 8, 9]
    assert most_alike([c, b, a, [1, 2, 3, 4, 5]]) == [2, 3, 1, 0]
    assert most_alike([[], a, a]) == [1, 2, 0]
    assert most_alike([a]) == [0]
    assert most_alike([[], []]) == [0, 1]


@pytest.mark.parametrize("wanted", [1, 2])
def test_what_is_written_is_what_samples_and_search_agree_on(language, soft_prompts, wanted):
    prompts = soft_prompts(language, 4)
    options = {"num_beams": 2, "max_length": 8, "num_captions": wanted}
    found = language.generate_tokens(prompts, [""] * 4, **options)
    sampled = sample(language, prompts)
    expected = []
    for n in range(4):
        own = found[wanted * n : wanted * (n + 1)] + sampled[6 * n : 6 * (n + 1)]
        expected += [own[place] for place in most_alike(own)[:wanted]]
    assert language.generate(prompts, [""] * 4, consensus=6, **options) == language.texts(expected)
    assert (
        language.generate(prompts, [""] * 4, **options) == language.texts(found) != language.texts(expected)
    )


def test_an_encoder_decoder_samples_the_same_each_time(seq2seq_folder, soft_prompts):
    language = Seq2SeqLanguageModel(str(seq2seq_folder("flan-t5"))).eval()
    prompts = soft_prompts(language)
    before = torch.get_rng_state()
    first = sample(language, prompts)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(7)
    assert sample(language, prompts) == first
    assert len(language.generate(prompts, [""] * 3, consensus=4, num_beams=2, max_length=6)) == 3


def test_a_model_does_as_its_configuration_and_its_caller_say(tmp_path):
    from evlgen import load_model_and_preprocess

    model, _, _ = load_model_and_preprocess("evlgen_opt", "shapes")
    asked: list[int | None] = []
    generate = model.language.generate

    def see(*args, **options):
        asked.append(options.get("consensus"))  # nothing new for a language model that is not asked for it
        return generate(*args, **options)

    model.language.generate = see
    image = {"image": torch.zeros(1, 3, 64, 64)}
    model.generate(image, max_length=3)
    model.generation = GenerationConfig(consensus=5)
    model.generate(image, max_length=3)
    model.generate(image, max_length=3, consensus=0)
    model.generate(image, max_length=3, use_nucleus_sampling=True)
    model.predict_answers({**image, "text_input": "how many?"}, max_len=3)
    assert asked == [None, 5, None, None, None]


def test_a_project_file_asks_for_it():
    cfg = Config.load("projects/shapes/caption.yaml", ["model.generation.consensus=3"])
    assert cfg.model.generation.consensus == 3
