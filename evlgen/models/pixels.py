"""Pillow images in the place of a batch of pixels, for people who try a model by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from evlgen.batch import Batch
from evlgen.common.errors import DataError
from evlgen.media.images import to_rgb
from evlgen.media.video import FrameList, VideoSource
from evlgen.models.protocols import HasVision, reads_videos, tiling_of


def with_pixels(model: HasVision, samples: Any) -> Batch:
    """Samples whose ``image`` is a tensor; see `pixels_of`.

    Args:
        samples: samples, or what stands for their ``image`` alone.
    """
    if not isinstance(samples, Mapping):
        samples = {"image": samples}
    if "image" not in samples or isinstance(samples["image"], Tensor):
        return cast(Batch, samples)
    return cast(Batch, {**samples, "image": pixels_of(model, samples["image"])})


def pixels_of(model: HasVision, images: Any) -> Tensor | list[Tensor]:
    """Pillow images through the model's own eval processor.

    Args:
        images: an image or a list of them; a list of tensors [3, H, W] is stacked. For a video model an item
            of the list may also be a `VideoSource`, or a list of the frames of one.

    Returns:
        [B, 3, H, W]; for a video model [B, 3, T, H, W]; for a model of tiles (`evlgen.models.tiles`) a list,
        where the images have different grids.

    Raises:
        DataError: something else; an empty list; videos of different numbers of frames.
    """
    from evlgen.models.zoo import load_preprocess

    items = list(images) if isinstance(images, list | tuple) else [images]
    if not items:
        raise DataError("image is an empty list: a batch needs at least one image.")
    if not all(isinstance(item, Tensor) for item in items):
        process = load_preprocess(model, num_frames=None)[0]["eval"]
        of_videos = reads_videos(model)
        items = [process(_as_video(item) if of_videos else item) for item in items]
    shapes = {tuple(item.shape) for item in items}
    if len(shapes) > 1:
        if tiling_of(model) is not None:
            return items
        raise DataError(f"the images of one batch have different shapes: {sorted(shapes)}. Give them apart.")
    return torch.stack(items)


def _as_video(item: Any) -> VideoSource:
    if isinstance(item, VideoSource):
        return item
    frames = item if isinstance(item, list | tuple) else [item]
    return FrameList([to_rgb(frame) for frame in frames])
