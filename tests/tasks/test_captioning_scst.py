"""Self-critical training: what is learned, from which rewards, and what is refused."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

from evlgen.assemble import run as run_project
from evlgen.common.errors import ConfigError, DataError
from evlgen.common.registry import registry
from evlgen.config.config import Config, load_model_file
from evlgen.config.run_config import RunConfig
from evlgen.datasets.base_dataset import BaseDataset, collate
from evlgen.loaders.data import BatchPlan, train_loader
from evlgen.models.protocols import WritesTokens, offering
from evlgen.tasks.captioning_scst import SelfCriticalCaptioningTask


class Captioned(BaseDataset):
    """Blank images with captions; image ids begin at 0."""

    def __init__(self, captions: list[list[str]]) -> None:
        super().__init__(captions)

    def load_sample(self, index):
        return {"image": torch.full((3, 56, 56), index / 10), "image_id": index, "text_input": "not read"}

    def references(self):
        return dict(enumerate(self.records))


FIRST = Captioned([["red", "a red"], ["blue square", "a blue square"]])
SECOND = Captioned([["green star", "a green star"], ["pink heart"]])


class Writer(torch.nn.Module):
    """Writes the texts it is given, notes whether dropout was on, and keeps what it is to learn."""

    def __init__(self, sampled: list[str], greedy: list[str] | None = None) -> None:
        super().__init__()
        self.sampled, self.greedy, self.modes = sampled, greedy, []
        self.weight = torch.nn.Parameter(torch.ones(()))

    def encoded(self, samples):
        return samples

    def generate_tokens(self, samples, **options):
        assert not torch.is_grad_enabled()
        if options.get("use_nucleus_sampling"):
            self.modes.append(self.training)
            self.options = options
            return [[i] for i in range(len(self.sampled))]
        assert (options["num_beams"], options["min_length"]) == (1, 0)
        return [[len(self.sampled) + i] for i in range(len(self.greedy))]

    def texts(self, tokens):
        return [[*self.sampled, *(self.greedy or [])][i] for (i,) in tokens]

    def forward(self, samples):
        self.modes.append(self.training)
        self.learned = samples
        return {"loss": self.weight.sum(), "num_tokens": len(samples["image"])}


def task_for(model, datasets, **run) -> SelfCriticalCaptioningTask:
    @contextlib.contextmanager
    def writing():
        with torch.no_grad():
            yield model

    task = SelfCriticalCaptioningTask(RunConfig(task="captioning_scst", max_epoch=1, **run))
    task.before_training(datasets, SimpleNamespace(writing=writing))
    return task


def batch_of(dataset, name):
    samples = [{**dataset[i], "dataset": name} for i in range(len(dataset))]
    return collate(samples)


# Of two images with different words each n-gram of a caption that is one reference weighs the same, so a
# caption that is the only reference has CIDEr 10 * (number of n with n-grams) / 4.
def test_advantages_are_rewards_above_the_mean_of_the_other_samples():
    data = Captioned([["red"], ["blue square"]])
    model = Writer(["red", "green", "green", "blue square", "blue square", "red"]).train()
    losses = task_for(model, {"one": data}, scst_samples=3).train_step(model, batch_of(data, "one"))
    weights = [2.5 - 0, 0 - 1.25, 0 - 1.25, 5 - 2.5, 5 - 2.5, 0 - 5]
    assert model.learned["text_weights"].tolist() == pytest.approx([w / 3 for w in weights])
    assert model.learned["num_texts"] == [3, 3] and len(model.learned["text_tokens"]) == 6
    assert losses["reward"].item() == pytest.approx((2.5 + 10) / 6)
    assert losses["num_tokens"] == 2
    assert "text_input" not in model.learned


def test_advantages_are_rewards_above_that_of_the_greedy_caption():
    data = Captioned([["red"], ["blue square"]])
    model = Writer(["red", "green", "blue square", "red"], greedy=["green", "blue square"])
    task = task_for(model, {"one": data}, scst_samples=2, scst_baseline="greedy")
    losses = task.train_step(model, batch_of(data, "one"))
    assert model.learned["text_weights"].tolist() == pytest.approx([2.5 / 2, 0, 0, -5 / 2])
    assert losses["baseline"].item() == pytest.approx(2.5) and losses["reward"].item() == pytest.approx(
        7.5 / 4
    )


def test_captions_are_drawn_from_the_model_itself_and_dropout_is_off_until_they_are_learned():
    model = Writer(["red", "green", "blue", "red"]).train()
    task_for(model, {"one": FIRST}, scst_samples=2, max_len=7).train_step(model, batch_of(FIRST, "one"))
    free = {"top_p": 1.0, "top_k": None, "temperature": 1.0, "min_length": 0, "use_nucleus_sampling": True}
    assert model.options == {**free, "num_captions": 2, "max_length": 7}
    assert model.modes == [False, False] and model.training
    run = {"scst_samples": 2, "scst_temperature": 0.7}
    task_for(model, {"one": FIRST}, **run).train_step(model, batch_of(FIRST, "one"))
    assert model.options["temperature"] == 0.7


def test_images_of_several_datasets_with_the_same_ids_have_their_own_captions():
    model = Writer(["green star", "red", "red", "blue square"])
    task = task_for(model, {"one": FIRST, "two": SECOND}, scst_samples=2)
    task.train_step(model, batch_of(SECOND, "two"))
    assert model.learned["text_weights"].sign().tolist() == [1, -1, 0, 0]
    task.train_step(model, batch_of(FIRST, "one"))
    assert model.learned["text_weights"].sign().tolist() == [-1, 1, -1, 1]


def test_the_loader_says_of_which_dataset_a_sample_is():
    datasets = {"one": FIRST, "two/val": SECOND}
    loader = iter(train_loader(datasets, BatchPlan([2, 2], 4, seed=0), num_workers=0, pin_memory=False))
    batch = next(loader)
    assert sorted(batch["dataset"]) == ["one", "one", "two/val", "two/val"]
    assert all(
        own.startswith(f"{name}: ") for name, own in zip(batch["dataset"], batch["sample_id"], strict=True)
    )


@pytest.fixture
def golden_model(golden):
    return registry.get_model_class("evlgen_opt").from_config(
        load_model_file(golden / "evlgen_opt" / "model.yaml")
    )


@pytest.mark.parametrize("baseline", ["mean", "greedy"])
def test_the_gradient_is_that_of_each_sampled_caption_by_itself(golden_model, baseline):
    model = golden_model.train()
    data = Captioned([["a red circle"], ["two blue stars"], ["a cat on a hill"]])
    task = task_for(model, {"one": data}, scst_samples=3, scst_baseline=baseline, max_len=4)
    values = torch.tensor([[3.0, 1.0, 0.0], [0.5, 0.5, 4.0], [1.0, 2.0, 2.0]])
    greedy = torch.tensor([[1.0], [2.0], [0.0]])
    task._reward = Judge((values if baseline == "mean" else torch.cat([values, greedy], 1)).tolist())
    batch = batch_of(data, "one")
    torch.manual_seed(0)
    task.train_step(model, batch)["loss"].backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    torch.manual_seed(0)
    freely = {"use_nucleus_sampling": True, "top_p": 1.0, "top_k": None, "min_length": 0}
    tokens = model.generate_tokens({"image": batch["image"]}, num_captions=3, max_length=4, **freely)
    others = (values.sum(1, keepdim=True) - values) / 2
    advantages = values - (others if baseline == "mean" else greedy)
    for i, text in enumerate(tokens):
        one = {"image": batch["image"][i // 3 : i // 3 + 1], "text_tokens": [text]}
        (advantages.flatten()[i] * model.sample_losses(one)["losses"][0] / 9).backward()
    assert found
    for name, gradient in found.items():
        own = dict(model.named_parameters())[name].grad
        assert torch.allclose(gradient, own, rtol=1e-3, atol=1e-5 * own.abs().max().item() + 1e-8), name


class Judge:
    """Gives rewards that were fixed beforehand: the samples' and, last of an image, the greedy caption's."""

    def __init__(self, rewards) -> None:
        self.rewards = rewards

    def __contains__(self, image):
        return True

    def __call__(self, images, captions):
        assert [len(row) for row in self.rewards] == [len(own) for own in captions]
        return self.rewards


class FixedReward:
    """A function of the image and the text."""

    def __contains__(self, image):
        return True

    def __call__(self, images, captions):
        return [
            [self.of(image, text) for text in own] for (_, image), own in zip(images, captions, strict=True)
        ]

    @staticmethod
    def of(image, text) -> float:
        return (sum(map(ord, text)) + 7 * image) % 23 / 5


MAX_LEN = 5


def log_probabilities(model, image, prompt, text):
    """Of the text's tokens by transformers' own forward: one image, one sequence without padding, [n, V]."""
    language = model.language
    start = language.tokenizer(prompt).input_ids  # with OPT's </s>
    words = language.model.get_input_embeddings()(torch.tensor([[*start, *text]]))
    read = torch.cat([model.soft_prompts({"image": image[None]}), words], 1)
    return language.model(inputs_embeds=read, use_cache=False).logits[0, -len(text) - 1 :].log_softmax(-1)


@torch.no_grad()
def greedy_text(model, image, prompt) -> str:
    ids: list[int] = []
    while len(ids) < MAX_LEN and ids[-1:] != model.language.end_token_ids:
        ids.append(int(log_probabilities(model, image, prompt, ids)[-1].argmax()))
    return model.language.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("prompt", ["", "a photo of"])
@pytest.mark.parametrize("baseline", ["mean", "greedy"])
def test_the_gradient_is_that_of_reinforce_with_a_baseline_by_its_definition(
    golden_model, baseline, prompt, monkeypatch
):
    """-1/N sum over N samples of (r - b) * grad log p(sample | image), where b is the mean reward of the
    image's other samples (Luo 2020) or that of its greedy caption (Rennie et al. 2017)."""
    model = golden_model.train()
    model.language.positions_at_once = 16  # an image at a time
    data = Captioned([["a red circle"], ["two blue stars"]])
    language, (end,) = model.language, model.language.end_token_ids
    words = language.tokenizer("a red circle two blue stars on hill", add_special_tokens=False).input_ids
    tokens = [[*words[:3], end], [end], words[1 : 1 + MAX_LEN]]  # the last was cut before its end
    tokens += [[words[5], end], words[3 : 3 + MAX_LEN], [*words[2:6], end]]
    search = model.generate_tokens
    monkeypatch.setattr(
        model,
        "generate_tokens",
        lambda read, **how: tokens if how.get("use_nucleus_sampling") else search(read, **how),
    )
    task = task_for(
        model, {"one": data}, scst_samples=3, scst_baseline=baseline, max_len=MAX_LEN, prompt=prompt
    )
    task._reward = FixedReward()
    batch = batch_of(data, "one")
    losses = task.train_step(model, batch)
    losses["loss"].backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    total, rewards, baselines = 0.0, [], []
    for image in (0, 1):
        texts = tokens[3 * image : 3 * image + 3]
        own = [
            FixedReward.of(image, language.tokenizer.decode(t, skip_special_tokens=True).strip())
            for t in texts
        ]
        for number, text in enumerate(texts):
            if baseline == "greedy":
                compared = FixedReward.of(image, greedy_text(model, batch["image"][image], prompt))
            else:
                compared = (sum(own) - own[number]) / 2
            scores = log_probabilities(model, batch["image"][image], prompt, text)
            log_probability = sum(scores[place, token] for place, token in enumerate(text))
            total = total - (own[number] - compared) * log_probability / len(tokens)
            rewards.append(own[number])
            baselines.append(compared)
    total.backward()
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-4)
    assert losses["reward"].item() == pytest.approx(sum(rewards) / 6)
    assert losses["baseline"].item() == pytest.approx(sum(baselines) / 6)
    own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == own.keys() and any(gradient.abs().max() > 1e-4 for gradient in own.values())
    for name, gradient in found.items():
        assert torch.allclose(gradient, own[name], rtol=1e-3, atol=1e-4 * own[name].abs().max().item()), name


def run_steps(path):
    cfg = Config.load(path)
    run_project(cfg)
    lines = [
        json.loads(line)
        for file in (path.parent / "output").glob("2*/log.jsonl")
        for line in file.read_text().splitlines()
    ]
    return [line for line in lines if line["type"] == "train"]


@pytest.mark.parametrize("baseline", ["mean", "greedy"])
def test_a_run_from_pixels_or_from_kept_tokens_logs_what_was_rewarded(
    tiny_project, monkeypatch, tmp_path, baseline
):
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path / "cache"))
    run = {
        "task": "captioning_scst",
        "scst_baseline": baseline,
        "scst_samples": 2,
        "cache_vision": baseline == "greedy",
        "max_epoch": None,
        "max_iters": 2,
        "valid_splits": [],
    }
    lines = run_steps(tiny_project(run=run))
    assert [line["iteration"] for line in lines] == [1, 2]
    for line in lines:
        assert {"loss", "reward", "baseline", "grad_norm"} <= set(line)
        assert 0 <= line["reward"] <= 10


class WithoutCaptions(Captioned):
    def references(self):
        return {}


def test_a_dataset_without_captions_by_image_is_refused_by_name():
    with pytest.raises(DataError, match="training data of 'web' has no captions by image"):
        task_for(Writer([]), {"one": FIRST, "web": WithoutCaptions([["red"]])})


def test_an_image_without_captions_is_named():
    model = Writer(["red"] * 4)
    task = task_for(model, {"one": Captioned([["red"], ["blue"]])}, scst_samples=2)
    batch = batch_of(FIRST, "one")
    batch["image_id"] = [0, "7"]
    with pytest.raises(DataError, match="'one' has no captions of image_id '7'"):
        task.train_step(model, batch)
    del batch["image_id"]
    with pytest.raises(ConfigError, match="have no image_id"):
        task.train_step(model, batch)


def test_a_mean_of_no_other_samples_is_refused_before_anything_loads():
    problems = dict(RunConfig(max_epoch=1, scst_samples=1).problems())
    assert "at least 2" in problems["scst_samples"]
    assert not RunConfig(max_epoch=1, scst_samples=1, scst_baseline="greedy").problems()


def test_a_first_stage_without_a_language_model_says_what_to_take():
    model = registry.get_model_class("blip2")
    with pytest.raises(ConfigError, match="does not learn from its own captions. Take model.arch"):
        offering(model.__new__(model), WritesTokens)
