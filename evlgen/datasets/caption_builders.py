"""Builders of captioned images and videos in files. A dataset like them is a subclass of two lines."""

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
from evlgen.datasets.compact_records import PackedRecords
from evlgen.datasets.file_builder import FileBuilder
from evlgen.datasets.media import Media
from evlgen.datasets.records import good


class CaptionBuilder(FileBuilder):
    """Captioned images or videos on disk: annotations in any layout that `read_caption_records` reads, and a
    folder of media."""

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


@registry.register_builder("nocaps")
class NocapsBuilder(CaptionBuilder):
    """nocaps (Agrawal et al., ICCV 2019): images to write captions of; there is no training split."""

    DEFAULT_CONFIG = "configs/datasets/nocaps.yaml"


@registry.register_builder("flickr30k")
class Flickr30kBuilder(CaptionBuilder):
    """Flickr30k captions (Young et al., TACL 2014) in Karpathy's splits."""

    DEFAULT_CONFIG = "configs/datasets/flickr30k.yaml"


@registry.register_builder("coco_retrieval")
class CocoRetrievalBuilder(CaptionBuilder):
    """COCO's captions for retrieval: those of `CocoCaptionBuilder`, without a ground truth."""

    DEFAULT_CONFIG = "configs/datasets/coco_retrieval.yaml"


@registry.register_builder("flickr30k_retrieval")
class Flickr30kRetrievalBuilder(CaptionBuilder):
    """Flickr30k's captions for retrieval, which LAVIS calls ``flickr30k``: those of `Flickr30kBuilder`."""

    DEFAULT_CONFIG = "configs/datasets/flickr30k_retrieval.yaml"


@registry.register_builder("msrvtt_retrieval")
class MsrvttRetrievalBuilder(CaptionBuilder):
    """MSR-VTT's captions for retrieval, in splits of their own."""

    DEFAULT_CONFIG = "configs/datasets/msrvtt_retrieval.yaml"


@registry.register_builder("vg_caption")
class VgCaptionBuilder(CaptionBuilder):
    """Region descriptions of Visual Genome (Krishna et al., IJCV 2017) as captions of whole images."""

    DEFAULT_CONFIG = "configs/datasets/vg_caption.yaml"


@registry.register_builder("conceptual_caption_3m")
class ConceptualCaption3mBuilder(CaptionBuilder):
    """Conceptual Captions (Sharma et al., ACL 2018)."""

    DEFAULT_CONFIG = "configs/datasets/conceptual_caption_3m.yaml"


@registry.register_builder("conceptual_caption_12m")
class ConceptualCaption12mBuilder(CaptionBuilder):
    """Conceptual 12M (Changpinyo et al., CVPR 2021)."""

    DEFAULT_CONFIG = "configs/datasets/conceptual_caption_12m.yaml"


@registry.register_builder("sbu_caption")
class SbuCaptionBuilder(CaptionBuilder):
    """SBU captions (Ordonez et al., NIPS 2011)."""

    DEFAULT_CONFIG = "configs/datasets/sbu_caption.yaml"


@registry.register_builder("msrvtt_caption")
class MsrvttCaptionBuilder(CaptionBuilder):
    """Videos of MSR-VTT with captions (Xu et al., CVPR 2016)."""

    DEFAULT_CONFIG = "configs/datasets/msrvtt_caption.yaml"


@registry.register_builder("msvd_caption")
class MsvdCaptionBuilder(CaptionBuilder):
    """Videos of MSVD with captions (Chen and Dolan, ACL 2011)."""

    DEFAULT_CONFIG = "configs/datasets/msvd_caption.yaml"


@registry.register_builder("vatex_caption")
class VatexCaptionBuilder(CaptionBuilder):
    """Videos of VATEX with English captions (Wang et al., ICCV 2019)."""

    DEFAULT_CONFIG = "configs/datasets/vatex_caption.yaml"


@registry.register_builder("webvid_2m")
class Webvid2mBuilder(CaptionBuilder):
    """WebVid with 2.5 million videos (Bain et al., ICCV 2021)."""

    DEFAULT_CONFIG = "configs/datasets/webvid_2m.yaml"


@registry.register_builder("webvid_10m")
class Webvid10mBuilder(CaptionBuilder):
    """WebVid with 10 million videos (Bain et al., ICCV 2021)."""

    DEFAULT_CONFIG = "configs/datasets/webvid_10m.yaml"
