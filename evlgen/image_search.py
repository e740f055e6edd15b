"""Finding images by text or by image, with the features of BLIP-2's first stage.

An index is one safetensors file: ``features`` float16 [N, M, E], the projected queries of each image;
``means`` float16 [N, E], their mean, of length 1; ``paths`` uint8, the paths one after the other, each ended
by a zero; ``stamps`` int64 [N, 2], the size and the time of change of each file. Its metadata say which model
made it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from evlgen.batch import Batch
from evlgen.common.errors import ConfigError, DataError
from evlgen.files.io import write_atomically
from evlgen.media.frames import find_files, read_files
from evlgen.models.base_model import BaseModel
from evlgen.models.blip2_stage1 import Blip2Stage1
from evlgen.models.pixels import with_pixels

logger = logging.getLogger(__name__)

FORMAT = "evlgen image index 1"
SAVE_EVERY = 300.0  # seconds
_REFINED = 4  # times k: that many of the best are compared again in float32
_SAMPLED = 64  # values of each weight that a model is known by


def similarities(
    model: BaseModel, images: Sequence[Image.Image | str], texts: Sequence[str], batch_size: int = 32
) -> Tensor:
    """How similar images and texts are: the cosine of a text with the nearest query of an image.

    Args:
        model: BLIP-2's first stage.
        images: N Pillow images or paths.
        texts: K texts.

    Returns:
        [N, K], float32, on the CPU.

    Raises:
        ConfigError: the model is another.
        DataError: an image cannot be read.
    """
    found = [
        model.similarities(image_features(model, images[start : start + batch_size]), of_texts)
        for of_texts in [text_features(model, texts, batch_size)]
        for start in range(0, len(images), batch_size)
    ]
    return torch.cat(found).cpu() if found else torch.empty(0, len(texts))


def image_features(model: BaseModel, images: Sequence[Image.Image | str]) -> Tensor:
    """N images or paths -> [N, M, E], of length 1, as the model has them."""
    from evlgen.media.images import open_image

    opened = [open_image(image) if isinstance(image, str) else image for image in images]
    first_stage = checked(model)
    return first_stage.extract_features(with_pixels(first_stage, opened), mode="image").image_embeds_proj


def text_features(model: BaseModel, texts: Sequence[str], batch_size: int = 32) -> Tensor:
    """K texts -> [K, E], of length 1."""
    model = checked(model)
    parts = [list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    features = [model.extract_features({"text_input": p}, mode="text").text_embeds_proj[:, 0] for p in parts]
    return torch.cat(features)


def checked(model: BaseModel) -> Blip2Stage1:
    """The model. Raises `ConfigError` where it is not BLIP-2's first stage."""
    if not isinstance(model, Blip2Stage1):
        raise ConfigError(
            f"images are found by features that {type(model).__name__} does not have. Name a checkpoint of "
            "BLIP-2's first stage (model.arch: blip2) with --checkpoint."
        )
    return model


class ImageIndex:
    """The features of N images.

    Args:
        paths: N paths or addresses.
        features: [N, M, E], float16, of length 1.
        means: [N, E], float16.
        stamps: [N, 2], int64; -1 for what is not a file.
        made_by: ``model``, the key of the model; ``checkpoint``, where it was.
    """

    def __init__(
        self, paths: list[str], features: Tensor, means: Tensor, stamps: Tensor, made_by: dict[str, str]
    ) -> None:
        self.paths, self.features, self.means, self.stamps = paths, features, means, stamps
        self.made_by = made_by

    def __len__(self) -> int:
        return len(self.paths)

    @classmethod
    def open(cls, path: str | Path) -> ImageIndex:
        """Reads an index; the features are read from the disk when they are searched.

        Raises:
            DataError: there is no such file; it is damaged, or not an index.
        """
        if not os.path.isfile(path):
            raise DataError(f"there is no index at {path}. `evlgen index FOLDER --output {path}` writes one.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                names = ("features", "means", "stamps", "paths")
                if metadata.get("format") != FORMAT or set(file.keys()) != set(names):
                    raise DataError(f"{path} is not an index of images that this version reads.")
                features, means, stamps, raw = (file.get_tensor(name) for name in names)
        except (SafetensorError, OSError) as error:
            raise DataError(f"the index {path} is damaged: {error}. {_AGAIN}") from error
        paths = [os.fsdecode(part) for part in raw.numpy().tobytes().split(b"\0")[:-1]]
        count = len(paths)
        fits = features.ndim == 3 and len(features) == count and means.shape == (count, features.shape[2])
        fits = fits and stamps.shape == (count, 2) and features.dtype == means.dtype == torch.float16
        if not fits or metadata.get("crc32") != _crc(raw, stamps, means):
            raise DataError(f"the index {path} is damaged: what is in it does not fit together. {_AGAIN}")
        return cls(paths, features, means, stamps, json.loads(metadata["made_by"]))

    def save(self, path: str | Path) -> None:
        """Writes the index; the file appears, or is replaced, only when it is complete."""
        raw = b"".join(os.fsencode(name) + b"\0" for name in self.paths)
        paths = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        tensors = {"features": self.features, "means": self.means, "stamps": self.stamps, "paths": paths}
        crc = _crc(paths, self.stamps, self.means)
        metadata = {"format": FORMAT, "made_by": json.dumps(self.made_by), "crc32": crc}
        write_atomically(path, save({k: v.contiguous() for k, v in tensors.items()}, metadata))

    def check_model(self, model: BaseModel) -> None:
        """Raises `ConfigError` where another model made the index."""
        if self.made_by.get("model") != model_key(checked(model)):
            raise ConfigError(
                f"the index was made by another model ({self.made_by.get('checkpoint') or 'unnamed'}): its "
                "features and this model's cannot be compared. Name that one with --checkpoint, or index "
                "the images again."
            )

    def search(
        self, model: BaseModel, query: str | Image.Image, k: int = 10, rerank: int = 0
    ) -> list[tuple[str, float]]:
        """The k images nearest to a text (cosine with the nearest query of each image) or to an image (cosine
        of the mean queries), the nearest first.

        Args:
            model: the one that made the index.
            rerank: how many of the best for a text are read and ordered by image-text matching, whose logit
                is added to the cosine.

        Returns:
            (path, score).

        Raises:
            ConfigError: another model made the index; an image query is to be reranked.
            DataError: the index is damaged.
        """
        self.check_model(model)
        if not isinstance(query, str):
            if rerank:
                raise ConfigError("image-text matching needs a text: leave out rerank for an image.")
            mean = _means(image_features(model, [query]).cpu())[0]
            return self._named(*_nearest(self.means[:, None], mean, k))
        found = self._named(*_nearest(self.features, text_features(model, [query])[0].cpu(), max(k, rerank)))
        again = {path: images for path, images in read_files([path for path, _ in found[:rerank]], None)}
        scores, first_stage = dict(found[:rerank]), checked(model)
        for path, images in again.items():
            samples: Batch = {**with_pixels(first_stage, images), "text_input": [query]}
            scores[path] += float(first_stage.match(samples)[0, 1])
        unread = [(path, score) for path, score in found if path not in again]
        return [*sorted(((p, scores[p]) for p in again), key=lambda row: -row[1]), *unread][:k]

    def _named(self, places: Tensor, scores: Tensor) -> list[tuple[str, float]]:
        return [(self.paths[i], score) for i, score in zip(places.tolist(), scores.tolist(), strict=True)]


_AGAIN = "Delete it and index the images again."


def _nearest(features: Tensor, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows of [N, M, E] float16 nearest to [E], and their cosines in float32."""
    # one product: on a busy CPU many small ones wait for each other's threads
    scores = (features.flatten(0, 1) @ query.to(torch.float16)).view(len(features), -1).amax(1).float()
    if not scores.isfinite().all():
        raise DataError(f"the index is damaged: it holds features that are not numbers. {_AGAIN}")
    best = scores.topk(min(_REFINED * k, len(scores))).indices
    exact, order = (features[best].float() @ query.float()).amax(1).sort(descending=True, stable=True)
    return best[order][:k], exact[:k]


def index_images(
    images: Sequence[str],
    output: str | Path,
    model: BaseModel,
    checkpoint: str | None = None,
    batch_size: int = 32,
    left_out: list[str] | None = None,
) -> int:
    """Writes an index of images. Where there is one of the same model, only what is new or has changed is
    read, and files that are gone are left out; it is written every few minutes, so that a call after a killed
    one goes on from there.

    Args:
        images: files, addresses, or folders, which are walked.
        checkpoint: what the index says of where the model is.
        left_out: a list to which those of ``images`` are added that gave no image.

    Returns:
        The number of images in the index.

    Raises:
        ConfigError: the model has no such features; the index is of another one.
        DataError: not one image could be read; there is a damaged index.
    """
    key = model_key(checked(model))
    known = ImageIndex.open(output) if os.path.lexists(output) else None
    if known is not None:
        known.check_model(model)
    made_by = {"model": key, "checkpoint": checkpoint or (known.made_by["checkpoint"] if known else "")}
    stamps = {name: _stamp(name) for name in dict.fromkeys(map(_absolute, find_files(images, videos=False)))}
    places = {} if known is None else {name: place for place, name in enumerate(known.paths)}
    old = [] if known is None else known.stamps.tolist()
    kept = [place for name, place in places.items() if stamps.get(name) == tuple(old[place])]
    paths = [known.paths[place] for place in kept] if known else []
    parts = [known.features[kept]] if known else []
    there = set(paths)
    new = [name for name in stamps if name not in there]
    logger.info("%d images, of which %d are in the index already", len(stamps), len(kept))
    saved = time.monotonic()
    batch: list[tuple[str, Image.Image]] = []

    def write() -> int:
        features = torch.cat(parts) if parts else torch.empty(0, 0, 0)
        order = sorted(range(len(paths)), key=lambda row: paths[row])
        names = [paths[row] for row in order]
        features = features[order]
        rows = torch.tensor([stamps[name] for name in names], dtype=torch.int64)
        ImageIndex(names, features, _means(features).to(torch.float16), rows, made_by).save(output)
        return len(names)

    def add() -> None:
        parts.append(image_features(model, [image for _, image in batch]).to("cpu", torch.float16))
        paths.extend(name for name, _ in batch)
        batch.clear()

    for name, frames in read_files(new, None):
        batch.append((name, frames[0]))
        if len(batch) == batch_size:
            add()
            if time.monotonic() - saved > SAVE_EVERY:
                logger.info("%d of %d images", write(), len(stamps))
                saved = time.monotonic()
    if batch:
        add()
    if not paths:
        raise DataError(f"none of the {len(stamps)} files could be read as an image.")
    if left_out is not None:
        done = set(paths)
        left_out += [p for p in images if not any(_absolute(f) in done for f in find_files([p], False))]
    return write()


def model_key(model: Blip2Stage1) -> str:
    """What a model is known by: its sizes, and some values of each trained weight. The same on every device
    and in every precision of the frozen encoder."""
    digest = hashlib.sha256()
    trained = model.trained_state_dict()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)};".encode())
        if name in trained:
            sampled = value.detach().flatten()[:: max(1, value.numel() // _SAMPLED)][:_SAMPLED]
            digest.update(sampled.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _means(features: Tensor) -> Tensor:
    """[N, M, E] -> [N, E], float32, of length 1."""
    return F.normalize(features.mean(1, dtype=torch.float32), dim=-1)


def _crc(*tensors: Tensor) -> str:
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _absolute(name: str) -> str:
    return name if "://" in name or name.startswith("data:") else os.path.abspath(name)


def _stamp(name: str) -> tuple[int, int]:
    try:
        found = os.stat(name)
    except OSError:
        return (-1, -1)
    return (found.st_size, found.st_mtime_ns)
