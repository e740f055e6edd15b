"""Splits that have images in common."""

from __future__ import annotations

import pytest

from evlgen.assemble import build_datasets, make_builders
from evlgen.config.config import Config
from evlgen.datasets.archive_media import cell_name
from evlgen.datasets.base_dataset import BadRecord, BaseDataset, MediaDataset
from evlgen.datasets.media import ImageFiles
from evlgen.datasets.overlap import warn_of_overlap


def images(*names: str, root: str = "root") -> MediaDataset:
    return MediaDataset([{"visual": name} for name in names], ImageFiles(root), None)


def test_files_of_a_scored_split_that_are_learned_from_are_told(caplog) -> None:
    splits = {
        "train": images("a", "a", "b", "/elsewhere/c"),
        "more": images("b", "d"),
        "val": images("b", "d", "e", "e"),
        "test": images("c", root="/elsewhere"),
    }
    splits["val"].records.append(BadRecord("b", "of no use"))
    warn_of_overlap("mine", splits, ["train", "more", "of another dataset"], ["val", "test"])
    assert [record.getMessage().partition(" are ")[0] for record in caplog.records] == [
        "mine: 2 of the 3 files of split 'val'",
        "mine: 1 of the 1 files of split 'test'",
    ]


def test_images_in_tables_are_compared_by_their_bytes(caplog) -> None:
    train, val = (
        images(*(cell_name(f"{split}.parquet", "image", row, bytes_of) for row, bytes_of in enumerate(cells)))
        for split, cells in {"train": [b"a", b"b"], "val": [b"b", b"c"]}.items()
    )
    warn_of_overlap("mine", {"train": train, "val": val}, ["train"], ["val"])
    assert "mine: 1 of the 2 files of split 'val' are trained on too" in caplog.text


@pytest.mark.parametrize(
    ("train", "val"),
    [
        (images("a"), images("b")),
        (images("a"), images("a", root="other")),  # each split has a folder of its own
        (BaseDataset([1]), images("a")),
        (images("a"), BaseDataset([1])),
    ],
)
def test_splits_without_common_files_are_not(caplog, train, val) -> None:
    warn_of_overlap("mine", {"train": train, "val": val}, ["train"], ["val"])
    warn_of_overlap("mine", {"train": train, "val": train}, [], ["train"])
    assert not caplog.records


@pytest.mark.parametrize(
    ("size", "run", "warned"),
    [(1, "", True), (29, "", True), (30, "", False), (1, "run.valid_splits=[]", False), (1, "eval", False)],
)
def test_a_score_of_few_samples_is_warned_of(caplog, size, run, warned) -> None:
    options = [
        "model.arch=evlgen_opt",
        "model.model_type=shapes",
        f"datasets={{shapes_caption: {{val_size: {size}}}}}",
    ]
    options += ["run.max_epoch=1"] if run != "eval" else ["run.evaluate=true", "run.test_splits=[val]"]
    cfg = Config.load(None, [*options, *([run] if "=" in run else [])])
    build_datasets(cfg, make_builders(cfg))
    lines = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(lines) == warned
    if warned:
        assert lines[0].startswith(
            f"shapes_caption/val has {size} sample{'s' * (size > 1)}: a score of so few"
        )
