"""Videos of the Shapes world as a captioning dataset: every frame is drawn when it is asked for."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from evlgen.common.registry import registry
from evlgen.datasets.shapes.videos import ShapesVideo, captions, is_true, moving_scene
from evlgen.datasets.shapes_dataset import ShapesCaptionBuilder, ShapesCaptionDataset
from evlgen.media.video import spread


class ShapesVideoCaptionDataset(ShapesCaptionDataset):
    """As its base, of videos: ``image`` is float32 [3, T, H, W]; see `evlgen.datasets.shapes.videos`."""

    def load_visual(self, index: int) -> torch.Tensor:
        return self.vis_processor(self.video(index))

    def visual_source(self, index: int) -> str:
        return f"shapes clips/{self.seed}/{self.split}/{self.records[index]}"

    def video(self, index: int) -> ShapesVideo:
        """The video of a record."""
        return ShapesVideo(moving_scene(self.split, self.records[index], self.seed))

    def image(self, index: int) -> Image.Image:
        """Four of the frames, in the order in which one reads."""
        video = self.video(index)
        frames = video.read(spread(len(video), 4))
        return Image.fromarray(np.vstack([np.hstack([*frames[:2]]), np.hstack([*frames[2:]])]))

    def captions_of(self, number: int) -> list[str]:
        return captions(moving_scene(self.split, number, self.seed))

    def is_true(self, caption: str, number: int) -> bool:
        return is_true(caption, moving_scene(self.split, number, self.seed))


@registry.register_builder("shapes_video_caption")
class ShapesVideoCaptionBuilder(ShapesCaptionBuilder):
    """Captioned videos of the Shapes world. Nothing is read from disk, so nothing can be missing."""

    DEFAULT_CONFIG = "configs/datasets/shapes_video_caption.yaml"
    DATA_TYPE = "videos"
    dataset_class = ShapesVideoCaptionDataset
