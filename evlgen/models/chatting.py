"""The images and videos of a conversation that somebody holds with a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from evlgen.common.errors import ConfigError, DataError
from evlgen.files.io import resolve
from evlgen.media.frames import decode_address, is_data_address, read_frames
from evlgen.media.images import open_image
from evlgen.media.video import Pictures
from evlgen.models.pixels import pixels_of
from evlgen.processors.turns import VisualPart

if TYPE_CHECKING:
    from evlgen.models.base_model import BaseModel

_MOST_FRAMES = 4
_NO_VIDEOS = (
    "this is a model of images, and the conversation has a video. Set model.vision.temporal: "
    "{form: average}, or take an architecture of videos, such as evlgen_video_opt."
)


def pixels_of_visual(model: BaseModel, visual: VisualPart, num_frames: int = _MOST_FRAMES) -> Tensor:
    """What a model sees of an image or a video in a conversation.

    Args:
        visual: its source is a path or address, a ``data:`` address, a Pillow image, frames in a list, or
            pixels.
        num_frames: of a video file, evenly spread.

    Returns:
        [3, H, W], or [3, T, H, W] for a model of videos.

    Raises:
        DataError: it cannot be read, or there is no source.
        ConfigError: a video for a model of images.
    """
    reads_videos = getattr(model, "temporal", None) is not None
    source = visual.source
    if visual.kind == "video" and not reads_videos:
        raise ConfigError(_NO_VIDEOS)
    if isinstance(source, Tensor):
        return source
    if source is None:
        raise DataError(f"an {visual.kind} of the conversation names no file: give it 'path' or 'image'.")
    if isinstance(source, str | os.PathLike):
        source = _opened(str(source), visual.kind, num_frames)
    return pixels_of(model, [Pictures(source) if isinstance(source, list) else source])[0]


def _opened(source: str, kind: str, num_frames: int) -> Any:
    if is_data_address(source):
        return open_image(decode_address(source))
    path = Path(resolve(os.path.expanduser(source)))
    return read_frames(path, num_frames) if kind == "video" else open_image(path)
