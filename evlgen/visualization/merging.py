"""What merges into what while a model reads an image or a video, layer by layer, on the grid of patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.models.base_model import BaseModel
from evlgen.models.connectors.base import Connector
from evlgen.models.protocols import HasConnector, MergesTokens, offers, reads_videos
from evlgen.models.token_merging import compose_maps
from evlgen.processors import build_processor


@dataclass(frozen=True)
class Stage:
    """What is one token at some depth of the model.

    Attributes:
        name: ``layer 3``.
        num_tokens: how many tokens there are.
        groups: [F, h, w], the token each patch of each frame is in.
        prefix: [F, P], the token the class token and the registers are in.
    """

    name: str
    num_tokens: int
    groups: np.ndarray
    prefix: np.ndarray


@dataclass(frozen=True)
class Merging:
    """How the tokens of one image or video merged.

    Attributes:
        images: [F, H, W, 3] uint8: the frames as the model sees them; one where it is an image.
        stages: before anything merged, then in order of depth, the soft prompts last.
        spans_frames: whether a token can have patches of several frames, not the same ones of all frames.
        has_class_token: whether the first of the prefix tokens is one.
    """

    images: np.ndarray
    stages: tuple[Stage, ...]
    spans_frames: bool
    has_class_token: bool


@torch.no_grad()
def find_merging(
    model: BaseModel, frames: Sequence[Image.Image], layers: str | Sequence[int] = "all"
) -> Merging:
    """How the tokens of one image, or of the frames of one video, merge in a model.

    Args:
        frames: one image, or the frames of a video where the model reads videos.
        layers: ``all``, ``last``, or numbers of layers from 1 (``"1,6,12"`` or a list). The last layer's
            merging, the soft prompts, is always there.

    Raises:
        ConfigError: the connector does not merge, there is no such layer, the visual tokens lie on no grid,
            or a video is given to a model of images.
    """
    connector = _merging_connector(model)
    pixels = _pixels(model, frames)  # [F, 3, H, W]
    video = pixels.transpose(0, 1) if reads_videos(model) else pixels[0]
    was_training = model.training
    model.eval()
    try:
        tokens = model.visual_tokens(video.unsqueeze(0).to(model.device))
        details = connector.forward_details(tokens)
    finally:
        model.train(was_training)
    maps = [("tokens", torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0))]
    maps += _connector_maps(details, layers)
    spans_frames = len(frames) > 1 and model.temporal == "concat"
    maps = _behind_encoder(model.vision, maps)
    rows, columns = _grid(model.vision, maps[0][1].shape[1] // (len(frames) if spans_frames else 1))
    stages = (_stage(name, found[0], len(frames), (rows, columns), spans_frames) for name, found in maps)
    return Merging(
        _as_seen(pixels, model.vision), tuple(stages), spans_frames, _has_class_token(model.vision)
    )


def merging_connectors() -> list[str]:
    """Names of the registered connectors that merge tokens."""
    return [n for n in registry.list_connectors() if _merges(registry.get_connector_class(n))]


def layer_numbers(layers: str | Sequence[int], num_layers: int) -> list[int]:
    """The layers to show, from 1, in order and the last among them. See `find_merging`.

    Raises:
        ConfigError: something else than numbers of layers, or a number that is no layer's.
    """
    if layers == "all":
        return list(range(1, num_layers + 1))
    parts = layers.replace(",", " ").split() if isinstance(layers, str) else [str(n) for n in layers]
    parts = [] if parts == ["last"] else parts
    wrong = [p for p in parts if not (p.isascii() and p.isdigit() and 1 <= int(p) <= num_layers)]
    if wrong:
        raise ConfigError(
            f"layers: '{wrong[0]}' is no layer of this connector, which merges in {num_layers}. Name all, "
            f"last, or numbers of 1 to {num_layers}, such as {','.join(map(str, sorted({1, num_layers})))}."
        )
    return sorted({*map(int, parts), num_layers})


def _merges(connector: type[Connector] | Connector) -> bool:
    return offers(connector, MergesTokens)


def _merging_connector(model: BaseModel) -> Connector:
    connector = model.connector if offers(model, HasConnector) else None
    if connector is None or not _merges(connector):
        raise _does_not_merge(type(connector).__name__)
    return connector


def _does_not_merge(name: str) -> ConfigError:
    return ConfigError(
        f"model.connector: {name} does not merge tokens, so there is no merging to draw. Those that do: "
        f"{', '.join(merging_connectors())}."
    )


def _pixels(model: BaseModel, frames: Sequence[Image.Image]) -> Tensor:
    """The frames as the model's eval processor gives them, [F, 3, H, W]."""
    if len(frames) > 1 and not reads_videos(model):
        raise ConfigError(
            f"this is a model of images, and {len(frames)} frames are one video: give them one by one, or "
            "set model.vision.temporal."
        )
    if len(frames) > 1 and model.temporal == "each":
        raise ConfigError(
            "model.vision.temporal.form is 'each': every frame merges by itself. Give the frames one by one."
        )
    vision = model.vision
    processor = build_processor(
        {
            "name": "blip_image_eval",
            "image_size": vision.image_size,
            "mean": list(vision.image_mean),
            "std": list(vision.image_std),
        }
    )
    return torch.stack([processor(frame) for frame in frames])


def _as_seen(pixels: Tensor, vision: Any) -> np.ndarray:
    """Normalised pixels [F, 3, H, W] -> images [F, H, W, 3] uint8."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (vision.image_mean, vision.image_std))
    return ((pixels * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def _connector_maps(details: dict[str, Any], layers: str | Sequence[int]) -> list[tuple[str, Tensor]]:
    """(name, map [1, N]) for each layer to show."""
    if "layer_maps" not in details:
        layer_numbers(layers, 1)
        return [("end", details["merge_map"])]
    maps = details["layer_maps"]
    return [(f"layer {number}", maps[number - 1]) for number in layer_numbers(layers, len(maps))]


def _behind_encoder(vision: Any, maps: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The maps seen from the encoder's first tokens, where the encoder itself merged some.

    An encoder of videos never does (see `vision.build_vision_encoder`).

    Args:
        maps: each [1, N], of the tokens that left the encoder.
    """
    inner = getattr(getattr(vision, "merging", None), "merge_map", None)  # of the pass just done
    if inner is None:
        return maps
    start = torch.arange(inner.shape[1], device=inner.device).unsqueeze(0)
    return [("tokens", start), ("encoder", inner), *((n, compose_maps(inner, m)) for n, m in maps[1:])]


def _grid(vision: Any, num_tokens: int) -> tuple[int, int]:
    """Rows and columns of the patches of one frame."""
    patches = num_tokens - vision.num_prefix_tokens
    known = vision.grid_size
    if known is not None and math.prod(known) == patches:
        return tuple(known)
    side = math.isqrt(max(patches, 0))
    if side * side != patches or not patches:
        raise ConfigError(
            f"model.vision: its {num_tokens} tokens, {vision.num_prefix_tokens} of them before the patches, "
            "lie on no square grid, so where they are in the image is not known."
        )
    return side, side


def _stage(name: str, merge_map: Tensor, num_frames: int, grid: tuple[int, int], spans_frames: bool) -> Stage:
    found = merge_map.cpu().numpy()
    frames = found.reshape(num_frames if spans_frames else 1, -1)  # [F or 1, P + h w]
    frames = np.broadcast_to(frames, (num_frames, frames.shape[1]))
    num_prefix = frames.shape[1] - math.prod(grid)
    groups = frames[:, num_prefix:].reshape(num_frames, *grid)
    return Stage(name, len(np.unique(found)), groups, frames[:, :num_prefix])


def _has_class_token(vision: Any) -> bool:
    trunk = getattr(vision, "trunk", None)  # where timm's has registers alone, its class token is None
    return vision.num_prefix_tokens > 0 and getattr(trunk, "cls_token", vision) is not None
