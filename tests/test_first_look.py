"""What a project file lacks is named before torch is imported, in the words of the full checks."""

from __future__ import annotations

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from evlgen.assemble import check_nothing_missing, ready_builders
from evlgen.common.errors import DataError
from evlgen.config.config import load_stages
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


@pytest.fixture
def own(tmp_path):
    """Writes a file of one's own, a shipped one but for some keys."""

    def write(project, **sections):
        path = tmp_path / "own.yaml"
        shipped = OmegaConf.load(PACKAGE_ROOT / f"projects/{project}.yaml")
        OmegaConf.save(OmegaConf.merge(shipped, OmegaConf.create(sections)), path)
        return path

    return write


IMAGES = {"build_info": {"images": {"storage": "my/photos"}}}


@pytest.mark.parametrize(
    ("project", "sections"),
    [
        ("evlgen/coco_ft", {"datasets": {"coco_caption": IMAGES}, "model": {"connector": {"r": 10}}}),
        ("evlgen_video/msrvtt_ft", {"model": {"vision": {"pretrained": "my.pth"}, "checkpoint": "mine"}}),
    ],
)
def test_it_names_the_same_for_a_file_of_ones_own(own, project, sections):
    path = own(project, **sections)
    named = outcome(look_for_files, path, [], [])
    (cfg,) = load_stages(path)
    assert named is not None and named == outcome(lambda: check_nothing_missing(cfg, ready_builders(cfg)))
    assert ("my/photos. Put it there" in named) == ("datasets" in sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"datasets": {"coco_caption": {"build_info": {"image": {"storage": "my/photos"}}}}},
        {"model": {"vision": {"pretraind": "my.pth"}}},
        {"model": {"connector": {"inti": None}}},
        {"run": {"max_epochs": 3}},
        {"plugins": ["mine.py"]},
    ],
)
def test_misspelled_keys_and_parts_of_ones_own_are_left_to_the_full_checks(own, sections):
    assert what_is_missing(own("evlgen/coco_ft")) is not None
    assert what_is_missing(own("evlgen/coco_ft", **sections)) is None


@pytest.mark.parametrize("more", ["", "run: 5", "run: {max_epoch: 1}\nenv: 5", "env: {cache_root: 3}"])
def test_a_file_without_a_run_or_with_something_else_in_its_place_is_no_crash(tmp_path, more):
    path = tmp_path / "own.yaml"
    path.write_text(
        f"model: {{arch: evlgen_opt, model_type: shapes}}\ndatasets: {{coco_caption: {{}}}}\n{more}"
    )
    named = outcome(look_for_files, path, [], [])
    assert (named is None) == bool(more) and (more or "coco" in named)


def test_a_missing_path_is_named_without_importing_torch(own, tmp_path):
    code = (
        "import sys; from evlgen.cli import train; status = train(sys.argv[1:])\n"
        "heavy = {'torch', 'timm', 'transformers', 'accelerate', 'numpy'} & {*sys.modules}\n"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    path = own("evlgen/coco_ft", datasets={"coco_caption": IMAGES})
    done = subprocess.run(
        [sys.executable, "-c", code, "--cfg-path", str(path), "--options", "run.num_workers=0"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"the image folder is not at {tmp_path}/my/photos" in done.stderr
    assert "imported" not in done.stderr
