"""Fixtures shared by all tests: golden numbers of the published implementation, and real data where it is
present."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import Forks

ROOT = Path(__file__).resolve().parent.parent
JAVA_HOME = os.environ.get("JAVA_HOME", "")


@pytest.fixture(scope="session", autouse=True)
def without_java(tmp_path_factory):
    """Captions are scored without Java, which takes seconds to start at every evaluation."""
    java = tmp_path_factory.mktemp("without_java") / "bin" / "java"
    java.parent.mkdir()
    java.write_text("#!/bin/sh\necho 'Java is not used in most tests' >&2\nexit 1\n")
    java.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAVA_HOME", str(java.parent.parent))
        yield


@pytest.fixture(scope="module")
def with_java(without_java):
    """Tests of this module use the Java of this machine, where there is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAVA_HOME", JAVA_HOME)
        yield


# Where this package and the libraries below it keep what they download and compute.
_CACHES = {
    "EVLGEN_CACHE": "evlgen",
    "XDG_CACHE_HOME": "",
    "XDG_CONFIG_HOME": "config",
    "MPLCONFIGDIR": "matplotlib",
    "HF_HOME": "huggingface",
    "TORCH_HOME": "torch",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_HOME": "triton",
    "FVCORE_CACHE": "iopath",
    "RUSTUP_HOME": "rustup",  # pip asks rustc for its version
    "WANDB_CACHE_DIR": "wandb",
    "WANDB_CONFIG_DIR": "wandb-config",
}


def pytest_configure(config):
    """Tests write into folders of their own, and need no network: nothing of the user's home is read or
    changed. The processes of pytest-xdist, and those that tests start, share the folder of the first one."""
    if hasattr(config, "workerinput"):
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = Path(tempfile.mkdtemp(prefix="evlgen-tests-"))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    for name, part in _CACHES.items():
        (folder / part).mkdir(exist_ok=True)
        os.environ[name] = str(folder / part)


@pytest.fixture(autouse=True)
def logging_as_before():
    """A command that runs in this process sets up the terminal's log: that ends with its test."""
    loggers = (logging.getLogger(), logging.getLogger("evlgen"), logging.getLogger("evlgen.config.layers"))
    handlers, levels = list(loggers[0].handlers), [logger.level for logger in loggers]
    yield
    loggers[0].handlers[:] = [h for h in loggers[0].handlers if h in handlers or not _is_ours(h)]
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def _is_ours(handler: logging.Handler) -> bool:
    return type(handler).__module__.startswith("evlgen")


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs programs in processes of their own that need not import everything again."""
    with Forks(PYTHONHASHSEED="0") as forks:
        yield forks


@pytest.fixture(scope="session")
def golden() -> Path:
    """Small reference numbers of the published implementation, kept in the repository."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real photographs, videos and broken files beside the checkout; tests that need them skip where they are
    absent."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"real data for development is not at {folder / 'data'}")
    return folder


@pytest.fixture(scope="session")
def write_project(golden):
    """Writes a project file around the golden model (a few thousand weights) and the Shapes world into a
    folder, where the run's ``output`` goes too; returns its path.

    Call it with changes: ``write_project(folder, run={"max_iters": 3})``.
    """
    from omegaconf import OmegaConf

    def write(into, **sections):
        model = OmegaConf.load(golden / "evlgen_opt" / "model.yaml").model
        folder = golden / "evlgen_opt"
        model.checkpoint = str(folder / model.checkpoint)
        model.vision.pretrained = str(folder / model.vision.pretrained)
        model.language.name = str(folder / model.language.name)
        content = OmegaConf.create(
            {
                "model": model,
                "datasets": {"shapes_caption": {"train_size": 24, "val_size": 6, "test_size": 5}},
                "run": {
                    "task": "captioning",
                    "max_epoch": 2,
                    "batch_size_train": 4,
                    "batch_size_eval": 4,
                    "init_lr": 1e-3,
                    "num_workers": 0,
                    "num_beams": 1,
                    "max_len": 5,
                    "log_freq": 1,
                    "tensorboard": False,
                    "metrics": ["bleu", "cider"],
                    "output_dir": str(into / "output"),
                },
            }
        )
        path = into / "project.yaml"
        OmegaConf.save(OmegaConf.merge(content, OmegaConf.create(sections)), path)
        return path

    return write


@pytest.fixture
def tiny_project(write_project, tmp_path):
    """`write_project` into the test's own folder: ``tiny_project(run={"max_iters": 3})``."""
    return functools.partial(write_project, tmp_path)
