"""Images or videos of one's own with captions, or with questions and answers: described in YAML alone."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from evlgen.common.errors import ConfigError, DataError, did_you_mean
from evlgen.common.registry import registry
from evlgen.config.dataset_config import DatasetConfig
from evlgen.config.schema import Fraction, NonNegativeInt
from evlgen.datasets.annotations import check_inside
from evlgen.datasets.archive_media import split_cell
from evlgen.datasets.base_builder import BaseDatasetBuilder, role_of
from evlgen.datasets.base_dataset import BadRecord, BaseDataset
from evlgen.datasets.caption_dataset import CaptionDataset, CaptionEvalDataset
from evlgen.datasets.media import ImageFiles, Media, VideoFiles, is_address
from evlgen.datasets.question_annotations import read_answer_list
from evlgen.datasets.question_dataset import QuestionDataset, QuestionEvalDataset
from evlgen.datasets.records import good
from evlgen.datasets.table_folders import Tables, find_tables, split_named
from evlgen.datasets.table_records import Columns, ImageColumns, VideoColumns, count_splits, read_records
from evlgen.datasets.tables import Table, open_table
from evlgen.files.io import near_name
from evlgen.media.video import Reader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shares:
    """Which shares of the training images are held out: ``split`` in the YAML.

    Args:
        val, test: the share of the images in each; 0 is none.
        seed: other seeds choose other images.
    """

    val: Fraction = 0.0
    test: Fraction = 0.0
    seed: NonNegativeInt = 42

    @property
    def splits(self) -> list[str]:
        """The splits that get something."""
        return [split for split in ("val", "test") if getattr(self, split)]


@dataclass(frozen=True, kw_only=True)
class TableConfig(DatasetConfig):
    """The section of a dataset in tables.

    Paths in the YAML (of annotations, root, answer list) are tried from the working folder, then from the
    data root; those that start with ``./`` or ``../`` are beside the YAML file. Addresses are fetched once.

    Args:
        annotations: a table (CSV, TSV, JSON, JSON lines, Parquet), or a Hugging Face dataset folder; or one
            for each split: ``{train: my.csv, val: val.csv}``. A column ``split`` says which rows are whose.
        root: the folder, or zip or tar archive, that the names of images start from; or one for each split,
            that has a table (splits that are shares of the training images are read where those are).
            None: the table's own folder.
        split: shares of the training images that become ``val`` and ``test``. An image with all its texts
            is in one split. None: a tenth each where there is one table for everything, which has no column
            of splits, else nothing.
    """

    annotations: str | dict[str, str]
    root: str | dict[str, str] | None = None
    split: Shares | None = None


@dataclass(frozen=True, kw_only=True)
class ImageTextConfig(TableConfig):
    """The section of images and a table about them.

    Args:
        columns: what its columns are called; those left out are guessed, and the log says so.
        train_answers: of questions; see `QuestionDataset`.
        answer_list: of questions: a JSON list of the answers that ranking chooses from.
        captions_together: a training sample is an image with all its captions; see `CaptionDataset`.
    """

    columns: ImageColumns | None = None
    train_answers: Literal["sample", "all"] = "sample"
    answer_list: str | None = None
    captions_together: bool = False


@registry.register_builder("image_text")
class ImageTextBuilder(BaseDatasetBuilder):
    """Images and a table about them."""

    CONFIG: ClassVar[type[DatasetConfig]] = ImageTextConfig
    config: Any

    DEFAULT_CONFIG = "configs/datasets/image_text.yaml"

    visual = "image"
    own_columns: type[Columns] = ImageColumns

    def __init__(self, name: str, cache_root: str | Path, *section: Any, **values: Any) -> None:
        super().__init__(name, cache_root, *section, **values)
        self._key = f"datasets.{name}"
        self.annotations, self.root = self.config.annotations, self.config.root
        self.shares: Shares | None = self.config.split
        if not self.annotations:
            raise ConfigError(f"{self._key}.annotations: names no table. Give it one: my.csv.")
        self._counts: dict[tuple[Path, ...], dict[str, int]] = {}

    @property
    def splits(self) -> list[str]:
        return [*self._given_splits, *self._held_out.splits]

    def missing(self, splits: Iterable[str] | None = None) -> list[str]:
        splits = self.splits if splits is None else splits
        wanted = {text: "annotations" for text in map(self._table_path, splits)}
        wanted |= {root: "root" for root in map(self._root_of, splits) if root is not None}
        return [
            f"{self.name}: '{text}' is not there (looked at {' and '.join(places)})."
            f"{next(filter(None, map(near_name, places)), '')} Put it there, or set {self._key}.{key}."
            for text, key in wanted.items()
            if "://" not in text and not any(map(os.path.exists, places := self._places(text)))
        ]

    def build_split(self, split: str) -> BaseDataset:
        if self._held_out.splits and split in ("train", *self._held_out.splits):
            root, records = self._tables("train").root, self._divided[split]
        else:
            root, records = self._read(split, needs_text=role_of(split) == "train")
        media = self.media(root)
        media.check(
            (record["visual"] for record in good(records)),
            f"Set {self._key}.root to the folder or archive that the names start from.",
        )
        is_question = any("question" in record for record in good(records))
        return (self._question_dataset if is_question else self._caption_dataset)(split, records, media)

    @property
    def columns(self) -> Columns:
        """What the columns are called."""
        return self.config.columns or self.own_columns()

    def media(self, root: Path) -> Media:
        """Where images are read."""
        return ImageFiles(root)

    def _caption_dataset(self, split: str, records: Sequence[Any], media: Media) -> BaseDataset:
        parts = (records, media, self.vis_processor(split), self.text_processor(split))
        if role_of(split) == "train":
            return CaptionDataset(*parts, self.config.captions_together)
        return CaptionEvalDataset(*parts)

    def _question_dataset(self, split: str, records: Sequence[Any], media: Media) -> BaseDataset:
        if self.config.captions_together:
            raise ConfigError(f"{self._key}.captions_together: this is a table of questions. Take it out.")
        parts = (records, media, self.vis_processor(split), self.text_processor(split))
        if role_of(split) == "train":
            return QuestionDataset(*parts, self.config.train_answers)
        return QuestionEvalDataset(*parts, self._answers_to_rank)

    def _answers_to_rank(self) -> list[str]:
        answer_list = self.config.answer_list
        return [] if answer_list is None else read_answer_list(self._path(answer_list))

    @functools.cached_property
    def _given_splits(self) -> list[str]:
        """The splits that have a table of their own."""
        if not isinstance(self.annotations, str):
            return list(self.annotations)
        if not self._is_here:
            return ["train"]
        return self._splits_in_column or [split or "train" for split in self._found]

    @property
    def _is_here(self) -> bool:
        """Whether what ``annotations`` name can be looked at without fetching it."""
        text = self.annotations
        return not isinstance(text, str) or ("://" not in text and os.path.exists(self._path(text)))

    @functools.cached_property
    def _found(self) -> dict[str | None, Tables]:
        """The tables at the one path of ``annotations``; none where they name one for each split."""
        return find_tables(self._path(self.annotations)) if isinstance(self.annotations, str) else {}

    @functools.cached_property
    def _splits_in_column(self) -> list[str]:
        """The splits that a column of the only table tells apart."""
        if not isinstance(self.annotations, str) or not self._is_here or len(self._found) > 1:
            return []
        try:
            return list(self._split_counts(next(iter(self._found.values()))))
        except DataError:  # it is said where the table is read
            return []

    def _split_counts(self, tables: Tables, opened: Sequence[Table] = ()) -> dict[str, int]:
        """How many rows of each split there are by a column of the tables; empty where none tells."""
        files = tuple(tables.files)
        if files not in self._counts:
            opened = opened or [open_table(file) for file in files]
            self._counts[files] = count_splits(opened, self.columns, f"{self._key}.columns")
        return self._counts[files]

    @functools.cached_property
    def _held_out(self) -> Shares:
        """The shares of the training images that the other splits get."""
        given = self._given_splits
        if self.shares is None:
            is_one = isinstance(self.annotations, str) and given == ["train"] and not self._splits_in_column
            return ONE_TABLE if is_one else Shares()
        for split in self.shares.splits:
            if split in given or "train" not in given:
                why = (
                    "has annotations of its own"
                    if split in given
                    else "is a share of `train`, which has none"
                )
                raise ConfigError(f"{self._key}.split.{split}: the split {why}. Take one of them out.")
        return self.shares

    @functools.cached_property
    def _divided(self) -> Mapping[str, Sequence[Any]]:
        """The training records by split. Read once, for the same images to be divided each time."""
        if self.shares is None and len(self._split_counts(self._tables("train"))) > 1:  # of a fetched table
            return {split: self._read(split, split == "train")[1] for split in ("train", "val", "test")}
        divided = divide(self._read("train", needs_text=True)[1], self._held_out)
        sizes = ", ".join(
            f"{split} {len({r['visual'] for r in good(part)})}" for split, part in divided.items()
        )
        logger.info("%s: the images are divided by %s.split: %s", self.name, self._key, sizes)
        return divided

    def _read(self, split: str, needs_text: bool) -> tuple[Path, Sequence[Any]]:
        """The root and the records of a split that has a table."""
        tables = self._tables(split)
        opened = [open_table(file) for file in tables.files]
        of_split, has_strays = self._rows_of(split, tables, opened)
        records = read_records(
            opened,
            self.columns,
            self.visual,
            tables.root,
            f"{self._key}.columns",
            needs_text,
            of_split,
            has_strays,
        )
        if is_address(self._table_path(split)):
            check_inside((record["visual"] for record in good(records)), self._table_path(split))
        return tables.root, records

    def _rows_of(self, split: str, tables: Tables, opened: Sequence[Table]) -> tuple[str | None, bool]:
        """Which rows of its tables a split has: those of a name in their column of splits (None: all), and
        whether those in no split are among them."""
        counts, name = self._split_counts(tables, opened), split_named(split) or split
        if name in counts or not counts:
            return (name if counts else None), name == next(iter(counts), name)
        known = ", ".join(counts)
        if len(counts) > 1:
            raise DataError(
                f"{self.name}: {tables.files[0]} has no rows of the split '{split}', but of {known}. Where "
                f"its column of splits is not meant, set {self._key}.columns.split to ''."
            )
        logger.warning(
            "%s: %s is named for the split '%s', and its column of splits says %s: all its rows are taken",
            self.name,
            tables.files[0],
            split,
            known,
        )
        return None, True

    def _tables(self, split: str) -> Tables:
        path = self._path(self._table_path(split))
        found = find_tables(path)
        tables = found.get(split) or found.get(None)
        if split in self._splits_in_column:
            tables = next(iter(found.values()))
        if tables is None:
            known = ", ".join(map(str, found))
            raise DataError(f"{self.name}: {path} has no tables of the split '{split}'. Splits: {known}.")
        root = self._root_of(split)
        return tables if root is None else tables._replace(root=self._path(root))

    def _table_path(self, split: str) -> str:
        """Where the annotation of a split is, as the YAML says."""
        if isinstance(self.annotations, str):
            return self.annotations
        return self.annotations[split if split in self.annotations else "train"]

    def _root_of(self, split: str) -> str | None:
        """The root of a split, as the YAML says; those without a table share that of the training images.

        Raises:
            ConfigError: there is one for each split, and none for this one, or one for a split that has no
                table.
        """
        if not isinstance(self.root, Mapping):
            return self.root
        given = self._given_splits if self._is_here else list(self.root)
        for name in self.root:
            if name not in given:
                raise ConfigError(
                    f"{self._key}.root.{name}: no table is one of the split '{name}'."
                    f"{did_you_mean(name, given)} Splits that have one: {', '.join(given)}."
                )
        own = split if split in given else "train"
        if own not in self.root:
            raise ConfigError(
                f"{self._key}.root: names no folder or archive for the split '{own}'. Give it one "
                f"({own}: ...), or name one root for all splits."
            )
        return self.root[own]

    def _path(self, text: str) -> Path:
        """A path of the YAML: from the working folder where it is there, else from the data root."""
        if "://" in text:
            return self.storage_path(text)
        places = self._places(text)
        return Path(next(filter(os.path.exists, places), places[-1]))

    def _places(self, text: str) -> list[str]:
        """Where a path of the YAML may be."""
        return list(dict.fromkeys([os.path.abspath(os.path.expanduser(text)), str(self.storage_path(text))]))


@dataclass(frozen=True, kw_only=True)
class VideoTextConfig(ImageTextConfig):
    """The section of videos and a table about them.

    Args:
        columns: as of `ImageTextConfig`.
        video_reader: the library that decodes; see `evlgen.media.video.Video`.
    """

    columns: VideoColumns | None = None  # type: ignore[assignment]  # in place of those of images
    video_reader: Reader = "auto"


@registry.register_builder("video_text")
class VideoTextBuilder(ImageTextBuilder):
    """Videos and a table about them; see `ImageTextBuilder`."""

    CONFIG = VideoTextConfig

    DEFAULT_CONFIG = "configs/datasets/video_text.yaml"

    visual = "video"
    own_columns = VideoColumns

    def media(self, root: Path) -> Media:
        return VideoFiles(root, self.config.video_reader)


ONE_TABLE = Shares(val=0.1, test=0.1)  # of one table for everything, where nothing is said


def divide(records: Sequence[Any], shares: Shares) -> dict[str, list[Any]]:
    """Records by split, all of an image in one: those of one ``image_id``, of one name, of equal bytes.
    Images that a conversation shows together are in one split too.

    Which split an image is in follows from its id (else its name, or the digest of its bytes) and the seed,
    whatever the order of the records: the images are ordered by a digest of both, the first are the test's,
    the next validation's. `BadRecord`s stay in training.

    Raises:
        DataError: there are too few images for every split to have one.
    """
    image_of: dict[str, str] = {}
    for record in good(records):
        if (own_id := _own_id(record)) is not None or record["visual"] not in image_of:
            image_of[record["visual"]] = _content(record["visual"]) if own_id is None else str(own_id)
    _join(records, image_of)
    order = sorted(set(image_of.values()), key=lambda image: _digest(image, shares.seed))
    split_of: dict[str, str] = {}
    for split in reversed(shares.splits):
        first = len(split_of)
        count = max(1, round(getattr(shares, split) * len(order)))
        split_of.update(dict.fromkeys(order[first : first + count], split))
    if len(split_of) == len(order):
        wanted = ", ".join(["train", *shares.splits])
        raise DataError(f"{len(order)} images are too few to be divided into {wanted}: lower the shares.")
    divided: dict[str, list[Any]] = {split: [] for split in ("train", *shares.splits)}
    for record in records:
        is_bad = isinstance(record, BadRecord)
        divided["train" if is_bad else split_of.get(image_of[record["visual"]], "train")].append(record)
    return divided


def _join(records: Sequence[Any], image_of: dict[str, str]) -> None:
    """Takes images that one record shows for the same image: that of the least name."""
    least: dict[str, str] = {}

    def find(image: str) -> str:
        while image in least:
            image = least[image]
        return image

    for record in good(records):
        others = [_content(name) for _, name in record.get("visuals", ())[1:]]
        if others:
            found = sorted({find(image) for image in (image_of[record["visual"]], *others)})
            least.update(dict.fromkeys(found[1:], found[0]))
    if least:
        image_of.update({name: find(image) for name, image in image_of.items()})


def _own_id(record: Mapping[str, Any]) -> int | str | None:
    """The id that the table has for a record's image."""
    image_id, cell = record.get("image_id"), split_cell(record["visual"])
    return None if cell and image_id == cell.place else image_id


def _content(visual: str) -> str:
    """What tells an image without an id from others: the digest of its bytes, where its name has one."""
    cell = split_cell(visual)
    return cell.digest if cell and cell.digest else visual


def _digest(name: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed} {name}".encode(), digest_size=16).digest()
