"""The runner on a tiny real model: what it writes, chooses, resumes and refuses."""

from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from evlgen.assemble import run
from evlgen.common.errors import ConfigError, DataError, TrainingError
from evlgen.common.registry import registry
from evlgen.config.config import Config
from evlgen.runners.evaluation import deciding_metric


def train(path, *options):
    """Runs a project; returns its folder and the log's records."""
    cfg = Config.load(path, options)
    run(cfg)
    folder = (path.parent / "output" / "latest").resolve()
    return folder, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(records):
    return [r["loss"] for r in records if r["type"] == "train"]


def test_a_run_trains_validates_tests_and_keeps_what_it_should(tiny_project):
    folder, records = train(tiny_project(run={"test_splits": ["test"], "tensorboard": True}))
    assert len(losses(records)) == 12  # 24 samples, batch 4, 2 epochs
    assert losses(records)[-1] < losses(records)[0]
    assert [r["split"] for r in records if r["type"] == "evaluation"] == ["val", "val", "test"]
    kept = {p.name for p in (folder / "checkpoints").iterdir()}
    assert {"latest", "best", "step_00000012"} <= kept
    captions = json.loads((folder / "result" / "test" / "captions.json").read_text())
    assert [sorted(c) for c in captions] == [["caption", "image_id"]] * 5
    assert (folder / "result" / "test" / "captions.png").stat().st_size > 5000
    assert OmegaConf.load(folder / "config.yaml").run.init_lr == 1e-3
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))


def test_an_evaluation_beside_its_training_leaves_latest_at_what_was_trained(tiny_project):
    path = tiny_project(run={"max_epoch": 1})
    trained, _ = train(path)
    output = path.parent / "output"
    options = ["run.evaluate=true", "run.test_splits=[test]"]
    cfg = Config.load(path, [f"model.checkpoint={output / 'latest' / 'checkpoints' / 'latest'}", *options])
    run(cfg)
    assert cfg.model.checkpoint.startswith(str(trained)), "it is written down where it really is"
    assert (output / "latest").resolve() == trained
    (evaluated,) = (p for p in output.iterdir() if p.name != "latest" and p != trained)
    assert (evaluated / "result" / "test" / "captions.json").is_file()


def test_checkpoints_hold_what_is_trained_and_nothing_frozen(tiny_project):
    folder, _ = train(tiny_project(run={"max_epoch": 1}))
    names = set(load_file(folder / "checkpoints" / "latest" / "model.safetensors"))
    assert {"ln_vision.weight", "connector.proj_in.weight", "connector.layers.0.qkv.weight"} <= names
    assert not [n for n in names if n.startswith(("vision.", "language."))]


def test_a_resumed_run_gives_the_losses_and_weights_of_one_never_interrupted(tiny_project):
    dropout = {"connector": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}}
    path = tiny_project(model=dropout, run={"max_epoch": 3, "valid_splits": [], "keep_last": 9})
    folder, records = train(path)
    whole = load_file(folder / "checkpoints" / "latest" / "model.safetensors")
    resumed_folder, resumed = train(path, f"run.resume={folder / 'checkpoints' / 'step_00000006'}")
    assert resumed_folder == folder
    assert losses(resumed) == losses(records)  # the log's lines after the checkpoint are written again
    again = load_file(folder / "checkpoints" / "latest" / "model.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


def test_resume_auto_continues_the_newest_run_and_starts_where_there_is_none(tiny_project):
    path = tiny_project(run={"valid_splits": [], "max_epoch": 1})
    folder, _ = train(path, "run.resume=auto")
    again, records = train(path, "run.resume=auto", "run.max_epoch=2")
    assert again == folder and len(losses(records)) == 12


def test_equal_seeds_give_equal_runs_and_other_seeds_others(tiny_project):
    path = tiny_project(model={"checkpoint": None}, run={"max_epoch": 1, "valid_splits": []})
    first, again, other = (losses(train(path, f"run.seed={seed}")[1]) for seed in (1, 1, 2))
    assert first == again
    assert first[0] != other[0]


def test_iterations_in_inner_epochs(tiny_project):
    path = tiny_project(
        run={"max_epoch": None, "max_iters": 10, "iters_per_inner_epoch": 4, "valid_splits": ["val"]}
    )
    _, records = train(path)
    assert len(losses(records)) == 10
    assert [r["label"] for r in records if r["type"] == "evaluation"] == ["epoch1", "epoch2", "epoch3"]


def test_accumulating_two_batches_is_one_batch_of_twice_the_size(tiny_project):
    constant = {
        "lr_sched": "constant_lr",
        "valid_splits": [],
        "max_epoch": 1,
        "keep_last": 1,
        "weight_decay": 0.0,
    }
    weights = []
    for batch, accumulate in ((8, 1), (4, 2)):
        path = tiny_project(run={**constant, "batch_size_train": batch, "accum_grad_iters": accumulate})
        folder, _ = train(path)
        weights.append(load_file(folder / "checkpoints" / "latest" / "model.safetensors"))
    # the mean over tokens of two batches is not the mean over all tokens, so the two are near, not equal
    start = registry.get_model_class("evlgen_opt").from_config(Config.load(path).model).trained_state_dict()
    moved = sum((weights[0][k] - start[k]).square().sum() for k in start).sqrt()
    apart = sum((weights[0][k] - weights[1][k]).square().sum() for k in start).sqrt()
    assert apart < 0.35 * moved


def test_a_loss_that_is_not_finite_stops_a_run_in_fp32_at_once_and_names_the_samples(tiny_project):
    settings = {"max_epoch": 3, "valid_splits": [], "init_lr": 1e30, "min_lr": 0.0, "precision": "fp32"}
    with pytest.raises(TrainingError, match=r"loss became (nan|inf).*samples \['\d+'"):
        train(tiny_project(run=settings))


def test_in_bf16_steps_that_are_not_finite_are_left_out_and_too_many_in_a_row_stop_the_run(
    tiny_project, tmp_path
):
    settings = {"max_epoch": 3, "valid_splits": [], "init_lr": 1e30, "min_lr": 0.0, "precision": "bf16"}
    with pytest.raises(TrainingError, match=r"\(3 such steps in a row\), with samples \['\d+'"):
        train(tiny_project(run={**settings, "max_nonfinite_steps": 3}))
    lines = (tmp_path / "output" / "latest" / "not_finite.jsonl").read_text().splitlines()
    left_out = [json.loads(line) for line in lines]
    first = left_out[0]["iteration"]
    assert [r["iteration"] for r in left_out] == [first, first + 1, first + 2]
    assert all(len(r["batches"][0]["samples"]) == 4 for r in left_out)


def test_a_part_has_a_learning_rate_of_its_own(tiny_project):
    path = tiny_project(run={"max_epoch": 1, "valid_splits": [], "weight_decay": 0.0, "warmup_steps": 0})
    start = registry.get_model_class("evlgen_opt").from_config(Config.load(path).model).trained_state_dict()
    moved = {}
    for scale in (1.0, 0.01):
        folder, _ = train(path, f"run.lr_scale={{connector: {scale}, connector.layers: 1.0}}")
        state = load_file(folder / "checkpoints" / "latest" / "model.safetensors")
        moved[scale] = {key: (state[key] - start[key]).abs().max().item() for key in state}
    # Adam moves a weight by the rate, whatever the gradient's size
    name = "connector.proj_in.weight"
    assert moved[0.01][name] < 0.05 * moved[1.0][name]
    for name in ("connector.layers.0.qkv.weight", "ln_vision.weight"):
        assert moved[0.01][name] > 0.2 * moved[1.0][name]
    with pytest.raises(ConfigError, match="run.lr_scale.conector: .*Did you mean 'connector'"):
        train(path, "run.lr_scale={conector: 0.1}")


def test_an_output_folder_that_takes_no_files_is_named(tiny_project, tmp_path):
    (tmp_path / "file").write_text("in the way")
    path = tiny_project(run={"output_dir": str(tmp_path / "file" / "output")})
    with pytest.raises(TrainingError, match="run.output_dir .* takes no files"):
        run(Config.load(path))


def test_a_metric_that_is_no_number_does_not_make_the_best_checkpoint(caplog):
    assert deciding_metric({"val": {"agg_metrics": float("nan")}}, "val") is None
    assert "`agg_metrics` of 'val' is nan" in caplog.text
    assert deciding_metric({"a/val": {"agg_metrics": 1.0}, "b/val": {"agg_metrics": 2.0}}, "val") == 1.5


def test_what_cannot_be_trained_or_evaluated_is_named_before_a_step_is_made(tiny_project, tmp_path):
    path = tiny_project()
    for option, kind, message in [
        ("run.train_splits=[val]", DataError, r"no text to learn \(text_input\).*see run\.train_splits"),
        ("run.task=retrieval", ConfigError, "which EvlgenOPT does not have. Take model.arch: blip2"),
    ]:
        with pytest.raises(kind, match=message):
            train(path, option)
    assert not list((tmp_path / "output").rglob("step_*"))
