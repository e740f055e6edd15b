"""The average of the weights: what it is, that it is scored and saved, and that training does not feel it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from evlgen.assemble import run
from evlgen.common.errors import CheckpointError, ConfigError
from evlgen.config.config import Config
from evlgen.files.digests import write_digests

SETTINGS = {"max_epoch": 2, "precision": "fp32", "save_every": 1, "keep_last": 99, "valid_splits": []}


def train(path, *options):
    """Runs a project; returns its folder and the log's records."""
    run(Config.load(path, options))
    folder = (path.parent / "output" / "latest").resolve()
    return folder, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(records):
    return [r["loss"] for r in records if r["type"] == "train"]


def saved(folder, step):
    """The average and the trained weights of a checkpoint."""
    folder = folder / "checkpoints" / f"step_{step:08d}"
    return load_file(folder / "model.safetensors"), load_file(folder / "training_state/trained.safetensors")


@pytest.fixture
def project(tiny_project):
    # running statistics are averaged as well
    return tiny_project(model={"soft_prompts": {"scale": 0.4}, "checkpoint": None}, run=SETTINGS)


def test_it_follows_the_weights_step_by_step_and_training_does_not_feel_it(project):
    _, plain = train(project)
    folder, records = train(project, "run.ema_decay=0.4")
    assert losses(records) == losses(plain)
    means, trained = saved(folder, 1)
    assert {"connector.layers.0.qkv.weight", "prompt_head.variance"} <= means.keys()
    assert means.keys() - trained.keys() == {"prompt_head.num_batches"}  # a count has no average
    for step in range(2, 13):
        decay = min(0.4, (1 + step) / (10 + step))
        before, (means, trained) = means, saved(folder, step)
        for name, weight in trained.items():
            expected = decay * before[name] + (1 - decay) * weight
            torch.testing.assert_close(means[name], expected, rtol=1e-5, atol=1e-7, msg=name)
    name = "connector.layers.0.qkv.weight"
    assert (means[name] - trained[name]).abs().max() > 1e-5


def test_an_accumulated_step_is_one_step(project):
    folder, _ = train(project, "run.ema_decay=0.99", "run.accum_grad_iters=3", "run.save_every=3")
    (before, _), (means, trained) = saved(folder, 3), saved(folder, 6)
    decay = 3 / 12  # of the second step
    name = "connector.layers.0.qkv.weight"
    torch.testing.assert_close(means[name], decay * before[name] + (1 - decay) * trained[name])


def test_a_resumed_run_is_the_one_never_interrupted(project):
    folder, records = train(project, "run.ema_decay=0.9", "run.valid_splits=[val]")
    whole = saved(folder, 12)
    resume = f"run.resume={folder / 'checkpoints' / 'step_00000006'}"
    _, again = train(project, "run.ema_decay=0.9", "run.valid_splits=[val]", resume)
    assert losses(again) == losses(records)
    for ours, theirs in zip(saved(folder, 12), whole, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_what_is_validated_is_what_is_saved(project):
    folder, records = train(project, "run.ema_decay=0.9", "run.valid_splits=[val]")
    (*_, validated) = (r["eval_loss"] for r in records if r["type"] == "evaluation")
    (means, trained), tested = saved(folder, 12), []
    for number, weights in enumerate((means, {**means, **trained})):
        output = project.parent / str(number)
        save_file(weights, file := project.parent / f"{number}.safetensors")
        options = [f"model.checkpoint={file}", "run.evaluate=true", "run.test_splits=[val]"]
        run(Config.load(project, [*options, f"run.output_dir={output}"]))
        (log,) = output.glob("2*/log.jsonl")
        tested.append(json.loads(log.read_text().splitlines()[-1])["eval_loss"])
    assert tested[0] == pytest.approx(validated, rel=1e-6)
    assert tested[1] != pytest.approx(validated, rel=1e-4)


def test_a_run_without_an_average_goes_on_from_the_weights_that_were_trained(project):
    _, plain = train(project)
    folder, _ = train(project, "run.ema_decay=0.9", "run.max_epoch=1")
    checkpoint = folder / "checkpoints" / "step_00000006"
    whole = train(project)[1]
    assert losses(whole) == losses(plain)
    _, resumed = train(project, "run.ema_decay=0.9", f"run.resume={checkpoint}")
    assert len(losses(resumed)) == 12
    _, without = train(project, f"run.resume={checkpoint}")
    assert losses(without)[6:] == losses(resumed)[6:]


def test_weights_of_another_model_are_refused(project):
    folder, _ = train(project, "run.ema_decay=0.9", "run.max_epoch=1")
    checkpoint = folder / "checkpoints" / "step_00000006"
    save_file({"connector.other": torch.zeros(2)}, checkpoint / "training_state" / "trained.safetensors")
    write_digests(checkpoint)
    with pytest.raises(CheckpointError, match=r"cannot be continued.*connector\.other has no place"):
        train(project, "run.ema_decay=0.9", f"run.resume={checkpoint}")


@pytest.mark.parametrize("value", ["1", "-0.1", "fast"])
def test_a_decay_that_is_none_is_refused(project, value):
    with pytest.raises(ConfigError, match=r"run\.ema_decay"):
        Config.load(project, [f"run.ema_decay={value}"])
