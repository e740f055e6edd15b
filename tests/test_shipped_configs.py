"""Every model type and project file that is shipped holds what this version reads."""

from __future__ import annotations

import pytest

from evlgen.common.config import Config, load_model_config
from evlgen.common.io import PACKAGE_ROOT
from evlgen.common.registry import registry

TYPES = [(arch, t) for arch in registry.list_models() for t in registry.get_model_class(arch).MODEL_TYPES]
PROJECTS = sorted(p.relative_to(PACKAGE_ROOT).as_posix() for p in PACKAGE_ROOT.glob("projects/**/*.yaml"))


@pytest.mark.parametrize(("arch", "model_type"), TYPES)
def test_a_model_type_names_itself_and_its_parts(arch, model_type):
    cfg = load_model_config(arch, model_type)
    assert (cfg.arch, cfg.model_type) == (arch, model_type)
    assert cfg.vision.name and cfg.connector.name


def test_every_file_of_model_types_belongs_to_an_architecture():
    files = {p.relative_to(PACKAGE_ROOT).as_posix() for p in PACKAGE_ROOT.glob("configs/models/*/*.yaml")}
    listed = {path for arch, t in TYPES for path in [registry.get_model_class(arch).MODEL_TYPES[t]]}
    assert files == listed


@pytest.mark.parametrize("project", PROJECTS)
def test_a_project_file_is_read_without_a_complaint(project, caplog):
    cfg = Config.load(project)
    assert cfg.datasets
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
