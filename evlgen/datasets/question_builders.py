"""Builders of questions about images and videos in files. A dataset like them is a subclass of two lines."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Literal

from evlgen.common.errors import DataError
from evlgen.common.registry import registry
from evlgen.config.build_info import Source
from evlgen.config.constraints import PositiveFloat
from evlgen.datasets.annotations import check_inside
from evlgen.datasets.base_builder import role_of
from evlgen.datasets.file_builder import FileBuilder, FileConfig
from evlgen.datasets.question_annotations import QuestionFiles, read_answer_list, read_questions
from evlgen.datasets.question_dataset import QuestionDataset, QuestionEvalDataset, QuestionMediaDataset
from evlgen.datasets.records import good
from evlgen.files.io import near_name

_ANSWER_SPLIT = "ans2label"  # where LAVIS's video questions name their list of answers, among the splits


@dataclass(frozen=True, kw_only=True)
class QuestionConfig(FileConfig):
    """The section of a dataset of questions in files.

    Args:
        train_answers, answer_weight: see `QuestionDataset`.
        answer_list: the answers that ranking chooses from. As in LAVIS it may also be the second file of a
            split's annotations, or the split ``ans2label``.
    """

    train_answers: Literal["sample", "all"] = "sample"
    answer_weight: PositiveFloat = 1.0
    answer_list: Source | None = None


class QuestionBuilder(FileBuilder):
    """Questions on disk, in the layouts of `read_questions`, and a folder of images or videos."""

    CONFIG = QuestionConfig
    config: QuestionConfig

    @property
    def splits(self) -> list[str]:
        return [split for split in super().splits if split != _ANSWER_SPLIT]

    def build_split(self, split: str) -> QuestionMediaDataset:
        learned = role_of(split) == "train"
        found, media = self._read(split, scored=not learned), self.media()
        media.check((record["visual"] for record in good(found.records)), self.media_remedy())
        parts = (found.records, media, self.vis_processor(split), self.text_processor(split))
        if learned:
            return QuestionDataset(*parts, self.config.train_answers, self.config.answer_weight)
        candidates = partial(list, found.answer_list) if found.answer_list else self._answer_list
        return QuestionEvalDataset(*parts, candidates)

    def _read(self, split: str, scored: bool) -> QuestionFiles:
        files = self.annotation_files(split)
        found = read_questions([path for path, _ in files], self.ground_truth_file(split), scored)
        foreign = [str(path) for path, is_foreign in files if is_foreign]
        if foreign:
            check_inside((record["visual"] for record in good(found.records)), ", ".join(foreign))
        return found

    def _answer_list(self) -> list[str]:
        source = self.config.answer_list or self.build_info.annotations.get(_ANSWER_SPLIT)
        if source is None:
            return []
        path = self.source_path(source)
        if not os.path.isfile(path):
            fetch = "".join(f" Download {address} to that path." for address in source.downloads())
            near = near_name(path)
            raise DataError(f"{self.name}: the list of answers to rank is not at {path}.{near}{fetch}")
        return read_answer_list(path)


@registry.register_builder("coco_vqa")
class CocoVQABuilder(QuestionBuilder):
    """VQAv2 (Goyal et al., CVPR 2017): ten people's answers to each question about COCO's images."""

    DEFAULT_CONFIG = "configs/datasets/coco_vqa.yaml"


@registry.register_builder("vg_vqa")
class VGVQABuilder(QuestionBuilder):
    """Visual Genome's questions (Krishna et al., IJCV 2017), for training."""

    DEFAULT_CONFIG = "configs/datasets/vg_vqa.yaml"


@registry.register_builder("ok_vqa")
class OKVQABuilder(QuestionBuilder):
    """OK-VQA (Marino et al., CVPR 2019): questions that need outside knowledge."""

    DEFAULT_CONFIG = "configs/datasets/ok_vqa.yaml"


@registry.register_builder("aok_vqa")
class AOKVQABuilder(QuestionBuilder):
    """A-OKVQA (Schwenk et al., ECCV 2022): four choices and ten direct answers to each question."""

    DEFAULT_CONFIG = "configs/datasets/aok_vqa.yaml"


@registry.register_builder("gqa")
class GQABuilder(QuestionBuilder):
    """GQA (Hudson and Manning, CVPR 2019): questions made from scene graphs, with one answer each."""

    DEFAULT_CONFIG = "configs/datasets/gqa.yaml"


@registry.register_builder("msrvtt_qa")
class MSRVTTQABuilder(QuestionBuilder):
    """MSRVTT-QA (Xu et al., ACM MM 2017): questions made from MSR-VTT's captions, with one answer each."""

    DEFAULT_CONFIG = "configs/datasets/msrvtt_qa.yaml"


@registry.register_builder("msvd_qa")
class MSVDQABuilder(QuestionBuilder):
    """MSVD-QA (Xu et al., ACM MM 2017): questions made from MSVD's captions, with one answer each."""

    DEFAULT_CONFIG = "configs/datasets/msvd_qa.yaml"
