"""What a dataset's visual tokens follow from, and the digest that names their store.

The encoder's configuration and weights, the transform, what every image is made from, the number of views
and, where the transform augments, ``run.seed``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evlgen.common.errors import DataError
from evlgen.config.run_config import RunConfig
from evlgen.datasets.base_dataset import BadRecord, BaseDataset, SequenceDataset
from evlgen.files.io import cache_root
from evlgen.loaders.data import seeded
from evlgen.models.base_model import BaseModel

LAYOUT = 1  # of the stores; to be raised when older ones cannot be read any more
PROBES = 8  # images looked at

# What the encoder's configuration says of where its weights come from, and of training it.
_LEFT_OUT = ("pretrained", "freeze", "grad_checkpoint", "drop_path_rate")


@dataclass(frozen=True)
class DistinctImages:
    """The images a dataset shows, each once.

    Attributes:
        dataset: whose they are.
        of_samples: the numbers of the images of all samples, one sample after the other.
        ends: where each sample's end there, [samples].
        sources: what each is made from; see `BaseDataset.visual_source`.
        shown: what the dataset loads each by: the first sample that shows it, or its name among
            `SequenceDataset.visuals`.
    """

    dataset: BaseDataset
    of_samples: np.ndarray
    ends: np.ndarray
    sources: list[Any]
    shown: list[Any]

    @classmethod
    def of(cls, dataset: BaseDataset) -> DistinctImages:
        """Asks for the source of every sample, once for all that name the same file."""
        numbers: dict[Any, int] = {}
        of_samples, ends = array("q"), array("q")
        shown: list[Any] = []
        for visuals in _visuals(dataset):
            for visual, source in visuals:
                of_samples.append(numbers.setdefault(source, len(numbers)))
                if of_samples[-1] == len(shown):
                    shown.append(visual)
            ends.append(len(of_samples))
        return cls(dataset, np.array(of_samples, np.int64), np.array(ends, np.int64), list(numbers), shown)

    def __len__(self) -> int:
        return len(self.sources)

    def numbers_of(self, samples: Sequence[int] | None) -> np.ndarray:
        """The images of some samples, each once and in their order; of None: of all."""
        if samples is None or len(samples) == len(self.ends):
            return np.arange(len(self))
        starts = np.concatenate([[0], self.ends[:-1]])
        parts = [self.of_samples[starts[sample] : self.ends[sample]] for sample in samples]
        return np.unique(np.concatenate(parts)) if parts else np.arange(0)

    def load(self, number: int, seed: int) -> Tensor:
        """An image's pixels, its random choices decided by the seed. Raises as `load_visual`."""
        with seeded(seed):
            return self.load_now(number)

    def load_now(self, number: int) -> Tensor:
        """As `load`, by the random generators as they are."""
        if isinstance(self.dataset, SequenceDataset):
            return self.dataset.load_one(self.shown[number])
        return self.dataset.load_visual(self.shown[number])

    def probes(self) -> list[int]:
        """A few images from all over the dataset."""
        return sorted({i * len(self) // PROBES for i in range(PROBES)})


def _visuals(dataset: BaseDataset) -> Iterator[list[tuple[Any, Any]]]:
    """What a dataset loads the images of each sample by, and what these are made from."""
    if not isinstance(dataset, SequenceDataset):
        yield from ([pair] for pair in enumerate(dataset.visual_sources()))
        return
    source_of = functools.cache(dataset.source_of)
    for index, record in enumerate(dataset.records):
        visuals = [] if isinstance(record, BadRecord) else dataset.visuals(index)
        yield [(visual, source_of(visual)) for visual in visuals]


@dataclass(frozen=True)
class CacheKey:
    """What a store holds.

    Attributes:
        digest: its name.
        parts: what the digest is of.
        is_random: whether the transform augments.
        views: of each image; 1 where it does not.
        shape: of one view's tokens.
    """

    digest: str
    parts: dict[str, Any]
    is_random: bool
    views: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, images: DistinctImages, model: BaseModel, run: RunConfig, weights: str) -> CacheKey:
        """Looks at a few images, and once at every file.

        Args:
            weights: `weights_digest` of the model's vision encoder.

        Raises:
            DataError: none of the images looked at can be read.
        """
        pixels, probe, is_random = look_at(images)
        views = run.cache_vision_views if is_random else 1
        parts = {
            "layout": LAYOUT,
            "encoder": {**_encoder_settings(model), "weights": weights},
            "transform": {**_processor_settings(images.dataset.vis_processor), "pixels": probe},
            "pictures": {"count": len(images), "digest": sources_digest(images.sources)},
            "views": views,
            "seed": run.seed if is_random else None,
        }
        text = json.dumps(parts, sort_keys=True, default=str)
        digest = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        return cls(digest, json.loads(text), is_random, views, tuple(model.encode(pixels[None]).shape[1:]))


def look_at(images: DistinctImages) -> tuple[Tensor, str, bool]:
    """Some images as the transform makes them under a fixed seed.

    Returns:
        the pixels of one of them; a digest of all, which also notices what no setting says: other code,
        another version of a library, a drawn world that is drawn differently; whether the transform is
        random, which is whether reading an image moves a random generator.

    Raises:
        DataError: none can be read.
    """
    digest, is_random = hashlib.blake2b(digest_size=16), False
    pixels, problem = None, None
    for number in images.probes():
        with seeded(0):
            before = _generators()
            try:
                pixels = images.load_now(number)
            except (DataError, OSError) as error:
                problem = error
                continue
            is_random = is_random or _generators() != before
        digest.update(f"{pixels.dtype} {tuple(pixels.shape)}".encode())
        digest.update(_bytes(pixels))
    if pixels is None:
        raise DataError(f"none of {len(images.probes())} images looked at can be read: {problem}")
    return pixels, digest.hexdigest(), is_random


def weights_digest(module: nn.Module) -> str:
    """A digest of a module's weights and buffers: their names, types, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def sources_digest(sources: Sequence[Any]) -> str:
    """A digest of what images are made from, in their order: of files their names, sizes and times."""
    root = f"{cache_root()}{os.sep}"
    parts = [sources[i : i + 1024] for i in range(0, len(sources), 1024)]
    digest = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor(16) as pool:  # a file server answers many at a time
        for stamps in pool.map(lambda part: [_stamp(source, root) for source in part], parts):
            digest.update("\n".join([*stamps, ""]).encode())
    return digest.hexdigest()


def _stamp(source: Any, root: str) -> str:
    if isinstance(source, tuple):
        return " ".join(_stamp(part, root) for part in source)
    if not isinstance(source, os.PathLike):
        return str(source)
    name = os.fspath(source).removeprefix(root)  # a data root may be moved
    try:
        stat = os.stat(source)
    except OSError:
        return f"{name} missing"
    return f"{name} {stat.st_size} {stat.st_mtime_ns}"


def _encoder_settings(model: BaseModel) -> dict[str, Any]:
    cfg: Any = getattr(getattr(model, "cfg", None), "vision", None)
    fields = asdict(cfg) if is_dataclass(cfg) and not isinstance(cfg, type) else {}
    # without what is not set: a setting that a later version brings does not empty the stores of this one
    settings = {name: v for name, v in fields.items() if name not in _LEFT_OUT and v is not None}
    return {"class": _class_name(model.vision), **settings}


def _processor_settings(processor: Any) -> dict[str, Any]:
    return {"class": _class_name(processor), **getattr(processor, "section", {})}


def _class_name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _generators() -> tuple[Any, ...]:
    """The states of the random generators that a dataset may draw from."""
    state: Any = np.random.get_state()
    name, keys, *rest = state
    return random.getstate(), name, keys.tobytes(), rest, torch.get_rng_state().numpy().tobytes()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
