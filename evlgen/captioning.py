"""Captions for picture files, and for clips by models of clips: what ``python -m evlgen caption`` does."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby, islice

import torch

from evlgen.common.errors import DataError
from evlgen.config.consent import Consent
from evlgen.media.frames import find_files, read_files, without_result
from evlgen.media.video import Pictures
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
    """(path, caption) for each picture; those that cannot be read are named in a warning and left out.

    Args:
        images: files, addresses, or folders of pictures, which are walked.
        cfg_path, options: a project file and changes to it: its model writes the captions.
        checkpoint: a folder of `save_pretrained` or of a run; with ``cfg_path``, weights for that model. With
            neither, the bundled model.
        num_frames: of each clip at most, evenly spaced, where the model is one of clips.
        left_out: a list to which those of ``images`` are added, at the end, that gave no caption.
        allow_downloads: see `BaseModel.from_pretrained`.

    Raises:
        DataError: not one picture could be read.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model_of(cfg_path, checkpoint, options, device, allow_downloads)
    processor = load_preprocess(model, num_frames=None)[0]["eval"]
    samples = {} if prompt is None else {"prompt": prompt}
    reads_clips = getattr(model, "temporal", None) is not None
    paths = find_files(images, clips=reads_clips)
    read = read_files(paths, num_frames if reads_clips else None)
    done: set[str] = set()
    for _, alike in groupby(read, key=lambda item: len(item[1])):  # a batch has clips of one length
        while batch := list(islice(alike, batch_size)):
            items = [Pictures(frames) if reads_clips else frames[0] for _, frames in batch]
            samples["image"] = torch.stack([processor(item) for item in items]).to(device)
            texts = model.generate(samples, num_beams=num_beams, max_length=max_length)
            done.update(path for path, _ in batch)
            yield from zip((path for path, _ in batch), texts, strict=True)
    if not done:
        kind = "picture or clip" if reads_clips else "picture"
        raise DataError(f"none of the {len(paths)} files could be read as a {kind}.")
    if left_out is not None:
        left_out += without_result(images, done, reads_clips)
