"""The figure: what merges into what, for images or videos, of one model or of several side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike, fspath
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from evlgen.common.errors import ConfigError
from evlgen.media.frames import read_frames
from evlgen.models.base_model import BaseModel
from evlgen.models.protocols import reads_videos
from evlgen.visualization.merging import Merging, Stage, find_merging
from evlgen.visualization.regions import draw_regions
from evlgen.visualization.sheet import Row, draw_sheet, write_on

ImageInput: TypeAlias = "Image.Image | str | PathLike | Sequence[Image.Image]"

_PATCH = 28  # pixels of a patch in the drawing at least, where the columns are few
_MOST_WIDTH = 6000  # of a sheet's images together, before patches are drawn smaller than that


def draw_merging(
    model: BaseModel | Mapping[str, BaseModel],
    images: ImageInput | Sequence[ImageInput],
    layers: str | Sequence[int] = "all",
    names: Sequence[str] | None = None,
    num_frames: int = 4,
) -> Image.Image:
    """Draws which patches became one soft prompt, layer by layer, as figure 4 of Bolya et al. (ICLR 2023).

    Args:
        model: the model, or several by title, to be compared row by row.
        images: images, paths of images or videos, or lists of images, each the frames of a video; a model
            of images is shown a video's frames one by one.
        layers: ``all``, ``last``, or numbers of layers from 1; the soft prompts are always drawn.
        names: beside the rows; by default none.
        num_frames: of each video that is a path, at most, evenly spaced.

    Raises:
        ConfigError: a connector that does not merge, or no such layer (see `merging.find_merging`).
        DataError: a file that cannot be read.
    """
    models = model if isinstance(model, Mapping) else {"": model}
    images = [images] if isinstance(images, Image.Image | str | PathLike) else list(images)
    videos = [_frames(image, num_frames) for image in images]
    found = {title: merge_videos(part, videos, layers) for title, part in models.items()}
    return draw_found(found, names or [""] * len(videos))


def merge_videos(
    model: BaseModel, videos: Sequence[Sequence[Image.Image]], layers: str | Sequence[int] = "all"
) -> list[list[Merging]]:
    """How each video's tokens merge: one `Merging` each; to a model of images every frame is an image."""
    of_videos = reads_videos(model)
    parts = [[video] if of_videos else [[frame] for frame in video] for video in videos]
    return [[find_merging(model, frames, layers) for frames in part] for part in parts]


def draw_found(found: Mapping[str, Sequence[Sequence[Merging]]], names: Sequence[str]) -> Image.Image:
    """The sheet of what `merge_videos` found.

    Args:
        found: by the title of a model; for each video, what was found.
        names: of the videos.

    Raises:
        ConfigError: models with other columns than each other.
    """
    mergings = [merging for videos in found.values() for video in videos for merging in video]
    columns = {tuple((stage.name, stage.num_tokens) for stage in m.stages) for m in mergings}
    if len(columns) > 1:
        raise ConfigError(
            "these models merge in other layers or to other numbers of tokens: draw each alone."
        )
    scale = _scale(mergings[0])
    rows: list[Any] = []
    for i, name in enumerate(names):
        for title, videos in found.items():
            rows += _rows(videos[i], name, title, scale, opens=title == next(iter(found)))
    return draw_sheet(_headings(mergings), rows, _note(mergings))


def draw_stage(video: Sequence[Merging], stage: int) -> Image.Image:
    """One stage of `merging.find_merging` over the image; the frames of a video beside each other.

    Args:
        video: of one image or video, as `merge_videos` has it.
        stage: 0: the image as the model sees it; the last one: the soft prompts, each with its number from 1
            on one of its patches. Higher numbers mean the last one.
    """
    scale = _scale(video[0])
    panels = [panel for merging in video for panel in _panels_at(merging, stage, scale)]
    gap = np.full((len(panels[0]), 4, 3), 255, np.uint8)
    parts = [part for panel in panels for part in (gap, panel)][1:]
    return Image.fromarray(np.concatenate(parts, axis=1))


def describe_stage(video: Sequence[Merging], stage: int) -> str:
    """``layer 3: 40 tokens, 39 regions + class token``, of what `draw_stage` draws."""
    name, *counts = _headings(video)[min(stage, len(video[0].stages) - 1)]
    return f"{name}: {', '.join(counts)}"


def untrained(model: BaseModel, seed: int) -> BaseModel:
    """The same configuration without its checkpoint: what training from scratch with this seed starts from.

    Raises:
        ConfigError: the model has no checkpoint, so it is that already.
    """
    if not model.cfg.checkpoint:
        raise ConfigError(
            "model.checkpoint is not set, so this model is untrained itself: there is nothing to compare it "
            "with. Name one with --checkpoint."
        )
    torch.manual_seed(seed)
    section = {**dataclasses.asdict(model.cfg), "checkpoint": None}
    return type(model).from_config(section, model.device).to(model.device)


def _frames(image: ImageInput, num_frames: int) -> list[Image.Image]:
    if isinstance(image, str | PathLike):
        return read_frames(fspath(image), num_frames)
    return [image] if isinstance(image, Image.Image) else list(image)


def _scale(merging: Merging) -> int:
    """How many times larger than the model sees them images are drawn."""
    height, width = merging.images.shape[1:3]
    wanted = math.ceil(_PATCH / max(1, height // merging.stages[0].groups.shape[1]))
    return max(1, min(wanted, _MOST_WIDTH // (width * len(merging.stages))))


def _rows(video: Sequence[Merging], name: str, title: str, scale: int, opens: bool) -> Iterator[Row]:
    num_frames = sum(len(merging.images) for merging in video)
    frame = 0
    for merging in video:
        for panels in _panels(merging, scale):
            frame += 1
            numbered = f"{name} frame {frame}".strip() if num_frames > 1 else name
            yield Row(title, numbered, panels, opens and frame == 1)


def _panels(merging: Merging, scale: int) -> list[list[np.ndarray]]:
    """For each frame, the image and then the drawing of each stage."""
    large = merging.images.repeat(scale, axis=1).repeat(scale, axis=2)
    columns = [large, *(_drawn(merging, stage, scale) for stage in merging.stages[1:])]
    return [[column[frame] for column in columns] for frame in range(len(large))]


def _panels_at(merging: Merging, number: int, scale: int) -> list[np.ndarray]:
    """What `draw_stage` shows of each frame: the regions, with the image shining through."""
    large = merging.images.repeat(scale, axis=1).repeat(scale, axis=2)
    if number <= 0:
        return list(large)
    stage = merging.stages[min(number, len(merging.stages) - 1)]
    drawn = (0.7 * _drawn(merging, stage, scale) + 0.3 * large).round().astype(np.uint8)
    patch = large.shape[1] // stage.groups.shape[1]
    is_last = stage is merging.stages[-1]
    return [
        _with_numbers(panel, stage.groups[f], patch) if is_last else panel for f, panel in enumerate(drawn)
    ]


def _with_numbers(panel: np.ndarray, groups: np.ndarray, patch: int) -> np.ndarray:
    """Writes the number of each region on that of its patches which is nearest to its middle."""
    for token in np.unique(groups):
        places = np.argwhere(groups == token)
        row, column = places[((places - places.mean(0)) ** 2).sum(1).argmin()]
        centre = ((column + 0.5) * patch, (row + 0.5) * patch)
        panel = write_on(panel, str(token + 1), centre, max(8, round(patch * 0.45)))
    return panel


def _drawn(merging: Merging, stage: Stage, scale: int) -> np.ndarray:
    """[F, H * scale, W * scale, 3]."""
    patch = merging.images.shape[1] * scale // stage.groups.shape[1]
    width = max(1, round(patch / 11))
    if merging.spans_frames:
        drawn = draw_regions(merging.images, stage.groups, scale, width)
    else:  # a region has one colour in each frame: what it looks like there
        pairs = zip(merging.images, stage.groups, strict=True)
        drawn = np.stack([draw_regions(image, groups, scale, width) for image, groups in pairs])
    return np.stack([_with_names(panel, merging, stage, frame, patch) for frame, panel in enumerate(drawn)])


def _with_names(panel: np.ndarray, merging: Merging, stage: Stage, frame: int, patch: int) -> np.ndarray:
    """Writes CLS (and REG) where the class token (or a register) is one token with patches."""
    for position, token in reversed(list(enumerate(stage.prefix[frame]))):
        places = np.argwhere(stage.groups[frame] == token)
        if len(places):
            word = "CLS" if position == 0 and merging.has_class_token else "REG"
            row, column = places[0]
            centre = ((column + 0.5) * patch, (row + 0.5) * patch)
            panel = write_on(panel, word, centre, max(8, round(patch * 0.38)))
    return panel


def _headings(mergings: Sequence[Merging]) -> list[list[str]]:
    """For each column its name, its number of tokens, and their kinds, where these are common to all rows."""
    headings = []
    last = len(mergings[0].stages) - 1
    for i, stage in enumerate(mergings[0].stages):
        kinds = {_kinds(merging, merging.stages[i]) for merging in mergings}
        count = f"{stage.num_tokens} {'soft prompts' if i == last else 'tokens'}"
        name = ("image" if len(mergings[0].images) == 1 else "video") if i == 0 else stage.name
        headings.append([name, count, *(kinds if len(kinds) == 1 else ())])
    return headings


def _kinds(merging: Merging, stage: Stage) -> str:
    regions, prefix = set(stage.groups.flat), set(stage.prefix.flat)
    what = "patches" if stage is merging.stages[0] else "regions"
    alone = len(prefix - regions)
    if not alone:
        return f"{len(regions)} {what}"
    only_class = merging.has_class_token and stage.prefix.shape[1] == 1
    kind = "class token" if only_class else "class/register token" if merging.has_class_token else "register"
    return f"{len(regions)} {what} + {f'{alone} {kind}s' if alone > 1 else kind}"


def _note(mergings: Sequence[Merging]) -> str:
    first = mergings[0]
    note = "Patches with the same fill and outline became one token; the fill is their mean colour"
    is_video = len(first.images) > 1 and not first.spans_frames
    note += ", frame by frame. A token has the same patches of every frame." if is_video else "."
    if any(map(_named, mergings)):
        return f"{note} CLS (REG): the class token (a register) is in it."
    if not first.stages[0].prefix.size:
        return note
    if first.has_class_token and first.stages[0].prefix.size == len(first.images) and not first.spans_frames:
        return f"{note} The class token, which is not drawn, stays a token of its own."
    return f"{note} Class tokens and registers, which are not drawn, merge with no patch."


def _named(merging: Merging) -> bool:
    return any(set(stage.prefix.flat) & set(stage.groups.flat) for stage in merging.stages)
