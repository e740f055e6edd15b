"""Captions for image files, and for videos by models of videos: what ``python -m evlgen caption`` does."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import cast

import torch
from torch import Tensor

from evlgen.batch import Batch
from evlgen.common.errors import DataError
from evlgen.config.consent import Consent
from evlgen.media.frames import find_files, read_files, without_result
from evlgen.media.video import FrameList
from evlgen.models.base_model import BaseModel
from evlgen.models.protocols import reads_videos
from evlgen.models.zoo import load_model_of, load_preprocess

logger = logging.getLogger(__name__)


def caption_files(
    images: Sequence[str],
    cfg_path: str | None = None,
    checkpoint: str | None = None,
    options: Sequence[str] = (),
    prompt: str | None = None,
    num_beams: int = 5,
    max_length: int = 30,
    batch_size: int = 16,
    num_frames: int = 4,
    left_out: list[str] | None = None,
    allow_downloads: bool | Consent = False,
) -> Iterator[tuple[str, str]]:
    """(path, caption) for each image; those that cannot be read are named in a warning and left out.

    Args:
        images: files, addresses, or folders of images, which are walked.
        cfg_path, options: a project file and changes to it: its model writes the captions.
        checkpoint: a folder of `save_pretrained` or of a run; with ``cfg_path``, weights for that model. With
            neither, the bundled model.
        num_frames: of each video at most, evenly spaced, where the model is one of videos.
        left_out: a list to which those of ``images`` are added, at the end, that gave no caption.
        allow_downloads: see `BaseModel.from_pretrained`.

    Raises:
        DataError: not one image could be read.
    """
    model = load_model_of(cfg_path, checkpoint, options, default_device(), allow_downloads)
    of_videos = reads_videos(model)
    paths = find_files(images, videos=of_videos)
    done: set[str] = set()
    for batch in write_captions(model, paths, prompt, num_beams, max_length, batch_size, num_frames):
        done.update(path for path, _ in batch)
        yield from batch
    if not done:
        kind = "image or video" if of_videos else "image"
        raise DataError(f"none of the {len(paths)} files could be read as an {kind}.")
    if left_out is not None:
        left_out += without_result(images, done, of_videos)


def write_captions(
    model: BaseModel,
    paths: Iterable[str],
    prompt: str | None = None,
    num_beams: int = 5,
    max_length: int = 30,
    batch_size: int = 16,
    num_frames: int = 4,
    on_error: Callable[[str, DataError], None] = lambda path, error: None,
) -> Iterator[list[tuple[str, str]]]:
    """Batches of (path, caption), in the order of ``paths``; the arguments are those of `caption_files`.

    Args:
        on_error: called for each file that cannot be read, which is named in a warning and left out.
    """
    processor = load_preprocess(model, num_frames=None)[0]["eval"]
    samples: Batch = {} if prompt is None else {"prompt": prompt}
    of_videos = reads_videos(model)
    read = read_files(paths, num_frames if of_videos else None, on_error)
    for _, alike in groupby(read, key=lambda item: len(item[1])):  # a batch has videos of one length
        while batch := list(islice(alike, batch_size)):
            items = [FrameList(frames) if of_videos else frames[0] for _, frames in batch]
            pixels = [processor(item) for item in items]
            is_ragged = len({item.shape for item in pixels}) > 1  # grids of tiles
            samples["image"] = cast(Tensor, pixels) if is_ragged else torch.stack(pixels).to(model.device)
            texts = model.generate(samples, num_beams=num_beams, max_length=max_length)
            yield list(zip((path for path, _ in batch), texts, strict=True))


def default_device() -> str:
    """The GPU of this process (of several that torchrun starts, its own), or the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
