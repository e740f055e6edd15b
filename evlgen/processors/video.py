"""Video processors: a video -> normalised pixels of some of its frames, float32 [3, T, H, W].

Names, steps and defaults are those of LAVIS (`lavis/processors/alpro_processors.py`; which frames:
`load_video` in `lavis/datasets/data_utils.py`), with these differences:

- A video of fewer frames than ``n_frms`` gives some of them more than once, and an odd ``n_frms`` gives that
  many, a single one being any of the video's: all samples have one shape. (LAVIS gives fewer, which cannot be
  batched.)
- In training the random part is cut from the frame as it was decoded and resized once. LAVIS resizes the
  frame to the final size, and the part of it again.
- ``augment: lavis`` changes every frame of a video in the same way. LAVIS draws the same operations for all
  frames, and the direction of a shift, shear or rotation for each frame again.
- Random choices come from torch's global generator only, so seeding it repeats them.

EVLGen's processors (yiren-jian/EVLGen, the same file) have the same names and do not augment: ``augment:
none``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from evlgen.common.errors import DataError
from evlgen.common.registry import registry
from evlgen.config.constraints import Fraction, PositiveInt
from evlgen.media.video import Box, Video, VideoSource, spread
from evlgen.processors.base_processor import BaseProcessor
from evlgen.processors.image import Normalisation, check_scales
from evlgen.processors.randaugment import OPERATIONS, RandAugment

# LAVIS's choice for video: all but one.
_OPERATIONS = tuple(name for name in OPERATIONS if name != "AutoContrast")
_RATIOS = (3 / 4, 4 / 3)  # of the sides of a random part, as in LAVIS


class VideoProcessor(BaseProcessor):
    """Chooses frames, reads them at the final size, normalises. A subclass may choose and change them.

    Args:
        image_size: height and width; the frame's proportions are not kept.
        mean, std: see `Normalisation`.
        n_frms: frames of every video; None: all that it has.
    """

    def __init__(
        self,
        image_size: PositiveInt,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        n_frms: PositiveInt | None = None,
    ) -> None:
        self.image_size, self.n_frms = image_size, n_frms
        self._normalise = Normalisation(mean, std)

    def __call__(self, item: VideoSource | str | os.PathLike) -> torch.Tensor:
        """Normalised pixels, float32 [3, T, H, W], of a video or of the video at a path.

        Raises:
            DataError: the item is neither, or the video cannot be read.
        """
        if not isinstance(item, VideoSource | str | os.PathLike):
            raise DataError(
                f"expected a video or the path of one, got {type(item).__name__}. Frames in memory: "
                "evlgen.media.video.FrameList(frames); images: an image processor, blip_image_eval."
            )
        video = item if isinstance(item, VideoSource) else Video(item)
        count = len(video)
        indices = range(count) if self.n_frms is None else self.choose(count, self.n_frms)
        frames = torch.from_numpy(self.read(video, indices))  # [T, H, W, 3] uint8
        return self._normalise(frames.movedim(-1, 0))

    def choose(self, count: int, wanted: int) -> list[int]:
        """Which ``wanted`` of ``count`` frames, ascending: evenly spaced."""
        return spread(count, wanted)

    def read(self, video: VideoSource, indices: Sequence[int]) -> np.ndarray:
        """These frames of the video: uint8 [T, image_size, image_size, 3]."""
        return video.read(indices, (self.image_size, self.image_size))


@registry.register_processor("alpro_video_eval")
class AlproVideoEvalProcessor(VideoProcessor):
    """Evenly spaced frames, each resized to a square without regard to its proportions."""

    def __init__(
        self,
        image_size: PositiveInt = 256,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        n_frms: PositiveInt | None = None,
    ) -> None:
        super().__init__(image_size, mean, std, n_frms)


@registry.register_processor("alpro_video_train")
class AlproVideoTrainProcessor(VideoProcessor):
    """Random frames, one half of them from each half of the video (a single one from all of it); of all of
    them the same random part (``min_scale`` to ``max_scale`` of the area), mirrored half of the time.

    Args:
        augment: ``lavis``: two different ones of BLIP's RandAugment operations, always; ``none``: no more, as
            EVLGen trains its video models.
    """

    def __init__(
        self,
        image_size: PositiveInt = 384,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        min_scale: Fraction = 0.5,
        max_scale: Fraction = 1.0,
        n_frms: PositiveInt | None = None,
        augment: Literal["none", "lavis"] = "lavis",
    ) -> None:
        super().__init__(image_size, mean, std, n_frms)
        check_scales(min_scale, max_scale)
        self._scale = (min_scale, max_scale)
        self._augment = None
        if augment == "lavis":
            self._augment = RandAugment(2, 5, _OPERATIONS, distinct=True, probability=1)

    def choose(self, count: int, wanted: int) -> list[int]:
        return head_and_tail(count, wanted)

    def read(self, video: VideoSource, indices: Sequence[int]) -> np.ndarray:
        box = self._random_box()
        mirrored = bool(torch.rand(()) < 0.5)
        frames = video.read(indices, (self.image_size, self.image_size), box)
        if mirrored:
            frames = np.ascontiguousarray(frames[:, :, ::-1])
        if self._augment is None:
            return frames
        state = torch.get_rng_state()
        augmented = []
        for frame in frames:
            torch.set_rng_state(state)  # every frame draws the same operations
            augmented.append(np.asarray(self._augment(Image.fromarray(frame))))
        return np.stack(augmented)

    def _random_box(self) -> Box:
        """Drawn in the square that frames become, so the part has the same share of every video."""
        square = torch.empty((1, self.image_size, self.image_size), device="meta")
        top, left, height, width = RandomResizedCrop.get_params(square, list(self._scale), list(_RATIOS))
        pixels = (left, top, left + width, top + height)
        return tuple(value / self.image_size for value in pixels)


def head_and_tail(count: int, wanted: int) -> list[int]:
    """``wanted`` random ones of ``count`` positions, ascending: half of them, rounded down, out of the first
    half and the others out of the second; a single one out of both. A half with too few gives them evenly,
    some more than once."""
    if wanted == 1:
        return _drawn(0, count, 1)
    half = count // 2
    head = wanted // 2 if half else 0
    return _drawn(0, half, head) + _drawn(half, count, wanted - head)


def _drawn(start: int, end: int, wanted: int) -> list[int]:
    if wanted > end - start:
        return [start + i for i in spread(end - start, wanted)]
    return sorted((start + torch.randperm(end - start)[:wanted]).tolist())
