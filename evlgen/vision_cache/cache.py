"""``run.cache_vision``: what a frozen vision encoder makes of the training images, computed once and kept.

The tokens of a dataset lie in ``<data root>/vision_tokens/<key>/`` (`token_store`); the key is a digest of
all that they follow from (`cache_key`). Whatever of it changes leads to another folder, and what was made
before is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from evlgen.batch import Batch
from evlgen.common.errors import ConfigError, DataError, EVLGenError, TrainingError
from evlgen.config.run_config import RunConfig
from evlgen.datasets.base_dataset import BaseDataset, CollatedDataset, SequenceDataset
from evlgen.files.io import cache_root
from evlgen.files.locks import lock_at, try_lock
from evlgen.loaders.batch_plan import mix_seed
from evlgen.loaders.data import eval_loader
from evlgen.loaders.interruption import StopNow, StopRequest
from evlgen.models.base_model import BaseModel
from evlgen.models.protocols import EncodesImages, offers
from evlgen.vision_cache.key import CacheKey, DistinctImages, weights_digest
from evlgen.vision_cache.store import (
    CARD_FILE,
    DONE,
    TO_DO,
    TokenStore,
    TokenWriter,
    create_store,
    store_bytes,
)

logger = logging.getLogger(__name__)

FOLDER = "vision_tokens"
_FLUSH_SECONDS = 5.0  # at most so much work is lost when a process is killed
_LOG_SECONDS = 20.0
_SPARE_BYTES = 64 << 20  # left free on the disk
_DIFFERENT = 0.1  # share of a token's length; bf16 on two devices differs by a hundredth or two


class CachedVisuals(BaseDataset):
    """A dataset whose samples hold ``visual_tokens`` bfloat16 [N, C], read from a store, instead of pixels;
    those of a `SequenceDataset` hold them in ``images``, for each image.

    Of several views torch's global generator chooses one.

    Args:
        dataset: what gives the texts.
        store: what gives the tokens.
        entries: the store's entries of all samples, one sample after the other.
        ends: where each sample's end there, [len(dataset)].
    """

    def __init__(
        self, dataset: BaseDataset, store: TokenStore, entries: np.ndarray, ends: np.ndarray
    ) -> None:
        super().__init__(dataset.records, dataset.vis_processor, dataset.text_processor)
        self.dataset, self.store, self.entries, self.ends = dataset, store, entries, ends

    def load_sample(self, index: int) -> dict[str, Any]:
        start = int(self.ends[index - 1]) if index else 0
        tokens = [self._tokens(int(entry)) for entry in self.entries[start : self.ends[index]]]
        if isinstance(self.dataset, SequenceDataset):
            return {"images": tokens, **self.dataset.load_text(index)}
        return {"visual_tokens": tokens[0], **self.dataset.load_text(index)}

    def _tokens(self, entry: int) -> torch.Tensor:
        problem = self.store.problem(entry)
        if problem is not None:
            raise problem
        view = int(torch.randint(self.store.views, ())) if self.store.views > 1 else 0
        return self.store.read(entry, view)

    def sample_id(self, index: int) -> str:
        return self.dataset.sample_id(index)

    def collater(self, samples: Sequence[Any]) -> Batch:
        return self.dataset.collater(samples)


def cached(
    datasets: Mapping[str, BaseDataset],
    model: BaseModel,
    run: RunConfig,
    accelerator: Accelerator,
    stop: StopRequest | None = None,
    setting: str = "run.cache_vision",
    samples: Sequence[int] | None = None,
) -> dict[str, BaseDataset]:
    """Datasets that read visual tokens, after computing those that are not kept yet.

    All processes call it together and share the work. No random generator is moved.

    Args:
        datasets: by name; each must define `load_visual`, `load_text` and `visual_source`, or be a
            `SequenceDataset`. One that shows no images comes out as it is.
        model: on its device, its vision encoder frozen.
        run: ``seed``, ``cache_vision_views``, ``batch_size_eval``, ``num_workers``.
        stop: asked between batches whether to stop; what is computed by then is kept.
        setting: what asked for it, which messages name.
        samples: the indices that will be read of each dataset; the images of others are not computed. None:
            all.

    Raises:
        ConfigError: the encoder is trained, or a dataset cannot be read without its pixels.
        TrainingError: too little disk space, or a folder that cannot be used.
        DataError: a damaged store, or one of other tokens than this encoder makes; no image can be read.
        Interrupted: `stop` was asked for.
    """
    check_encoder(model, setting)
    for name, dataset in datasets.items():
        check_dataset(name, dataset, setting)
    weights = functools.cache(lambda: weights_digest(model.vision))  # the same for all of them
    return {
        name: _Cache(name, dataset, model, run, accelerator, stop, setting, weights, samples).filled()
        for name, dataset in datasets.items()
    }


def check_encoder(model: BaseModel, setting: str) -> None:
    """Raises `ConfigError` where a model's visual tokens cannot be kept."""
    if not offers(model, EncodesImages):
        raise ConfigError(
            f"{setting}: {type(model).__name__} has no `vision` and `encode(image)`. Derive it from "
            f"evlgen.models.vlm.VLM, or set {setting}: false."
        )
    trained = next((name for name, p in model.vision.named_parameters() if p.requires_grad), None)
    if trained:
        raise ConfigError(
            f"{setting}: the vision encoder is trained ({trained}) and gives other tokens at every "
            f"step. Set model.vision.freeze: true, or {setting}: false."
        )


def check_dataset(name: str, dataset: BaseDataset, setting: str) -> None:
    """Raises `ConfigError` where a dataset cannot be read without its pixels."""
    cls, base = type(dataset), BaseDataset
    needed = ["load_visual", "load_text", "visual_source"]
    if isinstance(dataset, SequenceDataset):
        base, needed = SequenceDataset, ["visuals", "load_one", "load_text", "source_of"]
    lacking = [method for method in needed if getattr(cls, method) is getattr(base, method)]
    if lacking or cls.load_sample is not base.load_sample:
        what = f"does not define {', '.join(lacking)}" if lacking else "defines load_sample as well"
        raise ConfigError(
            f"{setting}: {cls.__name__} of dataset '{name}' {what}, so it cannot be read without its "
            f"pixels. Define {', '.join(needed[:-1])} and {needed[-1]} in place of load_sample (see "
            f"evlgen.datasets.base_dataset.{base.__name__}), or set {setting}: false."
        )


class _Cache:
    """Finds or makes the store of one dataset, and fills it."""

    def __init__(
        self,
        name: str,
        dataset: BaseDataset,
        model: BaseModel,
        run: RunConfig,
        accelerator: Accelerator,
        stop: StopRequest | None,
        setting: str,
        weights: Callable[[], str],
        samples: Sequence[int] | None,
    ) -> None:
        self.setting, self.weights = setting, weights
        self.name, self.model, self.run, self.accelerator, self.stop = name, model, run, accelerator, stop
        self.images = DistinctImages.of(dataset)
        self.wanted = self.images.numbers_of(samples)
        self.root = cache_root() / FOLDER

    def filled(self) -> BaseDataset:
        """The dataset over its store, whose every wanted entry is done or broken."""
        if not len(self.images):
            logger.info("%s: '%s' shows no images", self.setting, self.name)
            return self.images.dataset
        key = self._from_main(lambda: CacheKey.of(self.images, self.model, self.run, self.weights()))
        folder = self.root / key.digest
        self._say_views(key)
        self._agreed(lambda: self._make(folder, key), self.accelerator.is_local_main_process)
        store = self._agreed(lambda: TokenStore(folder, len(self.images), key.views, key.shape))
        self._agreed(lambda: self._compare(store), self.accelerator.is_local_main_process)
        if any(gather_object([bool((store.status[self.wanted] != DONE).any())])):
            with self._alone(folder):
                self._fill(store)
            self._agreed(lambda: self._check_filled(store))
        self._say_filled(store)
        return CachedVisuals(self.images.dataset, store, self.images.of_samples, self.images.ends)

    # ---- the store ----

    def _make(self, folder: Path, key: CacheKey) -> None:
        """Makes the store where there is none, if the disk has room for what is to be computed."""
        size = store_bytes(len(self.images), key.views, key.shape)
        if not folder.is_dir():
            self.root.mkdir(parents=True, exist_ok=True)
            self._say_others()
            self._check_room(len(self.wanted) * size // len(self.images), size, key.views)
            made = time.strftime("%Y-%m-%d %H:%M:%S")
            card = {"dataset": self.name, "made": made, **key.parts, "shape": key.shape, "bytes": size}
            create_store(folder, card, len(self.images), key.views, key.shape)
        else:
            store = TokenStore(folder, len(self.images), key.views, key.shape)
            left = int((store.status[self.wanted] == TO_DO).sum())
            if left:
                self._check_room(left * size // len(self.images), size, key.views)

    def _check_room(self, needed: int, size: int, views: int) -> None:
        free = shutil.disk_usage(self.root).free
        if needed + _SPARE_BYTES > free:
            fewer = ", lower run.cache_vision_views" if views > 1 else ""
            raise TrainingError(
                f"{self.setting} needs {shown_bytes(size)} for {len(self.images)} images of "
                f"'{self.name}', {shown_bytes(needed)} of it still to be written, and {self.root} has "
                f"{shown_bytes(free)} left. Delete folders there that no run needs (card.json says what each "
                f"is of){fewer}, set EVLGEN_CACHE to a data root on a larger disk, or train without."
            )

    def _compare(self, store: TokenStore) -> None:
        """Encodes some kept images again: neither the encoder's code nor the file may have changed."""
        for entry in [entry for entry in self.images.probes() if store.status[entry] == DONE][:4]:
            pixels = self.images.load(entry, mix_seed(self.run.seed, entry, 0))
            new, old = self.model.encode(pixels[None])[0].cpu().float(), store.read(entry).float()
            # the median, since a few tokens are many times larger than the others
            difference = ((new - old).norm(dim=-1) / new.norm(dim=-1).clamp_min(1e-12)).median().item()
            if not difference <= _DIFFERENT:
                raise DataError(
                    f"{store.folder} holds other tokens than this vision encoder makes of the same images "
                    f"({difference:.0%} apart): its code was changed, or the file is damaged. Delete the "
                    "folder; it is filled again."
                )

    @contextlib.contextmanager
    def _alone(self, folder: Path) -> Iterator[None]:
        """Keeps other runs from filling the same store meanwhile; waits for one that does."""
        with contextlib.ExitStack() as held:
            if self.accelerator.is_local_main_process:
                lock = lock_at(folder / "lock")
                held.callback(lock.release)
                if not try_lock(lock):
                    logger.info("another run is filling %s: waiting for it", folder)
                while not try_lock(lock):
                    self._stop_if_asked()
                    time.sleep(0.2)
            self.accelerator.wait_for_everyone()
            yield
            self.accelerator.wait_for_everyone()

    # ---- filling ----

    def _fill(self, store: TokenStore) -> None:
        """Computes what the store lacks, this process its share."""
        share, processes, left = self._share(store)
        self.accelerator.wait_for_everyone()  # nobody writes before all have read
        logger.info(
            "%s: computing the tokens of %d images of '%s' into %s",
            self.setting,
            left,
            self.name,
            store.folder,
        )
        groups = _Groups(self.images, share, store.views, self.run.seed)
        on_gpu = self.accelerator.device.type == "cuda"
        loader = eval_loader(groups, 1, self.run.num_workers, on_gpu)
        total = sum(map(len, share))
        progress = _Progress(total, processes, shown=self.accelerator.is_main_process)
        try:
            with TokenWriter(store) as writer, progress:
                self._write_all(writer, loader, progress)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            size = store_bytes(store.entries, store.views, store.shape)
            raise TrainingError(
                f"{self.setting}: {self.root} is full before all {shown_bytes(size)} of '{self.name}' are "
                "written. What is written is kept: make room, and the same command goes on from there."
            ) from error

    def _share(self, store: TokenStore) -> tuple[list[list[int]], int, int]:
        """The groups of entries this process computes, how many processes fill the same store, and the number
        of entries it lacks.

        Entries of one group are encoded together. Groups depend neither on the number of processes nor on
        interruptions, so neither do the tokens. Broken images are tried again: a file server may have been
        away.
        """
        holders = gather_object([store.id])  # machines may have a store each, or one in common
        mine = [rank for rank, holder in enumerate(holders) if holder == store.id]
        place = mine.index(self.accelerator.process_index)
        store.refresh()
        size = max(1, self.run.batch_size_eval // store.views)
        lacking = self.wanted[store.status[self.wanted] != DONE]
        groups = np.split(lacking, np.flatnonzero(np.diff(lacking // size)) + 1) if len(lacking) else []
        # consecutive groups: written in a row, and two machines share no block of the file but at the seams
        share = groups[len(groups) * place // len(mine) : len(groups) * (place + 1) // len(mine)]
        return [group.tolist() for group in share], len(mine), len(lacking)

    def _write_all(self, writer: TokenWriter, loader: Any, progress: _Progress) -> None:
        flushed = time.monotonic()
        groups = loader if self.stop is None else self.stop.heeding(loader, loader.num_workers > 0)
        with contextlib.suppress(StopNow):
            for group in groups:
                for entry, (reason, cause) in group["broken"].items():
                    writer.put_broken(entry, reason, cause)
                for entries, pixels in group["alike"]:
                    self._write(writer, entries, pixels)
                progress.add(group["count"])
                if time.monotonic() - flushed > _FLUSH_SECONDS:
                    writer.flush()
                    flushed = time.monotonic()
                if self.stop is not None and self.stop.requested:
                    break
        writer.flush()
        self._stop_if_asked()

    def _write(self, writer: TokenWriter, entries: list[int], pixels: torch.Tensor) -> None:
        views = pixels.flatten(0, 1).split(self.run.batch_size_eval)
        parts = [self.model.encode(part).to("cpu") for part in views]
        tokens = torch.cat(parts).unflatten(0, (-1, writer.store.views))  # [entries, views, N, C]
        if tuple(tokens.shape[2:]) != writer.store.shape:
            raise DataError(
                f"{self.setting}: one image of '{self.name}' gives tokens of shape "
                f"{tuple(tokens.shape[2:])}, another {writer.store.shape}. The training transform must make "
                "all images the same size."
            )
        for entry, one in zip(entries, tokens, strict=True):
            writer.put(entry, one)

    def _check_filled(self, store: TokenStore) -> None:
        store.refresh()
        left = int((store.status[self.wanted] == TO_DO).sum())
        if left:
            raise TrainingError(
                f"{self.setting}: {store.folder} still lacks {left} of {store.entries} images after all "
                "processes have written theirs: they do not see each other's writes. Set EVLGEN_CACHE to a "
                "folder of each machine's own."
            )

    # ---- what is said ----

    def _say_views(self, key: CacheKey) -> None:
        wanted = self.run.cache_vision_views
        if key.is_random and wanted == 1 and self.accelerator.is_main_process:
            logger.warning(
                "run.cache_vision keeps one random view of each image of '%s', the same in every epoch. "
                "run.cache_vision_views=8 keeps eight, and training chooses among them",
                self.name,
            )
        if not key.is_random and wanted > 1:
            logger.info("the transform of '%s' is not random: one view of each image is kept", self.name)

    def _say_others(self) -> None:
        others = [folder for folder in self.root.glob("*") if (folder / CARD_FILE).is_file()]
        size = sum(file.stat().st_blocks * 512 for folder in others for file in folder.glob("*"))
        if others:
            what = "%d other vision caches take %s in %s; each one's card.json says what it is of"
            logger.info(what, len(others), shown_bytes(size), self.root)

    def _say_filled(self, store: TokenStore) -> None:
        size = shown_bytes(store_bytes(store.entries, store.views, store.shape))
        broken = int((store.status[self.wanted] != DONE).sum())
        logger.info(
            "%s: '%s' reads %d images%s%s from %s (%s)",
            self.setting,
            self.name,
            len(self.wanted),
            f" in {store.views} views each" if store.views > 1 else "",
            f", {broken} of them broken," if broken else "",
            store.folder,
            size,
        )

    # ---- several processes ----

    def _from_main(self, find: Callable[[], Any]) -> Any:
        """What the first process finds, on all of them; its error likewise."""
        result: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                result[0] = find()
            except EVLGenError as error:
                result[1] = error
        broadcast_object_list(result)
        if result[1] is not None:
            raise result[1]
        return result[0]

    def _agreed(self, act: Callable[[], Any], takes_part: bool = True) -> Any:
        """Acts on this process if it takes part; where that fails on one, all raise."""
        result, problem = None, None
        try:
            result = act() if takes_part else None
        except EVLGenError as error:
            problem = error
        except OSError as error:
            remedy = f"Set EVLGEN_CACHE to a folder that takes files, or {self.setting}: false."
            problem = TrainingError(f"{self.setting}: {self.root} cannot be used ({error}). {remedy}")
        problems = [p for p in gather_object([problem]) if p is not None]
        if problems:
            raise problems[0]
        return result

    def _stop_if_asked(self) -> None:
        if self.stop is not None and self.stop.requested:
            raise self.stop.interrupted("while filling the vision cache; what it has by now is kept")


class _Groups(CollatedDataset):
    """Images to encode: an item is a group of ``count`` entries, with ``alike``: those whose pixels have one
    shape and these, [entries, views, 3, H, W] or, of videos, [entries, views, 3, T, H, W]; and ``broken``:
    entry -> reason and cause."""

    def __init__(self, images: DistinctImages, groups: list[list[int]], views: int, seed: int) -> None:
        self.images, self.groups, self.views, self.seed = images, groups, views, seed

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: int) -> dict[str, Any]:
        alike: dict[torch.Size, dict[int, torch.Tensor]] = {}
        broken = {}
        for entry in self.groups[number]:
            seeds = [mix_seed(self.seed, entry, view) for view in range(self.views)]
            try:
                pixels = torch.stack([self.images.load(entry, seed) for seed in seeds])
                alike.setdefault(pixels.shape, {})[entry] = pixels
            except (DataError, OSError) as error:
                broken[entry] = (str(error), getattr(error, "cause", "unreadable"))
        stacked = [(list(found), torch.stack(list(found.values()))) for found in alike.values()]
        return {"alike": stacked, "broken": broken, "count": len(self.groups[number])}

    def collater(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return samples[0]


class _Progress:
    """A bar on a terminal, a line now and then elsewhere; one process speaks for all."""

    def __init__(self, total: int, processes: int, shown: bool) -> None:
        self.total, self.processes, self.shown, self.done = total, processes, shown, 0
        self._bar = tqdm(
            total=total * processes,
            desc="encoding images",
            unit="image",
            dynamic_ncols=True,
            leave=False,
            disable=not (shown and sys.stderr.isatty()),
        )
        self._started = self._said = time.monotonic()

    def add(self, count: int) -> None:
        """Notes images of this process."""
        self.done += count
        self._bar.update(count * self.processes)
        now = time.monotonic()
        if self.shown and self._bar.disable and now - self._said > _LOG_SECONDS:
            self._said = now
            rate = self.done / (now - self._started)
            minutes, seconds = divmod(int((self.total - self.done) / rate), 60)
            logger.info(
                "encoding images: %d/%d  %.1f/s  %d:%02d left",
                self.done * self.processes,
                self.total * self.processes,
                rate * self.processes,
                minutes,
                seconds,
            )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


def shown_bytes(size: float) -> str:
    """A number of bytes for people: ``81.9 GB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
