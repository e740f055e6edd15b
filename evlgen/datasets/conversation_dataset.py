"""Conversations with images and videos at their places: to learn the assistant's turns, and to answer."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from evlgen.common.errors import DataError
from evlgen.common.registry import registry
from evlgen.datasets.annotations import check_inside
from evlgen.datasets.base_builder import role_of
from evlgen.datasets.base_dataset import BaseDataset, SequenceDataset, about_positions
from evlgen.datasets.conversation_records import read_conversations
from evlgen.datasets.media import ImageFiles, Media, VideoFiles, is_address
from evlgen.datasets.records import good
from evlgen.datasets.table_dataset import ImageTextBuilder, TableConfig
from evlgen.datasets.table_records import Columns, ImageColumns
from evlgen.datasets.tables import open_table
from evlgen.media.frames import decode_address, is_data_address
from evlgen.media.images import open_image
from evlgen.media.video import FrameList, Reader
from evlgen.processors.base_processor import BaseProcessor
from evlgen.processors.video import VideoProcessor

logger = logging.getLogger(__name__)

_LONGEST_ID = 200  # characters: an address may hold a whole image


class ConversationDataset(SequenceDataset):
    """One sample per conversation: ``messages`` (a list of ``{"role", "content"}``), ``images`` (a list of
    its images float32 [3, H, W] and videos [3, T, H, W], in the order of their places), ``instance_id``.

    Args:
        records: of `read_conversations`.
        media, videos: where images and videos are read.
        vis_processor: of images; or one of videos, to which an image is a video of one frame.
        learned: whether the last answer is in the sample; else it is what an answer is compared with.
    """

    def __init__(
        self,
        records: Sequence[Any],
        media: Media,
        videos: Media,
        vis_processor: BaseProcessor,
        learned: bool,
    ) -> None:
        super().__init__(records, vis_processor)
        self.media, self.videos, self.learned = media, videos, learned

    def load_text(self, index: int) -> dict[str, Any]:
        return {"messages": self._messages(self.records[index]), "instance_id": str(index)}

    def visuals(self, index: int) -> list[tuple[str, str]]:
        """Kind (``image``, ``video``) and name of each."""
        record = self.records[index]
        contents = [message["content"] for message in self._messages(record)]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        return record["visuals"][: sum(part["type"] != "text" for part in parts)]

    def load_one(self, visual: tuple[str, str]) -> torch.Tensor:
        kind, name = visual
        check_reads(self.vis_processor, kind, name)
        found = self._open(name) if kind == "image" else self.videos.open(name)
        return self.vis_processor(frames_of(self.vis_processor, found))

    def source_of(self, visual: tuple[str, str]) -> Hashable:
        kind, name = visual
        if is_data_address(name):
            return kind, hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        return kind, (self.media if kind == "image" else self.videos).source(name)

    def _messages(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        messages = record["messages"]
        return messages if self.learned else messages[:-1]

    def sample_id(self, index: int) -> str:
        record = self.records[index]
        if not isinstance(record, dict):
            return record.id
        return str(record.get("id", record["visual"]))[:_LONGEST_ID]

    def references(self) -> dict[int | str, list[str]]:
        """The right last answers of each conversation, by index."""
        found: dict[int | str, list[str]] = {}
        for index, record in enumerate(self.records):
            if isinstance(record, dict):
                answer = record["messages"][-1]["content"]
                if isinstance(answer, str):
                    found[index] = list(dict.fromkeys([answer, *record.get("references", [])]))
        return found

    def domains(self) -> dict[int | str, str]:
        """The records' ``source``, by index."""
        records = enumerate(self.records)
        return {i: str(r["source"]) for i, r in records if isinstance(r, dict) and "source" in r}

    def image(self, index: int) -> Image.Image | None:
        visuals = self.records[index]["visuals"]
        if not visuals:
            return None
        kind, name = visuals[0]
        return self._open(name) if kind == "image" else self.videos.image(name)

    def size(self, index: int) -> int:
        """About how many positions a sample takes, for batches of samples of similar length."""
        record = self.records[index]
        if not isinstance(record, dict):
            return 0
        texts = [str(message["content"]) for message in record["messages"]]
        return about_positions(*texts, num_images=len(record["visuals"]))

    def _open(self, name: str) -> Image.Image:
        if is_data_address(name):
            return open_image(decode_address(name))
        return self.media.open(name, getattr(self.vis_processor, "draft_size", None))


def check_reads(vis_processor: BaseProcessor, kind: str, name: str) -> None:
    """Raises `DataError` for a video where the processor is one of images."""
    if kind == "video" and not isinstance(vis_processor, VideoProcessor):
        raise DataError(
            f"{name} is a video, and the model reads images only. Set model.vision.temporal and "
            "vis_processor: {name: alpro_video_eval}, or leave such conversations out.",
            "a video for a model of images",
        )


def frames_of(vis_processor: BaseProcessor, visual: Any) -> Any:
    """An image or a video as the processor takes it: to one of videos an image is a video of one frame."""
    is_frame = isinstance(visual, Image.Image) and isinstance(vis_processor, VideoProcessor)
    return FrameList([visual]) if is_frame else visual


@dataclass(frozen=True, kw_only=True)
class ConversationsConfig(TableConfig):
    """The section of conversations in tables.

    Args:
        annotations, root, split: as of `TableConfig`; a split of held out images takes all conversations
            about them.
        text_processor: nothing goes through it.
        split_column: the column that says which rows are of which split; None: ``split``, where there is one.
        video_reader: see `evlgen.media.video.Video`.
    """

    text_processor: dict[str, Any] | None = None  # type: ignore[assignment]  # it may be left out
    split_column: str | None = None
    video_reader: Reader = "auto"


@registry.register_builder("conversations")
class ConversationsBuilder(ImageTextBuilder):
    """Conversations in tables (JSON, JSON lines, Parquet, Arrow), in the layouts of
    `evlgen.datasets.conversation_records`."""

    CONFIG = ConversationsConfig
    DEFAULT_CONFIG = "configs/datasets/conversations.yaml"

    @property
    def columns(self) -> Columns:
        return ImageColumns(split=self.config.split_column)

    def build_split(self, split: str) -> BaseDataset:
        if self._held_out.splits and split in ("train", *self._held_out.splits):
            root, records = self._tables("train").root, self._divided[split]
        else:
            root, records = self._read(split, needs_text=True)
        media = ImageFiles(root)
        names = [n for r in good(records) for k, n in r["visuals"] if k == "image" and not is_data_address(n)]
        if names:
            media.check(names, f"Set {self._key}.root to the folder or archive that the names start from.")
        return ConversationDataset(
            records,
            media,
            VideoFiles(root, self.config.video_reader),
            self.vis_processor(split),
            learned=role_of(split) == "train",
        )

    def _read(self, split: str, needs_text: bool) -> tuple[Path, Sequence[Any]]:
        tables = self._tables(split)
        opened = [open_table(file) for file in tables.files]
        of_split, _ = self._rows_of(split, tables, opened)
        records = read_conversations(opened, of_split, self.columns.split or "split")
        if is_address(self._table_path(split)):
            check_inside((name for r in good(records) for _, name in r["visuals"]), self._table_path(split))
        return tables.root, records


@registry.register_builder("llava_pretrain")
class LlavaPretrainBuilder(ConversationsBuilder):
    """LLaVA's 558,000 image-text pairs of LAION, CC and SBU (Liu et al., NeurIPS 2023)."""

    DEFAULT_CONFIG = "configs/datasets/llava_pretrain.yaml"


@registry.register_builder("llava_instruct")
class LlavaInstructBuilder(ConversationsBuilder):
    """LLaVA-1.5's mixture of 665,000 instructions (Liu et al., CVPR 2024)."""

    DEFAULT_CONFIG = "configs/datasets/llava_instruct.yaml"


@registry.register_builder("cauldron")
class CauldronBuilder(ConversationsBuilder):
    """A part of the Cauldron (Laurençon et al., 2024): a folder of Parquet files with ``images`` and
    ``texts``."""

    DEFAULT_CONFIG = "configs/datasets/cauldron.yaml"
