"""One project, trained on two processes without an interruption: what several tests compare with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from runners.processes import torchrun

from evlgen.loaders.data import BatchPlan


@pytest.fixture(scope="session")
def write_pair_project(write_project):
    """Writes a project for two processes with a batch of two each: epochs of five batches, in steps of two,
    two and one. All samples of the second process's third batch are broken."""
    plan = BatchPlan([20], batch_size=2, seed=42, rank=1, world_size=2)
    broken = [index for index, _ in [batch for batch, _ in zip(plan, range(3), strict=False)][2]]
    processors = {
        "vis_processor": {role: {"name": "blip_image_eval"} for role in ("train", "eval")},
        "text_processor": {role: {"name": "blip_caption"} for role in ("train", "eval")},
    }
    run = {
        "task": "ranked",
        "max_epoch": 3,
        "batch_size_train": 2,
        "accum_grad_iters": 2,
        "batch_size_eval": 2,
        "precision": "fp32",
        "valid_splits": ["one", "two", "five", "seven"],
        "save_every": 2,
        "keep_last": 99,
        "max_skipped_share": 0.5,
    }

    def write(folder):
        path = write_project(folder, model={"arch": "uneven_opt"}, run=run)
        content = OmegaConf.load(path)
        section = {"train_size": 20, "broken": " ".join(map(str, broken)), **processors}
        content.datasets = {"sized_shapes": section}
        OmegaConf.save(content, path)
        return path

    return write


@pytest.fixture(scope="session")
def pair(forks, write_pair_project, tmp_path_factory):
    """The project, the folder of its run on two processes, and how that ended."""
    project = write_pair_project(tmp_path_factory.mktemp("pair"))
    ended = torchrun(forks, project, "run.test_splits=[damaged]")
    assert ended.code == 0, ended.shown
    return SimpleNamespace(
        project=project, folder=(project.parent / "output" / "latest").resolve(), ended=ended
    )
