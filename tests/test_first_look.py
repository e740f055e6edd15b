"""What a shipped project file lacks is named before torch is imported, in the words of the full checks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from evlgen.assemble import check_nothing_missing, ready_builders
from evlgen.common.errors import DataError
from evlgen.config.config import Config, load_stages
from evlgen.files.io import PACKAGE_ROOT
from evlgen.first_look import look_for_files, what_is_missing

# one of each kind of model and data; files with stages, shards or tables are left to the full checks
PROJECTS = [
    *(
        "blip2/caption_coco_eval",
        "blip2/shapes_stage2",
        "evlgen/coco_ft",
        "evlgen/gqa_zeroshot_vicuna7b_eval",
    ),
    *("evlgen/nocaps_eval", "evlgen_video/msrvtt_ft", "evlgen_video/pretrain_webvid2m"),
    *("photos/flickr8k_small", "shapes/caption"),
]
COCO = "projects/evlgen/coco_ft.yaml"


@pytest.fixture(autouse=True)
def _nothing_here(tmp_path, monkeypatch):
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path))


def outcome(check, *args) -> str | None:
    try:
        check(*args)
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize("project", PROJECTS)
def test_the_first_look_names_what_the_full_checks_name(project):
    path = f"projects/{project}.yaml"
    options = ["model.checkpoint=none/such"] if "eval" in project else []
    assert what_is_missing(path, options) is not None
    (cfg,) = load_stages(path, options)
    assert outcome(look_for_files, path, options, []) == outcome(
        lambda: check_nothing_missing(cfg, ready_builders(cfg))
    )


@pytest.mark.parametrize(
    "option",
    ["run.task=captionin", "model.connector.rr=3", "run.max_epoch=-1", "datasets.coco=null", "run.x=1"],
)
def test_what_other_checks_name_first_is_left_to_them(option):
    assert outcome(look_for_files, COCO, [option], []) is None


def test_a_file_of_ones_own_is_left_to_the_full_checks(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text((PACKAGE_ROOT / COCO).read_text())
    assert what_is_missing(own) is None
    assert isinstance(Config.load(own), Config)


def test_a_missing_path_is_named_without_importing_torch(tmp_path):
    code = (
        "import sys; from evlgen.cli import train; status = train(sys.argv[1:])\n"
        "heavy = {'torch', 'timm', 'transformers', 'accelerate', 'numpy'} & {*sys.modules}\n"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--cfg-path", COCO, "--options", "run.num_workers=0"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"the image folder is not at {tmp_path}/coco/images" in done.stderr
    assert "imported" not in done.stderr
