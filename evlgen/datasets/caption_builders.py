"""Builders of captioned pictures and clips in files. A dataset like them is a subclass of two lines."""

from __future__ import annotations

import itertools

from evlgen.common.registry import registry
from evlgen.datasets.annotations import check_inside
from evlgen.datasets.base_builder import role_of
from evlgen.datasets.base_dataset import BaseDataset
from evlgen.datasets.caption_dataset import (
    CaptionDataset,
    CaptionEvalDataset,
    read_caption_records,
    read_domains,
    read_ground_truth,
)
from evlgen.datasets.file_builder import FileBuilder
from evlgen.datasets.media import Media
from evlgen.datasets.packed import PackedRecords
from evlgen.datasets.records import good


class CaptionBuilder(FileBuilder):
    """Captioned pictures on disk: Karpathy annotations and a folder of images."""

    train_dataset = CaptionDataset
    eval_dataset = CaptionEvalDataset

    def build_split(self, split: str) -> BaseDataset:
        media, is_training = self.media(), role_of(split) == "train"
        records = self._records(split, media, captioned=is_training)
        media.check((record["visual"] for record in good(records)), self.media_remedy())
        vis_processor = self.vis_processor(split)
        if is_training:
            return self.train_dataset(records, media, vis_processor, self.text_processor(split))
        truth = self.ground_truth_file(split)
        return self.eval_dataset(
            records,
            media,
            vis_processor,
            self.text_processors.get("eval"),
            read_ground_truth(truth) if truth else None,
            read_domains(truth) if truth else None,
        )

    def _records(self, split: str, media: Media, captioned: bool) -> PackedRecords:
        files = []
        for file, is_foreign in self.annotation_files(split):
            records = read_caption_records(file, captioned, media.root)
            if is_foreign:
                check_inside((record["visual"] for record in good(records)), file)
            files.append(records)
        return files[0] if len(files) == 1 else PackedRecords(itertools.chain.from_iterable(files))


@registry.register_builder("coco_caption")
class CocoCaptionBuilder(CaptionBuilder):
    """COCO captions in Karpathy's splits (Karpathy and Fei-Fei, CVPR 2015), as LAVIS distributes them."""

    DEFAULT_CONFIG = "configs/datasets/coco_caption.yaml"
