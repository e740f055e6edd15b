"""Stages of one project file: each starts from the weights of the one before; what is killed goes on."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from forks import ROOT
from runners.processes import QUICK
from safetensors.torch import load_file

from evlgen.assemble import run_stages
from evlgen.cli import main, train
from evlgen.common.errors import ConfigError
from evlgen.config.config import Config, load_stages
from evlgen.config.yaml_io import read_yaml

KILLER = Path(__file__).with_name("killer.py")
RUN = {"precision": "fp32", "valid_splits": [], "max_epoch": 1, "image_use_samples": 0, "batch_size_train": 4}
LORA = {"r": 2, "target_modules": ["q_proj"]}
STAGES = [
    {"name": "first"},
    {
        "name": "second",
        "model": {"language": {"lora": LORA}},
        "datasets": {"shapes_caption": {"train_size": 12}},
        "run": {"init_lr": 5e-4, "lr_scale": {"language": 0.1}, "test_splits": ["test"]},
    },
]


def weights(folder: Path) -> dict:
    return load_file(folder / "latest" / "checkpoints" / "latest" / "model.safetensors")


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def steps(folder: Path) -> list[int]:
    lines = map(json.loads, (folder / "latest" / "log.jsonl").read_text().splitlines())
    return [line["iteration"] for line in lines if line["type"] == "train"]


def starts(folder: Path) -> int:
    """How often a process worked on the newest run in a folder."""
    return json.loads((folder / "latest" / "facts.json").read_text())["starts"]


@pytest.fixture
def project(tiny_project):
    return tiny_project(datasets={"shapes_caption": {"train_size": 8}}, run=RUN, stages=STAGES)


def test_stages_follow_each_other_and_finished_ones_are_left_out(project, tmp_path):
    path, output = project, tmp_path / "output"
    assert set(run_stages(load_stages(path))) == {"test"}
    assert steps(output / "first") == [1, 2] and steps(output / "second") == [1, 2, 3]
    saved = read_yaml(output / "second" / "latest" / "config.yaml")
    assert "stages" not in saved and saved["run"]["lr_scale"] == {"language": 0.1}
    assert Path(saved["model"]["checkpoint"]) == (output / "first/latest/checkpoints/latest").resolve()
    first, second = weights(output / "first"), weights(output / "second")
    assert set(second) - set(first) == {k for k in second if "lora" in k} != set()
    moved = max(second[k].abs().max() for k in second if "lora_B" in k)  # from 0, by AdamW, in 3 iterations
    assert 0 < moved <= 3.1 * 5e-4 * saved["run"]["lr_scale"]["language"]

    # again: nothing to do; a new run of the first stage: the second one begins anew too
    old = [(output / name / "latest").resolve() for name in ("first", "second")]
    assert run_stages(load_stages(path, ["run.resume=auto"])) == {}
    assert [(output / name / "latest").resolve() for name in ("first", "second")] == old
    assert starts(output / "second") == 1
    run_stages(load_stages(path)[:1])  # stopped before its second stage
    run_stages(load_stages(path, ["run.resume=auto", "stages.second.run.test_splits=[]"]))
    assert not {(output / name / "latest").resolve() for name in ("first", "second")} & set(old)
    assert starts(output / "first") == 1
    assert equal(weights(output / "second"), second)


def test_a_finished_stage_is_trained_longer_and_tested_where_that_is_asked_for(project, tmp_path):
    output = tmp_path / "output"
    run_stages(load_stages(project))
    again = ["run.resume=auto", "stages.second.run.max_epoch=2", "stages.second.run.test_splits=[val]"]
    assert set(run_stages(load_stages(project, again))) == {"val"}
    assert steps(output / "second") == [1, 2, 3, 4, 5, 6] and starts(output / "first") == 1

    # the first one: the second begins anew, from its new weights
    run_stages(load_stages(project, [*again, "stages.first.run.max_epoch=2"]))
    assert steps(output / "first") == [1, 2, 3, 4] and starts(output / "second") == 1


def test_a_killed_stage_goes_on_to_the_same_weights(forks, project, tmp_path):
    def launch(output: str, kill_at: str = "nowhere:0") -> int:
        options = [f"run.output_dir={tmp_path / output}", "run.resume=auto", "run.task=killable"]
        options += ["run.save_every=1", "stages.second.run.test_splits=[]"]
        arguments = ("--cfg-path", str(project), "--plugins", str(KILLER), "--options", *options)
        shown = tmp_path / "shown.txt"
        return forks.run(ROOT / "train.py", *arguments, shown=shown, **QUICK, KILL_AT=kill_at)[0]

    assert launch("whole") == 0
    written = "before removing old ones:1"  # the first checkpoint is whole; a thread of its own wrote it
    assert launch("killed", written) == -signal.SIGKILL  # in the first stage
    assert launch("killed", "between stages:1") == -signal.SIGKILL
    assert not (tmp_path / "killed" / "second").exists()
    assert launch("killed", written) == -signal.SIGKILL  # in the second
    assert launch("killed") == 0
    assert equal(weights(tmp_path / "killed/second"), weights(tmp_path / "whole/second"))
    assert [starts(tmp_path / "killed" / name) for name in ("first", "second")] == [2, 2]


BAD = {
    "a key of the run section": (
        [{"name": "a"}, {"name": "b", "run": {"init_lrr": 1}}],
        r"run\.init_lrr \(.*project\.yaml, stages\[1\] 'b'\): there is no such key. Did you mean 'init_lr'",
    ),
    "a key of a stage": ([{"name": "a", "runs": {}}], r"stages\[0\]\.runs .*no such key. Did you mean 'run'"),
    "no list": ({"a": {}}, "stages .*must be a list of stages"),
    "an empty list": ([], "stages .*must be a list of stages"),
    "no mapping": (["a"], r"stages\[0\] .*must be a mapping of name, model, datasets, run"),
    "two of a name": ([{"name": "a"}, {"name": "a"}], r"stages\[1\]\.name .*two stages are called 'a'"),
    "no name for a folder": ([{"name": "a/b"}], r"stages\[0\]\.name .*must be a name for a folder"),
    "another connector": (
        [{"name": "a"}, {"name": "b", "model": {"connector": {"name": "mlp"}}}],
        r"model\.connector\.name .*stages\[1\] 'b'\): is 'mlp', and it is 'tomeformer' in stage 'a', whose",
    ),
    "frozen again": (
        [{"name": "a", "model": {"language": {"freeze": False}}}, {"name": "b"}],
        r"model\.language\.freeze .*must be false: it is trained in stage 'a'",
    ),
    "adapters left out": (
        [{"name": "a", "model": {"language": {"lora": LORA}}}, {"name": "b"}],
        r"model\.language\.lora .*must be .* in stage 'a'",
    ),
    "an evaluation": (
        [{"name": "a", "run": {"evaluate": True, "test_splits": ["test"]}}],
        "stage 'a' trains",
    ),
    "a split that is not there": (
        [{"name": "a"}, {"name": "b", "run": {"train_splits": ["trian"]}}],
        r"run\.train_splits \(.*stages\[1\] 'b'\): no dataset has a split 'trian'",
    ),
    "data that is not there": (
        [{"name": "a"}, {"name": "b", "datasets": {"image_text": {"annotations": "none.csv"}}}],
        "'none.csv' is not there",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_all_stages_are_checked_before_anything_starts(tiny_project, tmp_path, name, capsys):
    stages, message = BAD[name]
    path = tiny_project(run=RUN)
    content = {**read_yaml(path), "stages": stages}
    path.write_text(json.dumps(content))
    assert train(["--cfg-path", str(path)]) == 1
    assert not (tmp_path / "output").exists()
    with pytest.raises(Exception, match=message):
        run_stages(load_stages(path))


def test_options_for_one_stage_for_all_and_for_a_dataset_of_one(tiny_project, tmp_path):
    other = {"datasets": {"shapes_vqa": {}}, "run": {"task": "vqa"}}
    path = tiny_project(run=RUN, stages=[{}, other])
    options = ["run.seed=7", "stages.stage1.run.init_lr=0.5", "datasets.shapes_vqa.train_size=8"]
    options.append("datasets.shapes_caption.train_size=9")
    one, two = load_stages(path, options)
    assert [one.stage.name, two.stage.name] == ["stage1", "stage2"]
    assert list(one.datasets) == ["shapes_caption"] and list(two.datasets) == ["shapes_vqa"]
    assert (one.datasets.shapes_caption.train_size, two.datasets.shapes_vqa.train_size) == (9, 8)
    assert (one.run.seed, two.run.seed, one.run.init_lr, two.run.init_lr) == (7, 7, 0.5, 1e-3)
    assert one.run.output_dir == str(tmp_path / "output" / "stage1")
    assert Config.load(path).stage.name == "stage2"  # what evaluates and describes takes the last one
    for option in ("stages.stage3.run.seed=1", "stages.stage1.seed=1", "stages=[]"):
        with pytest.raises(ConfigError, match=r"write stages.NAME.run.init_lr=1e-5.*Stages: stage1, stage2"):
            load_stages(path, [option])
    with pytest.raises(ConfigError, match="has no stages"):
        Config.load(tiny_project(run=RUN), ["stages.a.run.seed=1"])
    with pytest.raises(ConfigError, match=r"(?s)stages\[0\].*stages\[1\]"):  # all problems at once
        load_stages(tiny_project(run=RUN, stages=[{"run": {"a": 1}}, {"run": {"b": 1}}]))


def test_data_check_and_estimate_report_each_stage(tiny_project, tmp_path, capsys):
    path = tiny_project(run=RUN, stages=STAGES)
    assert main(["estimate", "--cfg-path", str(path), "--rate", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("first:") < shown.index("second:")
    assert main(["data", "check", "--cfg-path", str(path), "--splits", "train", "--num-workers", "0"]) == 0
    assert "train: 12 samples" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "output").glob("*/check/report.json")} == {"report.json"}
