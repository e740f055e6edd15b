"""`run.encode_ahead`: the same run, its images encoded one batch early."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from evlgen.assemble import run
from evlgen.common.errors import ConfigError
from evlgen.config.config import Config
from evlgen.loaders.interruption import StopNow
from evlgen.runners.encoding_ahead import EncodedAhead

RUN = {
    "max_epoch": None,
    "max_iters": 6,
    "accum_grad_iters": 2,
    "valid_splits": [],
    "precision": "fp32",
    "save_every": 2,
    "keep_last": 9,
}


def train(path, *options):
    """The losses of a run, its last weights, and its folder of checkpoints."""
    run(Config.load(path, options))
    folder = (path.parent / "output" / "latest").resolve()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [(line["loss"], line["grad_norm"]) for line in lines if line["type"] == "train"]
    checkpoints = folder / "checkpoints"
    return losses, load_file(checkpoints / "latest" / "model.safetensors"), checkpoints


@pytest.fixture
def project(write_project, tmp_path):
    def write(name):
        (tmp_path / name).mkdir()
        connector = {"hidden_dropout_prob": 0.1}  # random numbers that are drawn in a step
        return write_project(tmp_path / name, run=RUN, model={"connector": connector})

    return write


def test_losses_weights_and_resuming_are_the_same_to_the_bit(project, monkeypatch):
    begun = []
    begin = EncodedAhead.begin
    monkeypatch.setattr(EncodedAhead, "begin", lambda self: begun.append(self._next is None) or begin(self))
    losses, weights, _ = train(project("plain"))
    assert not begun and len(losses) == 3
    ahead = project("ahead")
    found, found_weights, checkpoints = train(ahead, "run.encode_ahead=true")
    assert len(begun) == 2 * 6 and sum(begun) == 1 + 6, "the first where it is asked for, then each before"
    assert found == losses
    resumed, resumed_weights, _ = train(
        ahead, "run.encode_ahead=true", f"run.resume={checkpoints / 'step_00000004'}"
    )
    assert resumed[-1] == losses[-1]
    for name, weight in weights.items():
        assert torch.equal(found_weights[name], weight) and torch.equal(resumed_weights[name], weight)


class Encoder:
    device = torch.device("cpu")
    seen: list[float]

    def __init__(self):
        self.seen = []

    def encoded(self, batch):
        assert not torch.is_grad_enabled()
        self.seen.append(batch["image"].item())
        if self.seen[-1] == 3:
            raise torch.OutOfMemoryError
        return {**{k: v for k, v in batch.items() if k != "image"}, "visual_tokens": 10 * batch["image"]}


def test_the_next_batch_is_encoded_when_it_begins_and_no_other():
    model = Encoder()
    batches = [{"image": torch.tensor(float(n)), "sample_id": [str(n)]} for n in range(5)]
    batches[1] = {"messages": [[]], "image": torch.zeros(1)}
    batches[2] = {"skipped": []}  # nothing of it could be read
    ahead = EncodedAhead(iter(batches), model)
    assert model.seen == []
    assert next(ahead) == {"visual_tokens": torch.tensor(0.0), "sample_id": ["0"]}
    ahead.begin(), ahead.begin()
    assert model.seen == [0]
    assert [next(ahead) is batch for batch in batches[1:3]] == [True, True], "as they are"
    assert next(ahead) is batches[3], "without room an image stays to be encoded in its step"
    assert next(ahead) is batches[4] and model.seen == [0, 3], "and so do all after it"
    with pytest.raises(StopIteration):
        next(ahead)


def test_a_batch_of_an_encoder_that_learns_stays_as_it_is():
    model = Encoder()
    model.encoded = lambda samples: samples
    batch = {"image": torch.zeros(1)}
    assert next(EncodedAhead(iter([batch]), model)) is batch, "not with pixels that another stream copies"


@pytest.mark.parametrize("error", [StopNow, ValueError])
def test_what_goes_wrong_is_raised_where_the_batch_is_asked_for(error):
    def batches():
        raise error
        yield

    ahead = EncodedAhead(batches(), Encoder())
    ahead.begin()  # in the middle of a step
    with pytest.raises(error):
        next(ahead)


def test_an_encoder_that_learns_is_refused(project):
    with pytest.raises(ConfigError, match="run.encode_ahead.*frozen.*model.vision.freeze: true"):
        Config.load(project("learns"), ["run.encode_ahead=true", "model.vision.freeze=false"])
