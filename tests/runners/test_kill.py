"""A run killed with SIGKILL again and again ends as one that was never interrupted, bit for bit, whatever the
hash seeds of the interpreters that it goes on in."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import ROOT, Forks
from runners.processes import QUICK

KILLER = Path(__file__).with_name("killer.py")

PLACES = [
    "before a batch",
    "before a backward pass",  # with accumulation: of the first or the second batch of a step
    "validation",
    "scoring",
    "scored",
    "copying",
    "before writing",
    "half a file",
    "before renaming",
    "before latest",
    "before removing old ones",
]
# of a save, of training and of an evaluation
QUICK_PLACES = ["half a file", "before latest", "before a backward pass", "scoring"]

TEXTS = """
import hashlib
from evlgen.datasets.shapes import captions, questions, videos, world
digest = hashlib.sha256()
for index in range(800):
    digest.update("|".join(captions.captions(world.scene("train", index))).encode())
for index in range(30):
    digest.update("|".join(videos.captions(videos.moving_scene("train", index, 0))).encode())
    digest.update(repr(questions.question("train", index, 0)).encode())
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def seeded_forks(forks) -> Iterator[tuple[Forks, Forks]]:
    """With two hash seeds, which decide the order of sets of strings."""
    with Forks(PYTHONHASHSEED="1") as other:
        yield forks, other


def train(forks: Forks, project: Path, *options: str, **environment: str) -> tuple[int, str]:
    arguments = ("--cfg-path", str(project), "--plugins", str(KILLER), "--options", *options)
    return forks.run(
        ROOT / "train.py", *arguments, shown=project.with_name("shown.txt"), **QUICK, **environment
    )


def outcome(folder: Path) -> dict[str, object]:
    """Everything a run gives, but times, and how often it went back behind a checkpoint that it had."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for record in records:
        for key in ("time", "seconds", "samples_per_s", "trained_seconds"):
            record.pop(key, None)
    files = {
        name: (folder / "checkpoints" / "latest" / name).read_bytes()
        for name in (
            "model.safetensors",
            "training_state/optimizer.safetensors",
            "training_state/random.safetensors",
            "training_state/progress.json",
        )
    }
    progress = json.loads(files["training_state/progress.json"])
    del progress["rewinds"]
    files["training_state/progress.json"] = progress
    links = {name: os.readlink(folder / "checkpoints" / name) for name in ("latest", "best")}
    return {"records": records, "files": files, "links": links}


@pytest.mark.parametrize(
    ("places", "moments"),
    [(QUICK_PLACES, 1), pytest.param(PLACES, 3, marks=pytest.mark.slow)],
    ids=["some places", "every place"],
)
def test_a_run_killed_at_any_moment_ends_as_one_never_interrupted(
    seeded_forks, tiny_project, tmp_path, places, moments
):
    settings = {
        "task": "killable",
        "max_epoch": 3 if places is QUICK_PLACES else 6,
        "accum_grad_iters": 2,
        "num_workers": 2,
        "save_every": 3,
        "metrics": ["bleu", "cider"],
        "test_splits": ["test"],
    }
    project = tiny_project(
        model={"connector": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}},
        datasets={"shapes_caption": {"train_size": 40}},
        run=settings,
    )
    forks = itertools.cycle(seeded_forks)

    def launch(*options: str, kill_at: str = "nowhere:0") -> tuple[int, str]:
        return train(next(forks), project, *options, KILL_AT=kill_at)

    code, shown = launch(f"run.output_dir={tmp_path / 'whole'}")
    assert code == 0, shown
    expected = outcome(tmp_path / "whole" / "latest")
    assert len([r for r in expected["records"] if r["type"] == "train"]) == 5 * settings["max_epoch"]

    choice = random.Random(1)
    killed = tmp_path / "killed"
    options = [f"run.output_dir={killed}", "run.resume=auto"]
    for place in places:
        times = choice.randint(2, 6) if place.startswith("before a b") else choice.randint(1, 2)
        code, shown = launch(*options, kill_at=f"{place}:{times}")
        assert code == -signal.SIGKILL, f"{place}:{times}\n{shown}"
    for _ in range(moments):
        code, shown = launch(*options, kill_at=f"seconds:{choice.uniform(0, 0.5)}")
        assert code == -signal.SIGKILL, shown
    code, shown = launch(*options)
    assert code == 0, shown

    runs = [p for p in killed.iterdir() if not p.is_symlink()]
    ended = outcome(killed / "latest")
    assert ended["records"] == expected["records"]
    assert ended["links"] == expected["links"]
    for name, content in expected["files"].items():
        assert ended["files"][name] == content, name
    checkpoints = {p.name for run in runs for p in (run / "checkpoints").glob("*")}
    assert not [name for name in checkpoints if name.startswith(".step")]


def test_texts_are_the_same_whatever_the_interpreters_hash_seed_is(seeded_forks, tmp_path):
    program = tmp_path / "texts.py"
    program.write_text(TEXTS)
    one, other = (fork.run(program, shown=tmp_path / "shown.txt") for fork in seeded_forks)
    assert one == other and one[0] == 0


def test_a_run_goes_on_bit_for_bit_whatever_the_interpreters_hash_seed_is(
    seeded_forks, tiny_project, tmp_path
):
    project = tiny_project(
        datasets={"shapes_caption": {"train_size": 512}},
        run={
            **{"task": "killable", "max_epoch": None, "max_iters": 8, "batch_size_train": 64},
            **{"save_every": 4, "iters_per_inner_epoch": 4, "keep_last": 9},
        },
    )
    whole = tmp_path / "whole"
    one, other = seeded_forks
    code, shown = train(one, project, f"run.output_dir={whole}")
    assert code == 0, shown
    expected = outcome(whole / "latest")
    code, shown = train(other, project, f"run.resume={whole}/latest/checkpoints/step_00000004")
    assert code == 0, shown
    assert outcome(whole / "latest") == expected
